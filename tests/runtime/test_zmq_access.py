"""The ZeroMQ door against strangers: who gets in, what is refused, what one client can do to another."""

import asyncio
import os
import shutil
import socket as socketlib
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worldvln_edge.async_client import AsyncSessionClient
from worldvln_edge.client import ServerError, ServerUnreachableError, SessionClient
from worldvln_edge.curve_keys import CurveClientKeys, read_key_pair, read_public_keys, write_key_pair
from worldvln_edge.protocol import End, Error, Hello, Limits, Observe, Ping, Pong, ProtocolError, SessionState, Start
from worldvln_edge.runtime.doors.listen_address import AddressInUseError, UnsafeAddressError
from worldvln_edge.runtime.doors.server import BackgroundServer, SessionServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.doors.zmq_endpoint import ZmqEndpoint, ZmqEndpointError
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.wire import decode_answer, encode

FRAME = np.full((8, 8, 3), 127, dtype=np.uint8)
LOCAL = ZmqConfig(endpoints=("tcp://127.0.0.1:*",))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: the name of a unix socket has at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="zmq-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def dealer(context: zmq.Context, url: str, identity: bytes | None = None, **options: int) -> zmq.Socket:
    socket = context.socket(zmq.DEALER)
    socket.linger = 0  # also when it is only dropped
    if identity is not None:
        socket.setsockopt(zmq.ROUTING_ID, identity)
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.connect(url)
    return socket


def ask(socket: zmq.Socket, request):
    socket.send(encode(request, "msgpack"))
    return hear(socket)


def hear(socket: zmq.Socket, encoding: str = "msgpack"):
    assert socket.poll(5000), "the server did not answer"
    return decode_answer(socket.recv_multipart()[-1], encoding)


def take_over(context: zmq.Context, url: str, identity: bytes):
    """A socket under an identity that was somebody else's, as soon as ZeroMQ has let go of it; and its first answer."""
    for _ in range(30):
        socket = dealer(context, url, identity)
        socket.send(encode(Ping(id=9), "msgpack"))
        if socket.poll(100):
            return socket, hear(socket)
        socket.close(0)
    raise AssertionError("the identity was never free")


def wait_until(condition, seconds: float = 5.0) -> bool:
    give_up_s = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up_s:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:8003", "tcp://*:8003", "tcp://drone:8003", "tcp://eth0:8003", "tcp://[::]:8003"]
)
def test_listening_beyond_this_machine_needs_keys_or_a_flag(endpoint: str, folder: Path):
    config = ZmqConfig(endpoints=(endpoint,))
    with pytest.raises(UnsafeAddressError, match=r"--zmq-key-file, --zmq-clients.*--key-file.*--allow-remote"):
        SessionServer(NullPolicy(), zmq=config)
    SessionServer(NullPolicy(), zmq=config, keys=["k"])
    SessionServer(NullPolicy(), zmq=config, allow_remote=True)
    pair = write_key_pair(folder, "server")
    SessionServer(NullPolicy(), zmq=ZmqConfig(endpoints=(endpoint,), server_keys=pair, client_keys=frozenset()))
    with pytest.raises(UnsafeAddressError):  # encrypted, but for everybody
        SessionServer(NullPolicy(), zmq=ZmqConfig(endpoints=(endpoint,), server_keys=pair))


@pytest.mark.parametrize(
    "text", ["", "8003", "udp://127.0.0.1:1", "tcp://", "tcp://:1", "tcp://a:70000", "tcp://::1:1", "ipc://"]
)
def test_what_is_no_address_is_refused_with_examples(text: str):
    with pytest.raises(ZmqEndpointError, match=r"tcp://127\.0\.0\.1:8003, or ipc:///PATH"):
        ZmqEndpoint.parse(text)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("tcp://127.0.0.1", "tcp://127.0.0.1:8003"),
        ("tcp://localhost:9", "tcp://127.0.0.1:9"),
        ("tcp://[::1]", "tcp://[::1]:8003"),
        ("tcp://*:*", "tcp://*:*"),
    ],
)
def test_address_is_bound_as_zeromq_wants_it(text: str, bound: str):
    assert ZmqEndpoint.parse(text).url == bound


