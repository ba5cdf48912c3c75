"""Flights over ZeroMQ and with the asynchronous client: what holds over WebSocket holds here."""

import asyncio
import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from PIL import Image

from worldvln_edge.async_client import AsyncSessionClient
from worldvln_edge.client import ServerError, ServerUnreachableError, SessionClient
from worldvln_edge.client_errors import AnswerTimeoutError, MissingTransportError, ServerAddressError
from worldvln_edge.protocol import Bye, Hello, Limits, Observe, Start
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.server_address import server_url
from worldvln_edge.wire import decode_answer, encode

FRAME = np.full((24, 32, 3), 127, dtype=np.uint8)
_buffer = io.BytesIO()
Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(_buffer, "JPEG")
JPEG = _buffer.getvalue()
BINDING = ("t", "re", "code", "session", "seg", "frames", "need", "done", "state", "emitted", "expected", "v")
BINDING += ("num_frames", "step", "points", "fps", "action", "head", "seed", "retry", "sessions", "queue", "ready")


@pytest.fixture
def server(folder: Path) -> Iterator[BackgroundServer]:
    config = ZmqConfig(endpoints=(f"ipc://{folder}/session.sock", "tcp://127.0.0.1:*"))
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        yield server


def url_of(server: BackgroundServer, transport: str) -> str:
    return {"ws": server.url, "ipc": server.server.zmq_urls[0], "tcp": server.server.zmq_urls[-1]}[transport]


class Dealer:
    """A client written without the SDK."""

    def __init__(self, url: str, kind: int = zmq.DEALER):
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.linger = 0
        self.socket.connect(url)

    def __enter__(self) -> "Dealer":
        return self

    def __exit__(self, *_) -> None:
        self.socket.close(0)
        self._context.term()

    def say(self, *requests) -> None:
        for request in requests:
            self.socket.send(encode(request, "msgpack"))

    def hear(self):
        assert self.socket.poll(5000), "the server did not answer"
        return decode_answer(self.socket.recv(), "msgpack")

    def hears_nothing(self, seconds: float) -> bool:
        return not self.socket.poll(seconds * 1e3)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
@pytest.mark.parametrize("encoding", ["msgpack", "json"])
def test_flight_gives_three_segments_of_sixteen_actions(server, transport, encoding):
    with SessionClient(url_of(server, transport), encoding=encoding) as client:
        assert client.welcome.points == (1, 17, 33, 49)
        assert client.start("Fly straight ahead.").need == 1
        answers = [client.observe([FRAME] * count) for count in (1, 16, 16)]
        assert [a.segment for a in answers] == [0, 1, 2]
        assert [a.done for a in answers] == [False, False, True]
        assert all(a.actions.shape == (16, 6) for a in answers)
        assert client.end().state == "ended"
        assert client.ping().sessions == 0


@pytest.mark.parametrize("transport", ["ws", "ipc", "tcp"])
@pytest.mark.parametrize("frame_format", ["jpeg", "rgb8"])
def test_asynchronous_client_flies_over_every_transport(server, transport, frame_format):
    async def fly() -> None:
        async with AsyncSessionClient(url_of(server, transport), frame_format=frame_format) as client:
            assert client.welcome.ready
            await client.start("go")
            answers = [await client.observe([FRAME] * count) for count in (1, 16, 16)]
            assert [a.segment for a in answers] == [0, 1, 2]
            assert answers[2].done
            assert (await client.end()).state == "ended"
            assert (await client.ping()).sessions == 0

    asyncio.run(fly())


@pytest.mark.parametrize("transport", ["ws", "ipc", "tcp"])
def test_calls_made_at_once_on_an_asynchronous_client_wait_for_each_other(server, transport):
    async def fly() -> list[int]:
        async with AsyncSessionClient(url_of(server, transport)) as client:
            await client.start("go")
            answers = await asyncio.gather(*(client.observe([JPEG] * count) for count in (1, 16, 16)))
            return [answer.segment for answer in answers]

    assert asyncio.run(fly()) == [0, 1, 2]


