"""One connection to a server: opened with hello, then a request for an answer, whatever carries the messages.

Source: spec/session_protocol.md 7.1, 7.2.
"""

from __future__ import annotations

import time
from typing import Protocol

from worldvln_edge.client_config import ClientConfig
from worldvln_edge.client_errors import (
    AnswerTimeoutError,
    ConnectionLostError,
    MissingTransportError,
    ServerError,
    ServerUnreachableError,
)
from worldvln_edge.conversation import FULL_OR_STARTING, A, Call, Conversation
from worldvln_edge.protocol import Encoding, Request, Welcome
from worldvln_edge.server_address import is_zmq
from worldvln_edge.websocket_transport import WebSocketTransport


class Transport(Protocol):
    """An open way for messages; closed by the first error."""

    hello_key: str | None
    """API key that `hello` has to carry."""

    def send(self, data: bytes, encoding: Encoding) -> None: ...

    def receive(self, timeout_s: float) -> tuple[bytes, Encoding]: ...

    def close(self) -> None: ...


class ServerConnection:
    """An open connection that has said hello.

    Raises:
        ServerUnreachableError: nothing answers, or something else does.
        ServerError: `unauthorized`, `forbidden`, `unsupported_version`.
        MissingTransportError: the address needs pyzmq.
    """

    def __init__(self, config: ClientConfig):
        self._config = config
        self._conversation = Conversation(config.encoding)
        self._transport = _open_transport(config)
        try:
            self.welcome: Welcome = self._carry(self._conversation.hello(self._transport.hello_key))
        except (ConnectionLostError, ServerError) as error:
            self.close()
            if isinstance(error, ServerError) and error.code not in FULL_OR_STARTING:
                raise
            raise ServerUnreachableError(config.url, error) from error
        except BaseException:
            self.close()
            raise
        self._conversation.max_msg_bytes = self.welcome.limits.max_msg_bytes

    def close(self) -> None:
        self._transport.close()

    def exchange(self, request: Request, kind: type[A]) -> A:
        """Send a request under the next id and wait for its answer.

        Raises:
            ServerError: the server refused it.
            ConnectionLostError: the connection broke first.
            AnswerTimeoutError: no answer in time; close the connection, the answer may still come.
            ProtocolError: the message is too large, or the server's answer is none of this protocol.
        """
        return self._carry(self._conversation.call(request, kind))

    def _carry(self, call: Call[A]) -> A:
        timeout_s = self._config.answer_timeout_s
        give_up_s = time.monotonic() + timeout_s
        self._transport.send(call.data, self._conversation.encoding)
        while True:
            try:
                message = self._transport.receive(max(0.0, give_up_s - time.monotonic()))
            except TimeoutError as error:
                raise AnswerTimeoutError(self._config.url, timeout_s) from error
            answer = call.take(*message)
            if answer is not None:
                return answer


def _open_transport(config: ClientConfig) -> Transport:
    if not is_zmq(config.url):
        return WebSocketTransport(config)
    try:
        from worldvln_edge.zmq_transport import ZmqTransport  # pyzmq is no part of the base install
    except ModuleNotFoundError as error:
        raise MissingTransportError(config.url, "pyzmq") from error
    return ZmqTransport(config)