def test_localhost_is_served():
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=("tcp://localhost:*",))) as server:
        port = server.server.zmq_urls[0].rpartition(":")[2]
        with SessionClient(f"tcp://localhost:{port}") as client:
            assert client.ping().ready


def test_full_server_is_named_and_tried_again(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=Limits(max_connections=1)) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url) as client:
            with pytest.raises(ServerUnreachableError, match="as many connections as it accepts"):
                SessionClient(url).__enter__()
            late = SessionClient(url, reconnect_s=5)
            threading.Timer(0.3, client.close).start()
            assert late.ping().ready
            late.close()


def test_abstract_name_needs_no_file(context):
    name = f"ipc://@worldvln-{os.getpid()}"
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(name,))) as server, SessionClient(name) as client:
        assert server.server.zmq_urls == (name,)
        assert client.ping().ready


def test_ipv6_loopback_is_served():
    try:
        with socketlib.socket(socketlib.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    config = ZmqConfig(endpoints=("tcp://[::1]:*",))
    with BackgroundServer(NullPolicy(), zmq=config) as server, SessionClient(server.server.zmq_urls[0]) as client:
        assert client.ping().ready


def test_server_without_a_port_is_served_over_zmq_alone():
    with BackgroundServer(NullPolicy(), None, zmq=LOCAL) as server, SessionClient(server.server.zmq_urls[0]) as client:
        assert (server.url, server.server.bound_port) == ("", 0)
        client.start("go")
        assert client.observe([FRAME]).segment == 0


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_socket_file_is_closed_to_others_and_removed_at_the_end(folder: Path, mode: int):
    path = folder / "s"
    before = os.umask(0)
    os.umask(before)
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{path}",), ipc_mode=mode)):
        assert stat.S_IMODE(path.lstat().st_mode) == mode
        after = os.umask(before)
        assert after == before
    assert not path.exists()


def test_stale_socket_file_is_replaced_and_nothing_else(folder: Path):
    stale = folder / "s"
    with socketlib.socket(socketlib.AF_UNIX) as left_behind:
        left_behind.bind(str(stale))
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{stale}",))):
        with SessionClient(f"ipc://{stale}") as client:
            assert client.ping().ready
        with pytest.raises(AddressInUseError, match="another server listens there"):
            BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{stale}",))).__enter__()
        assert stale.exists()  # the refused server took nothing away
    precious = folder / "data"
    precious.write_text("frames")
    link = folder / "link"
    link.symlink_to(precious)
    for path in (precious, link):
        with pytest.raises(ZmqEndpointError, match="something that is no socket"):
            BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{path}",))).__enter__()
    assert precious.read_text() == "frames"
    with pytest.raises(ZmqEndpointError, match="there is no folder"):
        BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{folder}/none/s",))).__enter__()
    with pytest.raises(ZmqEndpointError, match="too long"):
        BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{folder}/{110 * 'x'}",))).__enter__()


def test_taken_port_says_what_to_do_and_leaves_no_file(folder: Path):
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        taken = server.server.zmq_urls[0]
        with pytest.raises(AddressInUseError, match="--zmq ENDPOINT"):
            BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(f"ipc://{folder}/s", taken))).__enter__()
        assert list(folder.iterdir()) == []


def test_zmq_door_is_closed_again_when_the_port_is_taken(folder: Path):
    with BackgroundServer(NullPolicy()) as server:
        second = BackgroundServer(
            NullPolicy(), port=server.server.bound_port, zmq=ZmqConfig(endpoints=(f"ipc://{folder}/s",))
        )
        with pytest.raises(AddressInUseError, match="--ws HOST:PORT"):
            second.__enter__()
    assert list(folder.iterdir()) == []


