"""Messages of the native protocol over one ZeroMQ DEALER socket, for programs with and without an event loop.

A transport is one connection: the socket does not reconnect by itself, so a broken link is noticed at once and the
client can resume its session. Heartbeats find links that went silent.
Source: spec/session_protocol.md 7 (transports), 7.6; ZeroMQ RFC 37 (ZMTP 3.1).
"""

from __future__ import annotations

import asyncio
import math
import socket as network
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from worldvln_edge.client_config import ClientConfig
from worldvln_edge.client_errors import ConnectionLostError, ServerError, ServerUnreachableError
from worldvln_edge.conversation import MAX_ANSWER_BYTES
from worldvln_edge.protocol import Encoding, Error

_GOODBYE_MS = 500  # how long a closing socket may go on sending what is queued, such as `end`
_WATCHED = (
    zmq.Event.CLOSED
    | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)


class ZmqTransport:
    """Raises when opened: ServerUnreachableError; ServerError `unauthorized` (CURVE)."""

    def __init__(self, config: ClientConfig):
        self.hello_key = config.key
        self._url = config.url
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._monitor = _prepare(self._socket, config)
        try:
            _check_host(config.url)
            self._connect(config)
        except BaseException:
            self.close()
            raise

    def _connect(self, config: ClientConfig) -> None:
        give_up_s = time.monotonic() + config.connect_timeout_s
        _start_connecting(self._socket, config.url)
        is_open = False
        while not is_open:
            if not self._monitor.poll(_ms_until(give_up_s)):
                raise ServerUnreachableError(config.url, f"no answer within {config.connect_timeout_s:g} s")
            is_open = _opens(config.url, self._monitor.recv_multipart())

    def send(self, data: bytes, encoding: Encoding) -> None:
        """Raises ConnectionLostError. The encoding is told by the first byte."""
        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again as lost:
            raise ConnectionLostError("connection lost: the server is gone") from lost

    def receive(self, timeout_s: float) -> tuple[bytes, Encoding]:
        """The next message. Raises ConnectionLostError, TimeoutError."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        give_up_s = time.monotonic() + timeout_s
        is_lost = False
        while True:
            ready = dict(poller.poll(0 if is_lost else _ms_until(give_up_s)))
            if self._socket in ready:
                return _message(self._socket.recv())
            if is_lost:
                raise ConnectionLostError("connection lost: the server closed it, or the link broke")
            if not ready:
                raise TimeoutError
            # Once more around when it is lost: an answer may have come just before the end.
            is_lost = _is_end(self._monitor.recv_multipart())

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(_GOODBYE_MS)
        self._context.term()


class AsyncZmqTransport:
    """ZmqTransport on an event loop."""

    def __init__(self, config: ClientConfig):
        self.hello_key = config.key
        self._config = config
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._monitor = _prepare(self._socket, config)
        self._end: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Raises what ZmqTransport raises."""
        config = self._config
        await asyncio.to_thread(_check_host, config.url)
        _start_connecting(self._socket, config.url)
        try:
            await asyncio.wait_for(self._wait_until_open(), config.connect_timeout_s)
        except asyncio.TimeoutError:
            raise ServerUnreachableError(config.url, f"no answer within {config.connect_timeout_s:g} s") from None
        self._end = asyncio.create_task(self._wait_for_end())

    async def _wait_until_open(self) -> None:
        while not _opens(self._config.url, await self._monitor.recv_multipart()):
            pass

    async def _wait_for_end(self) -> None:
        while not _is_end(await self._monitor.recv_multipart()):
            pass

    async def send(self, data: bytes, encoding: Encoding) -> None:
        try:
            await self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again as lost:
            raise ConnectionLostError("connection lost: the server is gone") from lost

    async def receive(self) -> tuple[bytes, Encoding]:
        assert self._end is not None, "open() comes first"
        message = asyncio.ensure_future(self._socket.recv())
        try:
            await asyncio.wait({message, self._end}, return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return _message(message.result())
        finally:
            message.cancel()
        try:  # an answer may have come just before the end
            return _message(await self._socket.recv(zmq.DONTWAIT))
        except zmq.Again:
            raise ConnectionLostError("connection lost: the server closed it, or the link broke") from None

    async def close(self) -> None:
        if self._end is not None:
            self._end.cancel()
            await asyncio.wait({self._end})
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(_GOODBYE_MS)
        await asyncio.to_thread(self._context.term)


def _ms_until(monotonic_s: float) -> int:
    return max(0, math.ceil((monotonic_s - time.monotonic()) * 1e3))


def _ms(seconds: float) -> int:
    """For an option of which 0 means never."""
    return max(1, round(seconds * 1e3))


def _prepare(socket: Any, config: ClientConfig) -> Any:
    """Set the socket's options; returns its monitor."""
    socket.setsockopt(zmq.LINGER, 0)  # what a broken connection has not sent must not be waited for at the close
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _ms(config.heartbeat_s))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _ms(config.silent_for_s))
    socket.setsockopt(zmq.TCP_MAXRT, _ms(config.silent_for_s))  # heartbeats wait behind a message that is stuck
    socket.setsockopt(zmq.HANDSHAKE_IVL, _ms(config.connect_timeout_s))
    socket.setsockopt(zmq.CONNECT_TIMEOUT, _ms(config.connect_timeout_s))
    if config.url.startswith("tcp://["):
        socket.setsockopt(zmq.IPV6, 1)
    if config.curve is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, config.curve.server_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, config.curve.own.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, config.curve.own.secret)
    return socket.get_monitor_socket(_WATCHED, f"inproc://monitor-{uuid.uuid4().hex}")


def _check_host(url: str) -> None:
    """ZeroMQ looks names up again and again in silence; here an unknown one is an error."""
    if url.startswith("tcp://"):
        parts = urlsplit(url)
        try:
            network.getaddrinfo(parts.hostname, parts.port)
        except (OSError, UnicodeError) as error:
            raise ServerUnreachableError(url, error) from error


def _start_connecting(socket: Any, url: str) -> None:
    try:
        socket.connect(url)
    except zmq.ZMQError as error:
        raise ServerUnreachableError(url, error.strerror) from error


def _opens(url: str, monitor_message: list[bytes]) -> bool:
    """Whether the connection is open now; raises what it means when it cannot become so."""
    event = parse_monitor_message(monitor_message)["event"]
    if event == zmq.Event.HANDSHAKE_SUCCEEDED:
        return True
    if event == zmq.Event.HANDSHAKE_FAILED_AUTH:
        raise _unauthorized(f"{url}: the server does not accept this CURVE key")
    if event == zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
        raise _unauthorized(f"{url}: one side uses CURVE keys and the other does not")
    if event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
        raise ServerUnreachableError(url, "it does not speak ZeroMQ, or its CURVE keys do not match the client's")
    if event == zmq.Event.CLOSED:
        raise ServerUnreachableError(url, "nobody listens there")
    raise ServerUnreachableError(url, "it closed the connection")


def _is_end(monitor_message: list[bytes]) -> bool:
    return parse_monitor_message(monitor_message)["event"] in (zmq.Event.DISCONNECTED, zmq.Event.CLOSED)


def _message(data: bytes) -> tuple[bytes, Encoding]:
    return data, "json" if data[:1] == b"{" else "msgpack"


def _unauthorized(text: str) -> ServerError:
    return ServerError(Error(re=None, code="unauthorized", msg=text, retry=False))