@pytest.mark.parametrize("transport", ["ws", "ipc"])
def test_asynchronous_client_raises_the_same_typed_errors(server, transport):
    async def fly() -> None:
        async with AsyncSessionClient(url_of(server, transport)) as client:
            with pytest.raises(ValueError, match=r"start\(prompt\)"):
                await client.observe([FRAME])
            with pytest.raises(ServerError) as refusal:
                await client.start(session="never", resume=True)
            assert refusal.value.code == "unknown_session"
            await client.start("go")
            await client.observe([JPEG])
            with pytest.raises(ServerError, match="expected frame 2, got 4") as refusal:
                await client.observe([JPEG], first=4)
            assert (refusal.value.code, refusal.value.frames) == ("gap", 1)

    asyncio.run(fly())


@pytest.mark.parametrize("transport", ["ws", "ipc"])
def test_asynchronous_client_gives_up_waiting_and_can_ask_again(folder, transport):
    config = ZmqConfig(endpoints=(f"ipc://{folder}/s",))

    async def fly(url: str) -> None:
        async with AsyncSessionClient(url, answer_timeout_s=0.1) as client:
            await client.start("go", session="s")
            with pytest.raises(AnswerTimeoutError, match=r"within 0\.1 s"):
                await client.observe([JPEG])
        async with AsyncSessionClient(url) as client:
            await client.start(session="s", resume=True)
            assert (await client.observe([JPEG], first=1, segment=0)).segment == 0

    with BackgroundServer(NullPolicy(infer_s=0.3), zmq=config) as server:
        asyncio.run(fly(url_of(server, transport)))


@pytest.mark.golden
@pytest.mark.parametrize("transport", ["ipc", "tcp"])
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_recorded_flight_is_answered_as_recorded(golden, folder, transport, encoding):
    exchanges = json.loads((golden("protocol") / "native_flight.json").read_text())["exchanges"]
    config = ZmqConfig(endpoints=(f"ipc://{folder}/s", "tcp://127.0.0.1:*"))
    codec = {"json": msgspec.json, "msgpack": msgspec.msgpack}[encoding]
    # The recording's model takes 12 ms, which is what makes its 1 ms deadline impossible.
    with (
        BackgroundServer(NullPolicy(infer_s=0.012), zmq=config) as server,
        Dealer(url_of(server, transport)) as dealer,
    ):
        for exchange in exchanges:
            request = dict(exchange["request"])
            if encoding == "msgpack" and request.get("frames"):
                request["frames"] = [base64.b64decode(text) for text in request["frames"]]
            dealer.socket.send(codec.encode(request))
            assert dealer.socket.poll(5000), exchange["case"]
            answer, expected = codec.decode(dealer.socket.recv()), exchange["response"]
            case = exchange["case"]
            assert {k: answer.get(k) for k in BINDING} == {k: expected.get(k) for k in BINDING}, case
            assert set(expected) <= set(answer), case
            if "actions" in expected:
                assert [len(row) for row in answer["actions"]] == [len(row) for row in expected["actions"]], case


def test_requests_and_answers_of_a_req_socket_are_framed_as_it_needs(server):
    with Dealer(url_of(server, "tcp"), zmq.REQ) as req:
        for request in (Hello(id=1, v=[1]), Start(id=2, prompt="go", session="s")):
            req.say(request)
            assert req.hear().re == request.id


def test_pipelined_requests_of_a_session_are_answered_in_order(server):
    with Dealer(url_of(server, "ipc")) as dealer:
        dealer.say(
            Hello(id=1, v=[1]),
            Start(id=2, session="s", prompt="go"),
            Observe(id=3, session="s", first=1, frames=[JPEG]),
            Observe(id=4, session="s", first=2, frames=[JPEG] * 16),
        )
        answers = [dealer.hear() for _ in range(4)]
    assert [answer.re for answer in answers] == [1, 2, 3, 4]
    assert [answer.seg for answer in answers[2:]] == [0, 1]