def test_api_key_is_asked_for_in_hello_and_owns_the_sessions():
    with BackgroundServer(NullPolicy(), zmq=LOCAL, keys=["one", "two"]) as server:
        url = server.server.zmq_urls[0]
        for key, message in ((None, "hello carries it as `key`"), ("wrong", "the key is wrong")):
            with pytest.raises(ServerError, match=message) as refusal:
                SessionClient(url, key).__enter__()
            assert refusal.value.code == "unauthorized"
        with SessionClient(url, "one") as client, SessionClient(url, "two") as stranger:
            client.start("go", session="mine")
            with pytest.raises(ServerError) as refusal:
                stranger.start(session="mine", resume=True)
            assert refusal.value.code == "unknown_session"
            with SessionClient(server.url, "one") as same_owner:  # over WebSocket
                assert same_owner.start(session="mine", resume=True).state == "open"


def test_refused_hello_opens_nothing(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, keys=["secret"]) as server:
        socket = dealer(context, server.server.zmq_urls[0])
        assert ask(socket, Hello(id=1, v=[1], key="guess")).code == "unauthorized"
        assert ask(socket, Start(id=2, session="s", prompt="go")).code == "hello_required"
        assert ask(socket, Hello(id=3, v=[1], key="secret")).v == 1
        assert ask(socket, Start(id=4, session="s", prompt="go")).state == "open"


def test_whoever_comes_later_under_an_identity_inherits_nothing(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, keys=["secret"]) as server:
        url = server.server.zmq_urls[0]
        victim = dealer(context, url, b"drone-1")
        assert ask(victim, Hello(id=1, v=[1], key="secret")).v == 1
        assert ask(victim, Start(id=2, session="s", prompt="go")).state == "open"
        thief = dealer(context, url, b"drone-1")  # while the first one is there, ZeroMQ lets no second in
        thief.send(encode(Ping(id=1), "msgpack"))
        assert not thief.poll(300)
        assert isinstance(ask(victim, Ping(id=3)), Pong)
        thief.close(0)
        victim.close(0)
        thief, refusal = take_over(context, url, b"drone-1")
        assert refusal.code == "hello_required"
        assert ask(thief, Observe(id=2, session="s", first=1, frames=[])).code == "hello_required"


def test_answers_of_a_client_that_left_do_not_reach_its_successor(context):
    with BackgroundServer(NullPolicy(infer_s=0.5), zmq=LOCAL) as server:
        url = server.server.zmq_urls[0]
        victim = dealer(context, url, b"drone-1")
        assert ask(victim, Hello(id=1, v=[1])).v == 1
        assert ask(victim, Start(id=2, session="s", prompt="go")).state == "open"
        victim.send(
            encode(Observe(id=3, session="s", first=1, frames=[FRAME.tobytes()], fmt="rgb8", w=8, h=8), "msgpack")
        )
        time.sleep(0.1)
        victim.close(0)
        thief, refusal = take_over(context, url, b"drone-1")
        assert refusal.code == "hello_required"
        assert not thief.poll(800)


def test_queued_work_of_a_client_that_left_is_dropped(context):
    policy = NullPolicy(infer_s=0.4)
    with BackgroundServer(policy, zmq=LOCAL) as server, SessionClient(server.url) as other:
        leaver = dealer(context, server.server.zmq_urls[0])
        assert ask(leaver, Hello(id=1, v=[1])).v == 1
        assert ask(leaver, Start(id=2, session="gone", prompt="go")).state == "open"
        assert ask(leaver, Start(id=3, session="busy", prompt="go")).state == "open"
        for request_id, session in ((4, "busy"), (5, "gone")):
            request = Observe(id=request_id, session=session, first=1, frames=[FRAME.tobytes()], fmt="rgb8", w=8, h=8)
            leaver.send(encode(request, "msgpack"))
        assert wait_until(lambda: server.server.manager.queue == 1)
        leaver.close(0)
        assert wait_until(lambda: server.server.manager.queue == 0, 0.35)  # not after the work before it
        state = other.start(session="gone", resume=True)
        assert (state.frames, state.emitted) == (1, -1)


