"""Messages over ZeroMQ that are too large, of several frames, of any content, or not ZeroMQ at all."""

import socket as socketlib
import struct
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zmq_calls import FRAME, LOCAL, ask, dealer, hear

from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import Error, Hello, Limits, Ping, Pong, ProtocolError, SessionState
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy


def test_oversized_message_ends_its_connection_and_the_server_lives(context):
    limits = Limits(max_msg_bytes=10_000)
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=limits) as server:
        url = server.server.zmq_urls[0]
        socket = dealer(context, url)
        assert ask(socket, Hello(id=1, v=[1])).v == 1
        socket.send(b"{" + b"x" * 20_000)
        assert not socket.poll(300)
        assert ask(socket, Ping(id=2)).code == "hello_required"  # it came back as somebody new
        with SessionClient(url, frame_format="rgb8") as client:
            client.start("go")
            with pytest.raises(ProtocolError, match="the server accepts 10000"):
                client.observe([np.zeros((100, 100, 3), dtype=np.uint8)])
            assert client.observe([FRAME]).segment == 0


def test_message_of_200_mb_is_refused_before_it_is_in_memory():
    from worldvln_edge.runtime.sessions.process_memory import resident_bytes

    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        port = int(server.server.zmq_urls[0].rpartition(":")[2])
        before = resident_bytes("VmHWM")
        with socketlib.create_connection(("127.0.0.1", port), timeout=5) as raw:
            greet(raw)
            raw.sendall(b"\x02" + struct.pack(">Q", 200 * 2**20))  # a long frame: the rest would follow
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                raw.sendall(bytes(100 * 2**20))
        if before is not None:
            assert resident_bytes("VmHWM") - before < 50 * 2**20
        with SessionClient(server.server.zmq_urls[0]) as client:
            assert client.ping().ready


def greet(raw: socketlib.socket) -> None:
    """The handshake of ZMTP 3.0 with the NULL mechanism, by hand (RFC 23)."""
    raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\x00" + bytes(31))
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
    received = b""
    while len(received) < 64 + 2 or len(received) < 66 + received[65]:
        received += raw.recv(4096)


def test_bytes_that_are_no_zeromq_change_nothing_for_others():
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        port = int(server.server.zmq_urls[0].rpartition(":")[2])
        for data in (
            b"GET / HTTP/1.1\r\n\r\n",
            bytes(500),
            b"\xff" * 500,
            b"\xff" + bytes(8) + b"\x7f\x09" + b"x" * 600,
        ):
            with socketlib.create_connection(("127.0.0.1", port), timeout=5) as raw:
                raw.sendall(data)
        with SessionClient(server.server.zmq_urls[0]) as client:
            assert client.ping().ready


def test_message_of_several_frames_is_refused(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        socket = dealer(context, server.server.zmq_urls[0])
        for frames in ([b"a", b"b"], [b"", b"a", b"b"], [b"a", b"", b"b", b"c"]):
            socket.send_multipart(frames)
            refusal = hear(socket)
            assert (refusal.code, refusal.msg) == ("bad_request", "send each message as one frame")
        socket.send(b"")  # a probe, which has no answer
        assert ask(socket, Hello(id=1, v=[1])).v == 1


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[BackgroundServer, zmq.Socket]]:
    context = zmq.Context()
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        socket = dealer(context, server.server.zmq_urls[0])
        assert ask(socket, Hello(id=0, v=[1])).v == 1
        yield server, socket
        context.destroy(linger=0)


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ("id", "t", "v", "session", "prompt", "first", "frames", "seg", "fmt", "w", "h", "seed", "target")
)
REQUESTS = st.builds(
    lambda kind, request_id, fields: {**fields, "t": kind, "id": request_id},
    st.sampled_from(("hello", "start", "observe", "end", "cancel", "ping", "dance")),
    st.integers(0, 2**63 - 1),
    st.dictionaries(FIELDS, TREES | st.integers(0, 3) | st.just("s"), max_size=6),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=300))
def test_garbage_is_answered_with_an_error_and_the_connection_goes_on(fuzzed, data: bytes):
    _, socket = fuzzed
    socket.send(data)
    refusal = hear(socket, "json" if data[:1] in b"{ \t\r\n" else "msgpack")
    assert isinstance(refusal, Error)
    assert refusal.code in ("bad_request", "invalid_field")
    assert isinstance(ask(socket, Ping(id=1)), Pong)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=REQUESTS)
def test_requests_with_any_fields_get_exactly_one_answer(fuzzed, request: dict):
    _, socket = fuzzed
    socket.send(msgspec.msgpack.encode(request))
    answer = hear(socket)
    assert answer.re in (request["id"], None)
    if isinstance(answer, SessionState):
        assert answer.state in ("open", "done", "ended")
    assert isinstance(ask(socket, Ping(id=1)), Pong)
