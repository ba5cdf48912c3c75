"""Messages of the native protocol over one WebSocket, for programs with and without an event loop.

Source: spec/session_protocol.md 7 (transports), 7.6.
"""

from __future__ import annotations

import asyncio
import socket as network
import ssl
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from threading import Thread
from typing import Any, TypeVar

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.typing import Subprotocol

from worldvln_edge.client_config import ClientConfig
from worldvln_edge.client_errors import ConnectionLostError, ServerError, ServerUnreachableError
from worldvln_edge.conversation import MAX_ANSWER_BYTES
from worldvln_edge.protocol import ERRORS, WEBSOCKET_SUBPROTOCOL, Encoding, Error, ProtocolError

_MESSAGE_TOO_BIG = 1009
_GOODBYE_S = 1.0  # how long a closing connection waits for the server's close frame, which a dead link never brings
_OPENING_FAILED = (OSError, InvalidHandshake, EOFError)

T = TypeVar("T")


class WebSocketTransport:
    """AsyncWebSocketTransport for programs without an event loop: it has a thread with one.

    A client of blocking calls would read and write one TLS object from two threads, and OpenSSL forbids that: when a
    server's ticket came while the first request went out, the request was lost.

    Raises when opened: ServerUnreachableError; ServerError `unauthorized`, `forbidden`.
    """

    hello_key: str | None = None  # the key is in the upgrade request

    def __init__(self, config: ClientConfig):
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="worldvln-websocket", daemon=True)
        self._thread.start()
        self._socket = AsyncWebSocketTransport(config)
        try:
            self._run(self._socket.open())
        except BaseException:
            self._stop()
            raise

    def send(self, data: bytes, encoding: Encoding) -> None:
        """Raises ConnectionLostError, ProtocolError (`too_large`)."""
        self._run(self._socket.send(data, encoding))

    def receive(self, timeout_s: float) -> tuple[bytes, Encoding]:
        """The next message. Raises ConnectionLostError, TimeoutError, ProtocolError (`too_large`)."""
        try:
            return self._run(asyncio.wait_for(self._socket.receive(), timeout_s))
        except asyncio.TimeoutError as late:  # another class before Python 3.11
            raise TimeoutError from late

    def close(self) -> None:
        if not self._loop.is_closed():
            try:
                self._run(self._socket.close())
            finally:
                self._stop()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C comes to the thread that waits
            raise

    def _stop(self) -> None:
        self._run(_cancel_other_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class AsyncWebSocketTransport:
    """Messages over one WebSocket of the event loop it is used on."""

    hello_key: str | None = None

    def __init__(self, config: ClientConfig):
        self._config = config
        self._stack = AsyncExitStack()
        self._socket: Any = None

    async def open(self) -> None:
        """Raises ServerUnreachableError; ServerError `unauthorized`, `forbidden`."""
        config = self._config
        try:
            self._socket = await self._stack.enter_async_context(connect(config.url, **_options(config)))
            _bound_sending(self._socket.transport.get_extra_info("socket").fileno(), config.silent_for_s)
        except _OPENING_FAILED as error:
            await self.close()
            raise _opening_error(config.url, error) from error

    async def send(self, data: bytes, encoding: Encoding) -> None:
        try:
            await self._socket.send(data, text=encoding == "json")
        except ConnectionClosed as lost:
            raise _closed_error(lost) from lost

    async def receive(self) -> tuple[bytes, Encoding]:
        try:
            return _message(await self._socket.recv())
        except ConnectionClosed as lost:
            raise _closed_error(lost) from lost

    async def close(self) -> None:
        try:
            await asyncio.wait_for(self._stack.aclose(), 2 * _GOODBYE_S)
        except asyncio.TimeoutError:  # its close frame waits behind a message that does not go out
            self._socket.transport.abort()


async def _cancel_other_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _options(config: ClientConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "additional_headers": {} if config.key is None else {"Authorization": f"Api-Key {config.key}"},
        "subprotocols": [Subprotocol(WEBSOCKET_SUBPROTOCOL)],
        "compression": None,
        "open_timeout": config.connect_timeout_s,
        "ping_interval": config.heartbeat_s,
        "ping_timeout": config.silent_for_s,
        "close_timeout": _GOODBYE_S,
        "max_size": MAX_ANSWER_BYTES,
        "proxy": config.proxy,
    }
    return options if config.tls is None else options | {"ssl": config.tls}


def _bound_sending(file_descriptor: int, silent_for_s: float) -> None:
    """Let the system end a connection that takes no byte for so long; where it cannot, its own limits count.

    Without it a message that fills all buffers is waited for, and heartbeats wait behind it.
    """
    user_timeout = getattr(network, "TCP_USER_TIMEOUT", None)  # Linux
    if user_timeout is not None:
        with network.socket(fileno=network.dup(file_descriptor)) as twin:  # TLS inside TLS shows its descriptor only
            twin.setsockopt(network.IPPROTO_TCP, user_timeout, max(1, round(silent_for_s * 1e3)))


def _message(data: str | bytes) -> tuple[bytes, Encoding]:
    return (data.encode(), "json") if isinstance(data, str) else (data, "msgpack")


def _closed_error(lost: ConnectionClosed) -> ConnectionLostError | ProtocolError:
    if lost.rcvd is not None and lost.rcvd.code == _MESSAGE_TOO_BIG:
        return ProtocolError("too_large", "the server refused a message because of its size; send fewer frames")
    return ConnectionLostError(f"connection lost: {lost}")


def _opening_error(url: str, error: Exception) -> ServerError | ServerUnreachableError:
    """The typed error of an upgrade that failed, or was answered with an HTTP status."""
    if not isinstance(error, InvalidStatus):
        return ServerUnreachableError(url, _reason(url, error))
    status = error.response.status_code
    for code, hint in (("unauthorized", "the server wants an API key, or another one"), ("forbidden", "refused")):
        if ERRORS[code].http == status:
            return ServerError(Error(re=None, code=code, msg=f"{url}: {hint}", retry=False))
    return ServerUnreachableError(
        url, f"HTTP status {status}"
    )  # 503 while full, 429 above the rate, 404 of another program


def _reason(url: str, error: Exception) -> str:
    """Why no connection was opened; where one side speaks TLS and the other does not, what to change."""
    if isinstance(error, ssl.SSLCertVerificationError):
        trust = "ca_file says whom to trust (on a command line, --ca-file)"
        return f"its certificate is not trusted: {error.verify_message}; {trust}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS there: {error.reason or error}; a server without --tls-cert is reached at ws://"
    text = str(error) or type(error).__name__
    if url.startswith("ws://") and isinstance(error, InvalidMessage | EOFError | ConnectionResetError):
        return f"{text}; a server with --tls-cert is reached at wss://"
    return text