def test_what_a_client_sent_before_it_left_is_still_done(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        manager = server.server.manager
        for _ in range(20):
            hasty = dealer(context, server.server.zmq_urls[0])
            assert ask(hasty, Hello(id=1, v=[1])).v == 1
            assert ask(hasty, Start(id=2, session="s", prompt="go")).state == "open"
            hasty.linger = 1000
            hasty.send(encode(End(id=3, session="s"), "msgpack"))
            hasty.close()
            assert wait_until(lambda: manager.sessions == 0)
        assert wait_until(lambda: not server.server.zmq._clients)


class Keys:
    """A server's and two clients' CURVE keys, one of them known."""

    def __init__(self, folder: Path):
        for name in ("server", "drone", "stranger"):
            write_key_pair(folder / name, name)
        (folder / "clients").mkdir()
        shutil.copy(folder / "drone" / "drone.key", folder / "clients")
        self.config = ZmqConfig(
            endpoints=("tcp://127.0.0.1:*",),
            server_keys=read_key_pair(folder / "server" / "server.key_secret"),
            client_keys=read_public_keys(folder / "clients"),
        )
        self.drone, self.stranger = (
            CurveClientKeys.read(folder / name / f"{name}.key_secret", folder / "server" / "server.key")
            for name in ("drone", "stranger")
        )


@pytest.fixture
def curve(folder: Path) -> Keys:
    return Keys(folder)


def test_known_curve_key_flies_and_strangers_are_refused(curve: Keys):
    with BackgroundServer(NullPolicy(), zmq=curve.config) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url, curve=curve.drone) as client:
            client.start("go")
            assert client.observe([FRAME]).segment == 0
        with pytest.raises(ServerError, match="does not accept this CURVE key") as refusal:
            SessionClient(url, curve=curve.stranger).__enter__()
        assert refusal.value.code == "unauthorized"
        with pytest.raises((ServerError, ServerUnreachableError), match="CURVE"):  # who hangs up first decides which
            SessionClient(url).__enter__()
        wrong_server = CurveClientKeys(own=curve.drone.own, server_public=curve.stranger.own.public)
        with pytest.raises(ServerUnreachableError, match="its CURVE keys do not match"):
            SessionClient(url, curve=wrong_server).__enter__()

        async def fly() -> None:
            async with AsyncSessionClient(url, curve=curve.drone) as client:
                await client.start("go")
                assert (await client.observe([FRAME])).segment == 0
            with pytest.raises(ServerError, match="does not accept this CURVE key"):
                await AsyncSessionClient(url, curve=curve.stranger).__aenter__()

        asyncio.run(fly())


def test_client_with_keys_is_told_when_the_server_has_none(curve: Keys):
    with (
        BackgroundServer(NullPolicy(), zmq=LOCAL) as server,
        pytest.raises((ServerError, ServerUnreachableError), match="CURVE"),
    ):
        SessionClient(server.server.zmq_urls[0], curve=curve.drone).__enter__()


def test_sessions_belong_to_the_curve_key_that_made_them(curve: Keys, folder: Path):
    shutil.copy(folder / "stranger" / "stranger.key", folder / "clients")
    config = ZmqConfig(
        endpoints=curve.config.endpoints,
        server_keys=curve.config.server_keys,
        client_keys=read_public_keys(folder / "clients"),
    )
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url, curve=curve.drone) as client, SessionClient(url, curve=curve.stranger) as other:
            client.start("go", session="mine")
            with pytest.raises(ServerError) as refusal:
                other.start(session="mine", resume=True)
            assert refusal.value.code == "unknown_session"


