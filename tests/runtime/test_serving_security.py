"""Hostile requests through every door of a real server, and what its refusals give away."""

import base64
import contextlib
import hmac
import json
import os
import socket as socketlib
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from http_calls import HttpCalls, RememberingPolicy, frame
from openpi_calls import PolicyClient, pixels
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.process_memory import resident_bytes
from worldvln_edge.runtime.sessions.session_journal import SessionJournal

MB = 2**20
LOCAL = ZmqConfig(endpoints=("tcp://127.0.0.1:*",))
DOORS = ("http", "websocket", "zmq", "openpi")


@pytest.fixture
def policy() -> RememberingPolicy:
    return RememberingPolicy()


@pytest.fixture
def server(policy: RememberingPolicy) -> Iterator[BackgroundServer]:
    with BackgroundServer(policy, zmq=LOCAL) as server:
        yield server


def ask(server: BackgroundServer, door: str, image: bytes, *, name: str = "s", key: str | None = None) -> str:
    """Start a session with one image; "" or everything that the client is told of the refusal, its code first."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if door == "http":
        with HttpCalls(server, name, headers=headers) as calls:
            images = [base64.b64encode(image).decode()]
            status, answer = calls.ask(images, instruction="go", allow_future_segments=True)
        return "" if status == 200 else f"{answer['code']}: {json.dumps(answer)}"
    if door == "openpi":
        try:
            with PolicyClient(server, additional_headers=headers) as client:
                result = client.ask(images=[image], prompt="go", session_id=name)
        except InvalidStatus as refused:
            return f"{json.loads(refused.response.body)['code']}: {refused}"
        return result if isinstance(result, str) else ""
    try:
        with SessionClient(server.url if door == "websocket" else server.server.zmq_urls[0], key) as client:
            client.start("go", session=name)
            client.observe([image])
    except ServerError as error:
        return f"{error.code}: {error} {error.error_id}"
    return ""


def image() -> bytes:
    return base64.b64decode(frame().partition(",")[2])


@contextlib.contextmanager
def memory_grows_by_less_than(most_bytes: int) -> Iterator[None]:
    """Of this process, in which the server runs too."""
    before = resident_bytes("VmHWM")
    yield
    if before is not None:
        assert resident_bytes("VmHWM") - before < most_bytes


def upgrade(server: BackgroundServer) -> socketlib.socket:
    """A WebSocket whose frames the test writes."""
    raw = socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=10)
    key = base64.b64encode(os.urandom(16)).decode()
    raw.sendall(
        b"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key.encode() + b"\r\n\r\n"
    )
    assert b"101" in raw.recv(4096)
    return raw


def send_mb(raw: socketlib.socket, count: int, before_each: Callable[[int], bytes] = lambda index: b"") -> int:
    """Send that many megabytes; how many went out before the server closed."""
    block = bytes(MB)
    for index in range(count):
        try:
            raw.sendall(before_each(index) + block)
        except (BrokenPipeError, ConnectionResetError):
            return index
    return count


def test_websocket_message_of_200_mb_is_refused_before_it_is_in_memory(server):
    with memory_grows_by_less_than(50 * MB), upgrade(server) as raw:
        raw.sendall(b"\x82\xff" + struct.pack(">Q", 200 * MB) + bytes(4))
        assert send_mb(raw, 200) < 100
    assert ask(server, "websocket", image()) == ""


def test_websocket_message_of_200_mb_in_small_fragments_is_refused_at_the_limit(server):
    def header(index: int) -> bytes:
        return (b"\x02" if index == 0 else b"\x00") + b"\xff" + struct.pack(">Q", MB) + bytes(4)

    with memory_grows_by_less_than(200 * MB), upgrade(server) as raw:
        assert send_mb(raw, 200, header) < 150
    assert ask(server, "websocket", image()) == ""


@pytest.mark.parametrize("is_chunked", [False, True])
def test_http_body_of_200_mb_is_refused(server, is_chunked):
    framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {200 * MB}"
    head = f"POST {PREDICT_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n\r\n".encode()
    with (
        memory_grows_by_less_than(200 * MB if is_chunked else 50 * MB),
        socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=10) as raw,
    ):
        raw.sendall(head)
        if is_chunked:
            send_mb(raw, 65, lambda index: b"\r\n100000\r\n" if index else b"100000\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"too_large"' in answer
    assert ask(server, "http", image()) == ""


def png_bomb(side: int) -> bytes:
    """A real, complete picture of that size: black, one bit a pixel, 2.7 GB when it is decoded to RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    compress, row = zlib.compressobj(9), bytes(1 + (side + 7) // 8)
    data = b"".join(compress.compress(row) for _ in range(side)) + compress.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_bomb(side: int) -> bytes:
    """The header of a picture of that size, and nothing else."""
    return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, side, side, 3) + bytes(9) + b"\xff\xd9"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb])