def test_session_begun_over_websocket_goes_on_over_zmq(server):
    with SessionClient(server.url) as client:
        client.start("go", session="flight-7")
        client.observe([JPEG])
    with SessionClient(url_of(server, "ipc")) as other:
        assert other.start(session="flight-7", resume=True).frames == 1
        assert other.observe([JPEG] * 16).segment == 1


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_lost_connection_is_opened_again_and_the_session_resumed(server, transport):
    with SessionClient(url_of(server, transport), reconnect_s=5) as client:
        client.start("go")
        first = client.observe([JPEG])
        client._connection._transport._socket.disconnect(client.url)  # the network's doing, as far as the client sees
        answer = client.observe([JPEG] * 16)
        assert (first.segment, answer.segment, answer.frames) == (0, 1, 17)


@pytest.mark.parametrize("transport", ["ws", "ipc", "tcp"])
def test_asynchronous_client_resumes_after_a_lost_connection(server, transport):
    async def fly() -> None:
        async with AsyncSessionClient(url_of(server, transport), reconnect_s=5) as client:
            await client.start("go")
            await client.observe([JPEG])
            socket = client._connection._transport._socket
            if transport == "ws":
                await socket.close()
            else:
                socket.disconnect(client.url)
            answer = await client.observe([JPEG] * 16)
            assert (answer.segment, answer.frames) == (1, 17)

    asyncio.run(fly())


def test_forgotten_connection_says_hello_again_and_the_flight_goes_on(folder):
    config, limits = ZmqConfig(endpoints=(f"ipc://{folder}/s",)), Limits(max_connections=1, min_idle_s=0.0)
    with (
        BackgroundServer(NullPolicy(), zmq=config, limits=limits) as server,
        SessionClient(url_of(server, "ipc")) as client,
        SessionClient(url_of(server, "ipc")) as other,
    ):
        client.start("go")  # each takes the other's only place, and its own back
        assert other.start("go").frames == 0
        assert client.observe([JPEG]).segment == 0
        assert other.observe([JPEG]).segment == 0


_SERVER = """
import sys
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.doors.server import serve
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
config = ZmqConfig(endpoints=(sys.argv[1],))
serve(NullPolicy(infer_s=0.2), None, zmq=config, on_ready=lambda url: print(url, flush=True))
"""


def start_server(url: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", _SERVER, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == url
    return process


@pytest.mark.parametrize("is_async", [False, True])
def test_killed_server_is_noticed_found_again_and_tells_that_the_session_is_gone(folder, is_async):
    url = f"ipc://{folder}/session.sock"
    process = start_server(url)
    try:
        killer = threading.Timer(0.1, process.kill)

        def fly() -> None:
            with SessionClient(url, reconnect_s=20) as client:
                client.start("go")
                killer.start()
                with pytest.raises(ServerError) as refusal:
                    client.observe([JPEG])
                assert refusal.value.code == "unknown_session"
                client.start("go")
                assert client.observe([JPEG]).segment == 0

        async def fly_on_a_loop() -> None:
            async with AsyncSessionClient(url, reconnect_s=20) as client:
                await client.start("go")
                killer.start()
                with pytest.raises(ServerError) as refusal:
                    await client.observe([JPEG])
                assert refusal.value.code == "unknown_session"
                await client.start("go")
                assert (await client.observe([JPEG])).segment == 0

        flight = threading.Thread(target=lambda: asyncio.run(fly_on_a_loop()) if is_async else fly(), daemon=True)
        results: list[BaseException] = []
        threading.excepthook, before = (lambda hook: results.append(hook.exc_value)), threading.excepthook
        try:
            flight.start()
            process.wait(timeout=10)
            process.stdout.close()
            assert (folder / "session.sock").exists()  # left behind, and in nobody's way
            process = start_server(url)
            flight.join(timeout=20)
        finally:
            threading.excepthook = before
        assert not flight.is_alive()
        assert results == []
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_sigterm_says_bye_removes_the_file_and_ends_normally(folder):
    url = f"ipc://{folder}/session.sock"
    process = start_server(url)
    try:
        with Dealer(url) as dealer:
            dealer.say(Hello(id=1, v=[1]), Start(id=2, session="s", prompt="go"))
            assert [dealer.hear().re for _ in range(2)] == [1, 2]
            dealer.say(Observe(id=3, session="s", first=1, frames=[JPEG]))
            time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert dealer.hear().seg == 0  # work in progress is answered
            assert dealer.hear() == Bye(reason="shutdown")
        assert process.wait(timeout=10) == 0
        assert not (folder / "session.sock").exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


_FROZEN_CLIENT = """
import sys
from worldvln_edge.client import SessionClient
with SessionClient(sys.argv[1], frame_format="rgb8") as client:
    import numpy as np
    frame = np.zeros((8, 8, 3), np.uint8)
    client.start("go")
    print(client.observe([frame]).segment, flush=True)
    sys.stdin.readline()
    print(client.observe([frame] * 16).segment, flush=True)
"""


def test_frozen_client_is_given_up_and_flies_on_when_it_wakes(folder):
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), heartbeat_s=0.1, silent_for_s=0.3)
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        door = server.server.zmq
        command = [sys.executable, "-c", _FROZEN_CLIENT, door.urls[0]]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert client.stdout.readline() == "0\n"
            time.sleep(0.5)  # heartbeats are answered, so nobody is given up
            assert len(door._clients) == 1
            client.send_signal(signal.SIGSTOP)
            give_up_s = time.monotonic() + 5
            while door._clients and time.monotonic() < give_up_s:
                time.sleep(0.02)
            assert not door._clients
            client.send_signal(signal.SIGCONT)
            rest, _ = client.communicate("\n", timeout=20)
            assert (rest, client.returncode) == ("1\n", 0)
        finally:
            client.kill()
            client.wait()
            client.stdin.close()
            client.stdout.close()


