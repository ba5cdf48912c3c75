"""One connection's side of the native protocol without any I/O: ids, sizes, which answer belongs to which request.

The connections (`connection.py`, `async_connection.py`) carry what a `Call` holds to the server and feed it what comes
back.
Source: spec/session_protocol.md 7.1, 7.2, 7.8.
"""

from __future__ import annotations

import itertools
from typing import Generic, TypeVar

import msgspec

from worldvln_edge.client_errors import ConnectionLostError, ServerError
from worldvln_edge.protocol import (
    PROTOCOL_VERSION,
    Actions,
    Bye,
    Encoding,
    Error,
    Hello,
    Pong,
    ProtocolError,
    Request,
    SessionState,
    Welcome,
)
from worldvln_edge.wire import decode_answer, encode

MAX_ANSWER_BYTES = 8 * 2**20
FULL_OR_STARTING = ("overloaded", "not_ready", "busy")
"""Refusals of hello that mean: nobody serves you here now. The WebSocket door says 503 or 429 in their place."""
A = TypeVar("A", Welcome, SessionState, Actions, Pong)


class Call(Generic[A]):
    """A request on its way, and the answer that it waits for."""

    def __init__(self, request: Request, data: bytes, kind: type[A]):
        self.data = data
        self._request = request
        self._kind: type[A] = kind

    def take(self, data: bytes, encoding: Encoding) -> A | None:
        """The answer, or None if this message is none to this request.

        Raises:
            ServerError: the server refused the request.
            ConnectionLostError: the server does not know this connection any more: it was restarted, or forgot it.
            ProtocolError: not a message of this protocol, or an answer of another kind.
        """
        answer = decode_answer(data, encoding)
        # `bye` needs no act here: after a shutdown the close follows, an expired session answers unknown_session.
        if isinstance(answer, Bye) or answer.re not in (self._request.id, None):
            return None
        if isinstance(answer, Error):
            if answer.code == "hello_required":
                raise ConnectionLostError(f"the server does not know this connection: {answer.msg}")
            raise ServerError(answer)
        if not isinstance(answer, self._kind):
            raise ProtocolError(
                "bad_request", f"expected {self._kind.__name__}, the server sent {type(answer).__name__}"
            )
        return answer


class Conversation:
    """What one connection has said so far."""

    def __init__(self, encoding: Encoding):
        self.encoding = encoding
        self.max_msg_bytes: int | None = None
        """What the server accepts, once it said welcome."""
        self._ids = itertools.count(1)

    def hello(self, key: str | None) -> Call[Welcome]:
        """The first request. `key` is given where the transport has no other place for it."""
        return self.call(Hello(id=0, v=[PROTOCOL_VERSION], client="worldvln-edge", key=key), Welcome)

    def call(self, request: Request, kind: type[A]) -> Call[A]:
        """A request under the next id.

        Raises:
            ProtocolError: `too_large`: the server would refuse it.
        """
        request = msgspec.structs.replace(request, id=next(self._ids))
        data = encode(request, self.encoding)
        if self.max_msg_bytes is not None and len(data) > self.max_msg_bytes:
            raise ProtocolError(
                "too_large",
                f"message of {len(data)} bytes; the server accepts {self.max_msg_bytes}. Send fewer frames",
            )
        return Call(request, data, kind)