def test_picture_of_30000_by_30000_pixels_is_refused_by_its_header(server, door, bomb):
    data = bomb(30_000)
    assert len(data) < MB
    with memory_grows_by_less_than(50 * MB):  # decoded, it would take 900 MB or more
        refusal = ask(server, door, data)
    assert refusal.startswith("too_large: ")
    assert "image has 30000x30000 pixels, limit 16000000" in refusal


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "[" * 200_000 + "]" * 200_000])
def test_deep_json_is_refused_and_the_server_lives(server, text):
    with HttpCalls(server) as calls:
        for body in (text, f'{{"session_id": "s", "images_base64": {text}}}'):
            status, answer = calls.send(body)
            assert (status, answer["code"]) == (422, "invalid_field")
    with connect(server.url, compression=None) as socket:
        for message in (text, f'{{"t": "observe", "id": 1, "frames": {text}}}'):
            socket.send(message)
            assert json.loads(socket.recv(timeout=5))["code"] in ("bad_request", "invalid_field")
    assert ask(server, "http", image()) == ""


@pytest.mark.parametrize("door", DOORS)
def test_session_name_never_becomes_a_path(tmp_path, monkeypatch, door):
    names = ("../../escaped", "/escaped", "a/../../escaped", "..", "CON", "C:\\escaped", "%2e%2e%2fescaped")
    folder, here = tmp_path / "deep" / "journal", tmp_path / "deep" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    journal = SessionJournal(folder, max_bytes=10**8, ttl_s=60)
    with BackgroundServer(RememberingPolicy(), zmq=LOCAL, journal=journal) as server:
        for name in names:
            assert ask(server, door, image(), name=name) == ""
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path.parent for path in written] == [folder] * len(names)
        assert not [path for path in written if "escaped" in path.name or path.stem in names]


@pytest.mark.parametrize("door", DOORS)
def test_session_name_with_control_characters_is_refused(server, door):
    for name in ("a\x00b", "../\x00", "a\nb", "a\x7fb"):
        assert ask(server, door, image(), name=name).partition(":")[0] in ("bad_request", "invalid_field")


class LeakyError(Exception):
    """An engine's failure that says where it happened."""

    def __init__(self) -> None:
        super().__init__("/srv/secret/bundle/world_model.onnx: node 17 in /srv/secret/engine.py, line 3")


@pytest.mark.parametrize("door", DOORS)
def test_failure_of_the_policy_gives_nothing_away(server, policy, door, caplog):
    opened = policy.new_session

    def new_session(*args, **options):
        session = opened(*args, **options)
        session.fail_with = LeakyError()
        return session

    policy.new_session = new_session
    refusal = ask(server, door, image())
    assert refusal.startswith("internal: ")
    for hidden in ("/srv", "secret", "onnx", "Traceback", ".py", "LeakyError", "node 17"):
        assert hidden not in refusal
    assert "LeakyError" in caplog.text


@pytest.mark.parametrize("door", DOORS)
def test_session_that_cannot_be_opened_gives_nothing_away(server, policy, door):
    def new_session(*args, **options):
        raise LeakyError

    policy.new_session = new_session
    refusal = ask(server, door, image())
    assert refusal.startswith("internal: ")
    for hidden in ("/srv", "secret", "onnx", "Traceback", ".py", "LeakyError", "node 17"):
        assert hidden not in refusal


@pytest.mark.parametrize("door", DOORS)
def test_no_key_and_a_wrong_key_are_refused(door):
    with BackgroundServer(RememberingPolicy(), zmq=LOCAL, keys=["right"]) as server:
        for key in (None, "wrong", "righ", "rightright", "RIGHT"):
            assert ask(server, door, image(), key=key).startswith("unauthorized: ")
        assert ask(server, door, image(), key="right") == ""


def test_every_key_is_compared_in_constant_time_and_in_one_length(monkeypatch):
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both) or compare(*both))
    rule = AccessRule(keys=["one", "a much longer key", "three"])
    assert rule.peer_of_key("one") != rule.peer_of_key("three")
    for wrong in ("on", "onf", "", "a much longer kez"):
        with pytest.raises(ProtocolError):
            rule.peer_of_key(wrong)
    assert len(compared) == 3 * 5  # an empty key is refused unread
    assert {len(text) for both in compared for text in both} == {32}


def test_openpi_metadata_says_nothing_of_the_machine(server):
    with PolicyClient(server) as client:
        text = msgspec.json.encode(client.metadata).decode()
    assert str(Path.cwd()) not in text
    assert ask(server, "openpi", pixels(1).tobytes()).startswith("bad_image: ")