def test_curve_key_or_api_key_is_enough_and_the_api_key_names_the_owner(curve: Keys):
    with BackgroundServer(NullPolicy(), zmq=curve.config, keys=["secret"]) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url, curve=curve.drone) as client:
            client.start("go", session="of the curve key")
        with SessionClient(url, "secret", curve=curve.drone) as client:
            with pytest.raises(ServerError, match="no such session"):
                client.start(session="of the curve key", resume=True)
            client.start("go", session="of the api key")
        with SessionClient(server.url, "secret") as client:
            assert client.start(session="of the api key", resume=True).state == "open"


def test_encryption_without_known_clients_still_asks_for_the_api_key(curve: Keys):
    config = ZmqConfig(endpoints=curve.config.endpoints, server_keys=curve.config.server_keys)
    with BackgroundServer(NullPolicy(), zmq=config, keys=["secret"]) as server:
        url = server.server.zmq_urls[0]
        with pytest.raises(ServerError) as refusal:
            SessionClient(url, curve=curve.stranger).__enter__()
        assert refusal.value.code == "unauthorized"
        with SessionClient(url, "secret", curve=curve.stranger) as client:
            assert client.ping().ready


def test_client_that_does_not_read_is_cut_off_and_the_others_fly(context, caplog):
    limits = Limits(max_unsent_bytes=20_000)
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), high_water=2)
    with BackgroundServer(NullPolicy(), zmq=config, limits=limits) as server:
        url = server.server.zmq_urls[0]
        slow = dealer(context, url, RCVHWM=1, RCVBUF=4096)
        for index in range(20_000):
            slow.send(encode(Hello(id=index, v=[1]), "msgpack"))
        with SessionClient(url) as other:
            other.start("go")
            assert other.observe([FRAME]).segment == 0
        assert wait_until(lambda: "pile up; it is cut off" in caplog.text, 20)


def test_client_that_reads_nothing_for_long_is_cut_off(context, caplog):
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), high_water=2, stalled_after_s=0.3)
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        slow = dealer(context, server.server.zmq_urls[0], RCVHWM=1, RCVBUF=4096)
        for index in range(8_000):
            slow.send(encode(Hello(id=index, v=[1]), "msgpack"))
        assert wait_until(lambda: "reads nothing for 0.3 s; it is cut off" in caplog.text, 20)


def test_client_that_reads_late_gets_every_answer(context):
    """More answers than ZeroMQ holds for it wait in the server."""
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), high_water=2)
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        late = dealer(context, server.server.zmq_urls[0], RCVHWM=1, RCVBUF=4096)
        for index in range(1000):
            late.send(encode(Hello(id=index, v=[1]), "msgpack"))
        time.sleep(0.3)
        assert [hear(late).re for _ in range(1000)] == list(range(1000))


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


def test_clients_are_counted_and_silent_strangers_make_way(context):
    limits = Limits(max_connections=2, min_idle_s=0.2)
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=limits) as server:
        url = server.server.zmq_urls[0]
        first, second, third = (dealer(context, url) for _ in range(3))
        assert ask(first, Hello(id=1, v=[1])).v == 1
        assert ask(second, Ping(id=1)).code == "hello_required"
        refusal = ask(third, Hello(id=1, v=[1]))
        assert (refusal.code, refusal.retry) == ("overloaded", True)
        time.sleep(0.25)
        assert ask(first, Ping(id=2)).re == 2
        assert ask(third, Hello(id=2, v=[1])).v == 1  # in the place of the one who never said hello
        assert ask(first, Ping(id=3)).re == 3


def test_client_that_leaves_makes_way_at_once(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=Limits(max_connections=1)) as server:
        url = server.server.zmq_urls[0]
        for _ in range(5):
            with SessionClient(url) as client:
                assert client.ping().ready


def test_many_clients_that_come_and_go_leave_nothing_behind(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        sockets = [dealer(context, server.server.zmq_urls[0]) for _ in range(60)]
        for socket in sockets:
            assert ask(socket, Hello(id=1, v=[1])).v == 1
        door = server.server.zmq
        assert len(door._clients) == 60
        for socket in sockets:
            socket.close(0)
        assert wait_until(lambda: not door._clients and not door._client_on and not len(door._links))


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