def test_server_that_goes_away_is_given_up_after_the_time_set(folder):
    url = f"ipc://{folder}/s"
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=(url,))):
        client = SessionClient(url, reconnect_s=0.2)
        client.__enter__()
        client.start("go")
    with pytest.raises(ServerUnreachableError, match=rf"worldvln-edge serve BUNDLE --zmq {url}"):
        client.observe([FRAME])


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ipc:///no/such/folder/s", "nobody listens"),
        ("tcp://127.0.0.1:9", "nobody listens"),
        ("tcp://no-such-host.invalid:8003", "--zmq tcp://no-such-host.invalid:8003"),
        ("ipc:///" + 120 * "x", "too long"),
    ],
)
def test_nobody_at_the_address_says_so_at_once(url: str, why: str):
    began = time.monotonic()
    with pytest.raises(ServerUnreachableError, match=why):
        SessionClient(url).__enter__()

    async def open_it() -> None:
        async with AsyncSessionClient(url):
            pass

    with pytest.raises(ServerUnreachableError, match=why):
        asyncio.run(open_it())
    assert time.monotonic() - began < 8


def test_something_else_at_the_address_is_named_within_the_time_set(server):
    with pytest.raises(ServerUnreachableError, match=r"does not speak ZeroMQ|closed the connection|no answer within"):
        SessionClient(f"tcp://127.0.0.1:{server.server.bound_port}", connect_timeout_s=2).__enter__()


@pytest.mark.parametrize("address", ["ipc://", "ipc://*", "tcp://", "tcp://*:8003", "tcp://drone:0", "tcp://a:1/b"])
def test_what_is_no_zmq_address_is_refused(address: str):
    with pytest.raises(ServerAddressError, match="no server's address"):
        SessionClient(address)


def test_zmq_addresses_are_kept_as_they_are():
    for url in ("ipc:///run/x.sock", "ipc://relative", "tcp://drone:8003", "tcp://[::1]:8003"):
        assert server_url(url) == url
    assert server_url("tcp://drone") == "tcp://drone:8003"
    assert server_url("tcp://[::1]") == "tcp://[::1]:8003"


def test_missing_pyzmq_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "worldvln_edge.zmq_transport", None)
    with pytest.raises(MissingTransportError, match=r"pip install 'worldvln-edge\[zmq\]'"):
        SessionClient("ipc:///run/x").__enter__()
    with pytest.raises(MissingTransportError, match="pyzmq"):
        asyncio.run(AsyncSessionClient("tcp://drone:8003").__aenter__())


def test_websocket_client_needs_no_pyzmq():
    program = "import sys, worldvln_edge.client, worldvln_edge.async_client; print('zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
