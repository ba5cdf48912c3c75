"""A WebSocket connection holds up nobody else, whatever its client sends, and a stranger cannot fill the log."""

import asyncio
import contextlib
import logging
import socket
import struct
import time

import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from worldvln_edge import websocket_transport
from worldvln_edge.async_client import AsyncSessionClient
from worldvln_edge.client import ServerUnreachableError, SessionClient
from worldvln_edge.protocol import Hello, Limits, Ping, Welcome
from worldvln_edge.runtime.doors import websocket_connection
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.websocket_connection import MOST_FRAGMENTS, BoundedWebSocketConnection
from worldvln_edge.runtime.doors.websocket_door import WebSocketDoor
from worldvln_edge.runtime.doors.zmq_client import ZmqClient
from worldvln_edge.runtime.sessions.meter import NoMeter
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.wire import decode_answer, encode

CONTINUATION, BINARY, CLOSE, PING, MASK = 0x0, 0x2, 0x8, 0x9, b"\0\0\0\0"
UPGRADE = (
    b"GET /v1/session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def upgraded(port: int) -> socket.socket:
    """A WebSocket whose frames are written by hand."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    client.sendall(UPGRADE)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101")
    return client


def wait_until(is_so) -> None:
    give_up_s = time.monotonic() + 30
    while not is_so() and time.monotonic() < give_up_s:
        time.sleep(0.02)
    assert is_so()


def close_code(client: socket.socket) -> int:
    """Of the close frame that comes next."""
    data = b""
    while len(data) < 4 and (more := client.recv(4096)):
        data += more
    assert data[0] == 0x80 | CLOSE
    return struct.unpack("!H", data[2:4])[0]


def test_message_of_endless_empty_fragments_ends_the_connection():
    with BackgroundServer(NullPolicy()) as server, upgraded(server.server.bound_port) as client:
        client.sendall(bytes([BINARY, 0x80]) + MASK)
        client.sendall((bytes([CONTINUATION, 0x80]) + MASK) * (MOST_FRAGMENTS + 10))
        assert close_code(client) == 1009


def test_message_in_many_fragments_is_taken():
    data = encode(Hello(id=1, v=[1], client="x" * 2000), "msgpack")
    with BackgroundServer(NullPolicy()) as server, connect(server.url, compression=None) as client:
        client.send(data[index : index + 1] for index in range(len(data)))
        assert isinstance(decode_answer(client.recv(timeout=30), "msgpack"), Welcome)


@pytest.mark.parametrize("path", ["/v1/session", "/", "/nowhere"])
def test_refused_upgrade_is_no_error_in_the_log(path, caplog):
    with caplog.at_level(logging.WARNING), BackgroundServer(NullPolicy(), keys=("secret",)) as server:
        with pytest.raises(InvalidStatus) as refusal, connect(server.url.replace("/v1/session", path)):
            pass
        assert refusal.value.response.status_code == (403 if path == "/nowhere" else 401)
        assert refusal.value.response.body or path == "/nowhere"
        with connect(server.url, additional_headers={"Authorization": "Bearer secret"}):
            pass
    assert [record.getMessage() for record in caplog.records] == []


class Wire(asyncio.Transport):
    """Where a connection writes to; remembers whether it reads."""

    def __init__(self):
        super().__init__()
        self.is_paused, self.is_closed = False, False

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def write(self, data: bytes) -> None:
        """Nobody reads it."""

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


@pytest.mark.parametrize("opcode", [BINARY, PING])
def test_many_small_frames_are_taken_in_turn_with_everything_else(opcode):
    count, found = 40_000, 0

    async def application(scope, receive, send) -> None:
        nonlocal found
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            found += 1

    async def scenario() -> int:
        config = uvicorn.Config(application, ws_per_message_deflate=False)
        config.load()
        wire, state = Wire(), ServerState()
        connection = BoundedWebSocketConnection(config=config, server_state=state, app_state={})
        connection.connection_made(wire)
        connection.data_received(UPGRADE)
        while not connection.handshake_complete:
            await asyncio.sleep(0)
        connection.data_received((bytes([0x80 | opcode, 0x80]) + MASK) * count)
        assert wire.is_paused
        turns = 0
        while wire.is_paused or connection.queue.qsize():
            assert connection.queue.qsize() < 1000
            await asyncio.sleep(0)  # everything else has its turn
            turns += 1
        await asyncio.sleep(0)
        connection.connection_lost(None)
        await asyncio.gather(*state.tasks)
        return turns

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) > 40
    assert found == (1 + count if opcode == BINARY else 1)  # the connect


def test_messages_that_come_at_once_are_all_answered_in_order():
    with BackgroundServer(NullPolicy()) as server, connect(server.url, compression=None) as client:
        client.send(encode(Hello(id=1, v=[1], client="x" * 200_000), "msgpack"))
        for request in range(2, 1002):
            client.send(encode(Ping(id=request), "msgpack"))
        answers = [decode_answer(client.recv(timeout=30), "msgpack").re for _ in range(1001)]
    assert answers == list(range(1, 1002))


class Heard:
    """Takes messages, and never has to wait for anything."""

    count = unanswered = 0

    async def receive(self, data: bytes, encoding: str) -> None:
        self.count += 1

    def close(self) -> None:
        """Nothing is held."""


async def turns_until_heard(heard: Heard, count: int) -> int:
    turns = 0
    while heard.count < count:
        await asyncio.sleep(0)
        turns += 1
    return turns


def test_websocket_messages_that_wait_leave_everything_else_its_turn():
    class Socket:
        async def receive(self):
            return {"type": "websocket.receive", "bytes": b"x"}

    async def scenario() -> int:
        heard = Heard()
        reader = asyncio.create_task(WebSocketDoor._read(Socket(), heard))
        turns = await turns_until_heard(heard, 1000)
        reader.cancel()
        return turns

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) >= 900


def test_zmq_messages_that_wait_leave_everything_else_its_turn():
    async def scenario() -> int:
        client = ZmqClient(
            (b"x",), 1, limits=Limits(), meter=NoMeter(), stalled_after_s=1, send=lambda *_: None, on_end=lambda _: None
        )
        client.connection = heard = Heard()
        for _ in range(1000):
            client.take(b"x", "msgpack")
        client.start(lambda size: None)
        turns = await turns_until_heard(heard, 1000)
        client.close()
        return turns

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) >= 900


@pytest.mark.parametrize("end", ["cut off", "no pong"])
def test_client_that_does_not_read_loses_its_connection(end, monkeypatch):
    monkeypatch.setattr(websocket_connection, "_GOODBYE_S", 0.2)
    limits = Limits(max_unsent_bytes=10_000 if end == "cut off" else 2**40)
    with BackgroundServer(NullPolicy(), limits=limits) as server:
        if end == "no pong":
            server.server.config.ws_ping_interval = server.server.config.ws_ping_timeout = 0.2
        served = server.server.server_state.connections
        with upgraded(server.server.bound_port) as client:
            client.settimeout(0.1)
            hello = encode(Hello(id=1, v=[1]), "msgpack")
            assert len(hello) < 126
            frames = (bytes([0x80 | BINARY, 0x80 | len(hello)]) + MASK + hello) * 1000
            with pytest.raises(ConnectionError):  # noqa: PT012
                for _ in range(600):
                    with contextlib.suppress(TimeoutError):
                        client.sendall(frames)
            wait_until(lambda: not served)


@pytest.mark.parametrize("client_type", [SessionClient, AsyncSessionClient])
def test_client_whose_connection_breaks_while_it_is_set_up_leaves_none_behind(monkeypatch, client_type):
    def breaks(file_descriptor: int, silent_for_s: float) -> None:
        raise OSError("gone")

    monkeypatch.setattr(websocket_transport, "_bound_sending", breaks)
    with BackgroundServer(NullPolicy()) as server:
        client = client_type(server.url)
        with pytest.raises(ServerUnreachableError, match="gone") as kept:
            client.__enter__() if client_type is SessionClient else asyncio.run(client.__aenter__())
        wait_until(lambda: not server.server.server_state.connections)
        assert kept.value.url == client.url
