"""One WebSocket to a server: open it with hello, exchange a request for its answer, name what went wrong.

Source: spec/session_protocol.md 7.1, 7.2, 7.6, 7.7.
"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from worldvln_edge.protocol import (
    ERRORS,
    PROTOCOL_VERSION,
    UNSET,
    WEBSOCKET_PATH,
    WEBSOCKET_SUBPROTOCOL,
    Actions,
    Answer,
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

_MAX_ANSWER_BYTES = 8 * 2**20
_MESSAGE_TOO_BIG = 1009
A = TypeVar("A", Welcome, SessionState, Actions, Pong)


class ServerError(RuntimeError):
    """The server refused a request. `code` is a key of protocol.ERRORS; absent details are None.

    Attributes:
        retry: sending again (after what the message says) can succeed; `retry_ms` says when.
        expected: for `gap`, the frame index that must come next.
        frames: frames that the session holds.
        error_id: for `internal`, what to look for in the server's log.
    """

    def __init__(self, error: Error):
        super().__init__(f"{error.code}: {error.msg}")
        self.code, self.retry = error.code, error.retry
        self.retry_ms = None if error.retry_ms is UNSET else error.retry_ms
        self.expected = None if error.expected is UNSET else error.expected
        self.frames = None if error.frames is UNSET else error.frames
        self.error_id = None if error.error_id is UNSET else error.error_id


class ServerAddressError(ValueError):
    """What was given as a server is no address."""

    def __init__(self, url: str):
        super().__init__(f"{url} is no WebSocket address; give ws://host:port or wss://host:port")


class ServerUnreachableError(ConnectionError):
    """No server of this protocol answers at the address. The message says what to do."""

    def __init__(self, url: str, reason: object):
        reason = getattr(reason, "reason", reason)  # of several attempts, the last one's
        super().__init__(
            f"no worldvln-edge server answers at {url} ({reason}); check the address, or start one with "
            "`worldvln-edge serve BUNDLE --ws HOST:PORT`"
        )
        self.url, self.reason = url, reason


class ConnectionLostError(ConnectionError):
    """An open connection broke; the last request may or may not have been handled."""


class AnswerTimeoutError(TimeoutError):
    """The server took a request and did not answer in time."""


class ServerConnection:
    """An open connection that has said hello.

    Args:
        url: as `session_url` gives it.
        key: API key.
        encoding: how messages are written.
        connect_timeout_s: for opening.
        answer_timeout_s: longest wait for one answer.
        proxy: URL of an HTTP or SOCKS proxy; None connects directly, whatever the environment says.

    Raises:
        ServerUnreachableError: nothing answers, or something else does.
        ServerError: `unauthorized`, `forbidden`, `unsupported_version`.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        encoding: Encoding,
        connect_timeout_s: float,
        answer_timeout_s: float,
        proxy: str | None,
    ):
        self._url, self._encoding, self._answer_timeout_s = url, encoding, answer_timeout_s
        self._ids = itertools.count(1)
        self._max_msg_bytes: int | None = None
        self._open = ExitStack()  # recent websockets connect as a context manager only
        try:
            self._socket: ClientConnection = self._open.enter_context(
                connect(
                    url,
                    additional_headers={} if key is None else {"Authorization": f"Api-Key {key}"},
                    subprotocols=[Subprotocol(WEBSOCKET_SUBPROTOCOL)],
                    compression=None,
                    open_timeout=connect_timeout_s,
                    max_size=_MAX_ANSWER_BYTES,
                    proxy=proxy,
                )
            )
        except InvalidStatus as refused:
            raise _refusal(url, refused.response.status_code) from refused
        except (OSError, InvalidHandshake, EOFError) as error:
            raise ServerUnreachableError(url, str(error) or type(error).__name__) from error
        try:
            self.welcome: Welcome = self.exchange(Hello(id=0, v=[PROTOCOL_VERSION], client="worldvln-edge"), Welcome)
        except ConnectionLostError as error:
            raise ServerUnreachableError(url, error) from error
        except (ServerError, ProtocolError, AnswerTimeoutError):
            self.close()
            raise
        self._max_msg_bytes = self.welcome.limits.max_msg_bytes

    def close(self) -> None:
        self._open.close()

    def exchange(self, request: Request, kind: type[A]) -> A:
        """Send a request under the next id and wait for its answer.

        Raises:
            ServerError: the server refused it.
            ConnectionLostError: the connection broke first.
            AnswerTimeoutError: no answer in time; close the connection, the answer may still come.
            ProtocolError: the message is too large, or the server's answer is none of this protocol.
        """
        request = msgspec.structs.replace(request, id=next(self._ids))
        data = encode(request, self._encoding)
        if self._max_msg_bytes is not None and len(data) > self._max_msg_bytes:
            raise ProtocolError(
                "too_large",
                f"message of {len(data)} bytes; the server accepts {self._max_msg_bytes}. Send fewer frames",
            )
        try:
            self._socket.send(data, text=self._encoding == "json")
            answer = self._answer_to(request.id)
        except ConnectionClosed as lost:
            if lost.rcvd is not None and lost.rcvd.code == _MESSAGE_TOO_BIG:
                raise ProtocolError("too_large", f"the server refused a message of {len(data)} bytes") from lost
            raise ConnectionLostError(f"connection lost: {lost}") from lost
        except TimeoutError as error:
            raise AnswerTimeoutError(
                f"{self._url} did not answer within {self._answer_timeout_s:g} s; see its /health for the load"
            ) from error
        if isinstance(answer, Error):
            raise ServerError(answer)
        if not isinstance(answer, kind):
            raise ProtocolError("bad_request", f"expected {kind.__name__}, the server sent {type(answer).__name__}")
        return answer

    def _answer_to(self, request_id: int) -> Answer:
        give_up_s = time.monotonic() + self._answer_timeout_s
        while True:
            data = self._socket.recv(timeout=max(0.0, give_up_s - time.monotonic()))
            encoding: Encoding = "json" if isinstance(data, str) else "msgpack"
            answer = decode_answer(data.encode() if isinstance(data, str) else data, encoding)
            # `bye` needs no act here: after a shutdown the close follows, an expired session answers unknown_session.
            if not isinstance(answer, Bye) and (answer.re == request_id or answer.re is None):
                return answer


def _refusal(url: str, status: int) -> ServerError | ServerUnreachableError:
    """The typed error of an upgrade that was answered with an HTTP status."""
    for code, hint in (("unauthorized", "the server wants an API key, or another one"), ("forbidden", "refused")):
        if ERRORS[code].http == status:
            return ServerError(Error(re=None, code=code, msg=f"{url}: {hint}", retry=False))
    return ServerUnreachableError(url, f"HTTP status {status}")  # 503 while full, 404 of another program


def session_url(url: str) -> str:
    """`host:port`, `http://...` or `ws://...` as the WebSocket address of the native protocol.

    Raises:
        ServerAddressError: no such address.
    """
    if "://" not in url:
        url = "ws://" + url
    scheme, _, rest = url.partition("://")
    scheme = {"http": "ws", "https": "wss"}.get(scheme.lower(), scheme.lower())
    if scheme not in ("ws", "wss"):
        raise ServerAddressError(url)
    try:
        if not urlsplit(url).hostname or urlsplit(url).port == 0:
            raise ServerAddressError(url)
    except ValueError as error:
        raise ServerAddressError(url) from error
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}{slash}{path}" if path else f"{scheme}://{host}{WEBSOCKET_PATH}"
