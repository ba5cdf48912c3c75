"""What a busy server promises: back-pressure, deadlines, cancelling, expiry, and an orderly end."""

import asyncio
import io
import json
import signal
import socket as socketlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import Bye, Cancel, Hello, Limits, Observe, Ping, ProtocolError, Start
from worldvln_edge.runtime.doors import websocket_connection
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.entrance import Entrance
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.websocket_door import WebSocketDoor
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, DurationEstimate, StartedTooLateError, Ticket
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.wire import decode_answer, encode

_buffer = io.BytesIO()
Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(_buffer, "JPEG")
JPEG = _buffer.getvalue()


def say(socket, *requests) -> None:
    for request in requests:
        socket.send(encode(request, "msgpack"))


def hear(socket):
    return decode_answer(socket.recv(timeout=5), "msgpack")


def begin(socket, session: str = "s") -> None:
    say(socket, Hello(id=1, v=[1]), Start(id=2, session=session, prompt="go"))
    assert [hear(socket).re for _ in range(2)] == [1, 2]


def observe(request_id: int, first: int = 1, count: int = 1, session: str = "s", **fields) -> Observe:
    return Observe(id=request_id, session=session, first=first, frames=[JPEG] * count, **fields)


def test_fifth_unanswered_request_is_busy_and_its_frames_are_not_stored():
    with BackgroundServer(NullPolicy(infer_s=0.2)) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        say(socket, *(observe(3 + index, first=1 + index) for index in range(5)), Ping(id=20, t_ns=5))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(6))}
    assert answers[7].code == "busy"
    assert answers[7].retry is True
    assert [answers[index].frames for index in (3, 4, 5, 6)] == [1, 2, 3, 4]
    assert answers[20].t_ns == 5


def test_more_than_max_queue_is_overloaded_with_a_time_to_come_back():
    limits = Limits(max_queue=2, max_in_flight=8)
    policy = NullPolicy(infer_s=0.2)
    with BackgroundServer(policy, limits=limits) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        say(socket, observe(3))
        hear(socket)  # the server knows now what an inference takes
        say(socket, observe(4, first=2, count=16), *(observe(5 + index, first=18 + index) for index in range(3)))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(4))}
    refused = [answer for answer in answers.values() if answer.re >= 5 and hasattr(answer, "code")]
    overloaded = [answer for answer in refused if answer.code == "overloaded"]
    assert overloaded
    assert all(answer.retry_ms > 0 for answer in overloaded)
    assert {answer.code for answer in refused} <= {"overloaded", "gap"}  # what follows a refused frame leaves a gap


def test_health_answers_while_the_policy_works():
    with BackgroundServer(NullPolicy(infer_s=1.0)) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        say(socket, observe(3))
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server.bound_port}/health") as answer:
            assert json.load(answer)["active_sessions"] == 1
        with pytest.raises(TimeoutError):  # it still works
            socket.recv(timeout=0)
        assert hear(socket).seg == 0


def test_deadline_that_passes_in_the_queue_costs_no_device_time_and_keeps_the_frames():
    with BackgroundServer(NullPolicy(infer_s=1.0)) as server, connect(server.url, compression=None) as socket:
        begin(socket, "a")
        say(socket, Start(id=3, session="b", prompt="go"))
        hear(socket)
        say(socket, observe(4, session="a"), observe(5, session="b", deadline_ms=60))
        began = time.monotonic()
        late = hear(socket)
        assert time.monotonic() - began < 0.9  # answered at its deadline, not after the work before it
        assert (late.re, late.code, late.frames) == (5, "deadline", 1)
        assert hear(socket).re == 4
        say(socket, observe(6, first=2, count=0, session="b", seg=0))
        assert hear(socket).seg == 0


def test_deadline_that_the_estimate_cannot_meet_is_refused_at_once():
    with BackgroundServer(NullPolicy(infer_s=1.0)) as server, SessionClient(server.url) as client:
        client.start("go")
        client.observe([JPEG])
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"needs about \d{3,} ms") as refusal:
            client.observe([JPEG] * 16, deadline_ms=50)
        assert time.monotonic() - began < 0.95
        assert (refusal.value.code, refusal.value.frames) == ("deadline", 17)
        assert refusal.value.retry_ms >= 1000
        assert client.observe([], deadline_ms=60_000).segment == 1


def test_deadline_that_passes_during_inference_is_answered_late():
    with BackgroundServer(NullPolicy(infer_s=1.0)) as server, SessionClient(server.url) as client:
        client.start("go")
        answer = client.observe([JPEG], deadline_ms=800)  # nothing is known about the duration yet
        assert (answer.segment, answer.is_late) == (0, True)
        assert not client.observe([JPEG] * 16, deadline_ms=5000).is_late


def test_cancelled_request_keeps_its_frames_and_runs_no_inference():
    with BackgroundServer(NullPolicy(infer_s=0.3)) as server, connect(server.url, compression=None) as socket:
        begin(socket, "a")
        say(socket, Start(id=3, session="b", prompt="go"))
        hear(socket)
        say(socket, observe(4, session="a"), observe(5, session="b"))
        time.sleep(0.05)
        say(socket, Cancel(id=6, target=5))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(3))}
        assert (answers[5].code, answers[5].frames) == ("cancelled", 1)
        assert (answers[6].session, answers[6].emitted) == ("b", -1)
        assert answers[4].seg == 0


def test_running_inference_stops_when_its_request_is_cancelled():
    with BackgroundServer(NullPolicy(infer_s=30.0)) as server, connect(server.url, compression=None) as socket:
        begin(socket, "a")
        started = time.monotonic()
        say(socket, observe(3, session="a"))
        time.sleep(0.1)
        say(socket, Cancel(id=4, target=3))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(2))}
        assert (answers[3].code, answers[3].frames) == ("cancelled", 1)
        assert time.monotonic() - started < 10


def test_inference_stops_when_its_client_is_gone():
    with BackgroundServer(NullPolicy(infer_s=30.0)) as server:
        with connect(server.url, compression=None) as socket:
            begin(socket, "a")
            say(socket, observe(3, session="a"))
            time.sleep(0.1)
        started = time.monotonic()
        while server.server.manager.queue or server.server.manager._device.running:
            assert time.monotonic() - started < 10
            time.sleep(0.02)


def test_start_without_a_name_can_be_cancelled_while_it_waits():
    with BackgroundServer(NullPolicy(infer_s=0.3)) as server, connect(server.url, compression=None) as socket:
        begin(socket, "a")
        say(socket, observe(3, session="a"))
        time.sleep(0.05)
        say(socket, Start(id=4, prompt="go"))
        time.sleep(0.05)
        say(socket, Cancel(id=5, target=4), Ping(id=6))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(4))}
    assert answers[4].code == "cancelled"
    assert (answers[5].state, answers[5].frames, answers[5].emitted) == ("ended", 0, -1)
    assert len(answers[5].session) == 32
    assert answers[6].sessions == 1
    assert answers[3].seg == 0


class SlowToOpen(NullPolicy):
    """Takes its time to open a session, and remembers which ones were closed."""

    def __init__(self):
        super().__init__()
        self.open_s = 0.0
        self.closed: list[str] = []

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        time.sleep(self.open_s)
        session = super().new_session(prompt, seed=seed, negative_prompt=negative_prompt, emit=emit)
        session.close = lambda: self.closed.append(prompt)
        return session


@pytest.mark.parametrize("name", [None, "s"])
def test_cancelled_start_opens_nothing_and_replaces_nothing(name: str | None):
    policy = SlowToOpen()
    with BackgroundServer(policy) as server, connect(server.url, compression=None) as socket:
        begin(socket, "s")
        say(socket, observe(3))
        assert hear(socket).seg == 0
        policy.open_s = 0.2
        say(socket, Start(id=4, session=name, prompt="unwanted"))
        time.sleep(0.05)
        say(socket, Cancel(id=5, target=4))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(2))}
        assert answers[4].code == "cancelled"
        assert answers[5].state == ("open" if name else "ended")
        say(socket, observe(6, first=2), Ping(id=7))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(2))}
        assert answers[6].frames == 2
        assert answers[7].sessions == 1
        assert policy.closed == ["unwanted"]


def test_cancelling_what_never_was_is_bad_request():
    with BackgroundServer(NullPolicy()) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        say(socket, Cancel(id=3, target=99))
        assert hear(socket).code == "bad_request"


def test_cancelling_running_work_keeps_its_actions_for_later():
    with BackgroundServer(NullPolicy(infer_s=0.2)) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        say(socket, observe(3))
        time.sleep(0.08)
        say(socket, Cancel(id=4, target=3))
        answers = {answer.re: answer for answer in (hear(socket) for _ in range(2))}
        assert answers[3].code == "cancelled"
        say(socket, observe(5, seg=0))
        assert hear(socket).seg == 0


def test_idle_session_expires_with_bye():
    limits = Limits(session_ttl_s=0.1)
    with BackgroundServer(NullPolicy(), limits=limits) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        assert hear(socket) == Bye(reason="expired", session="s")
        say(socket, observe(3))
        assert hear(socket).code == "unknown_session"


def test_shutdown_answers_the_work_in_progress_says_bye_and_closes():
    with BackgroundServer(NullPolicy(infer_s=0.3)) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        say(socket, observe(3))
        time.sleep(0.05)
        server.server.should_exit = True
        assert hear(socket).seg == 0
        assert hear(socket) == Bye(reason="shutdown")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=5)
    assert closed.value.rcvd.code == 1001


def test_draining_server_is_not_ready_and_refuses_new_work():
    with BackgroundServer(NullPolicy(infer_s=0.6)) as server, connect(server.url, compression=None) as socket:
        begin(socket)
        say(socket, observe(3))
        time.sleep(0.05)
        server.server.should_exit = True
        deadline = time.monotonic() + 2
        while server.server.manager.is_ready and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{server.server.bound_port}/readyz")
        refused.value.close()
        assert refused.value.code == 503
        say(socket, observe(4, first=2))
        assert hear(socket).code == "overloaded"


def test_restarted_server_is_found_again_and_tells_that_the_session_is_gone():
    with BackgroundServer(NullPolicy()) as server:
        port = server.server.bound_port
        client = SessionClient(server.url, reconnect_s=10)
        client.__enter__()
        client.start("go")
    with BackgroundServer(NullPolicy(), port=port):
        with pytest.raises(ServerError) as refusal:
            client.observe([JPEG])
        assert refusal.value.code == "unknown_session"
        client.start("go")
        assert client.observe([JPEG]).segment == 0
        client.close()


def test_sigterm_ends_the_process_normally():
    program = (
        "from worldvln_edge.runtime.sessions.null_policy import NullPolicy\n"
        "from worldvln_edge.runtime.doors.server import serve\n"
        "serve(NullPolicy(), port=0, on_ready=lambda url: print(url, flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        with connect(url, compression=None) as socket:
            begin(socket)
            process.send_signal(signal.SIGTERM)
            assert hear(socket) == Bye(reason="shutdown")
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(websocket_connection, "_GOODBYE_S", 0.2)
    limits = Limits(max_unsent_bytes=10_000)
    with BackgroundServer(NullPolicy(), limits=limits) as server:
        narrow = socketlib.socket()
        narrow.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_RCVBUF, 4096)
        narrow.connect(("127.0.0.1", server.server.bound_port))
        with (
            connect(server.url, sock=narrow, compression=None, max_queue=1, close_timeout=0.1) as socket,
            pytest.raises(ConnectionClosed),
        ):
            say(socket, *[Hello(id=1, v=[1])] * 1_000_000)
        with SessionClient(server.url) as other:
            assert other.ping().ready


class UpgradeRequest:
    """One client at the door, without a network: its upgrade is granted when the test says so."""

    def __init__(self):
        self.may_go_on, self.has_left = asyncio.Event(), asyncio.Event()
        self.sent: list[dict] = []
        self._incoming = [{"type": "websocket.connect"}]
        scope = {
            "type": "websocket",
            "path": "/v1/session",
            "headers": [],
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}},
        }
        self.websocket = WebSocket(scope, self._receive, self._send)

    async def _receive(self) -> dict:
        if self._incoming:
            return self._incoming.pop()
        await self.has_left.wait()
        return {"type": "websocket.disconnect", "code": 1000}

    async def _send(self, message: dict) -> None:
        await self.may_go_on.wait()
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return self.sent[0].get("status", 101) if self.sent else None


def test_clients_that_come_at_once_do_not_get_past_the_connection_limit():
    async def scenario() -> None:
        manager = SessionManager(NullPolicy(), limits=Limits(max_connections=3))
        door = WebSocketDoor(manager, Entrance(manager, AccessRule()))

        async def come(count: int) -> tuple[list[UpgradeRequest], list[asyncio.Task]]:
            clients = [UpgradeRequest() for _ in range(count)]
            tasks = [asyncio.create_task(door.serve(client.websocket)) for client in clients]
            await asyncio.sleep(0.01)  # all of them ask before the first is let in
            for client in clients:
                client.may_go_on.set()
            await asyncio.sleep(0.01)
            return clients, tasks

        clients, tasks = await come(8)
        assert [client.status for client in clients] == [101] * 3 + [503] * 5
        assert b"as many connections as it accepts" in clients[-1].sent[1]["body"]
        clients[0].has_left.set()
        await tasks[0]
        later, later_tasks = await come(2)
        assert [client.status for client in later] == [101, 503]
        for client in (*clients, *later):
            client.has_left.set()
        await asyncio.gather(*tasks, *later_tasks)
        manager.close()

    asyncio.run(scenario())


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_full_server_drops_done_sessions_first_then_the_longest_idle_never_active_ones():
    clock = Clock()
    limits = Limits(max_sessions=3, min_idle_s=60)

    async def scenario() -> list[str]:
        manager = SessionManager(NullPolicy(), limits=limits, clock=clock)

        async def start(name: str) -> None:
            await manager.start("", Start(id=1, session=name, prompt="go"))

        for name in ("oldest", "done", "active"):
            await start(name)
            clock.now += 1
        for first, count in ((1, 17), (18, 16), (34, 0)):
            await manager.observe("", observe(2, first=first, count=count, session="done"))
        clock.now += 50
        with pytest.raises(ProtocolError, match="3 active sessions"):
            await start("too early")
        clock.now += 15
        await manager.observe("", observe(2, session="active"))
        await start("second")  # "done" is younger than "oldest" and goes first
        await start("third")
        kept = [name for name in ("oldest", "done", "active") if (await manager.state("", name, 0)).state != "ended"]
        manager.close()
        return kept

    assert asyncio.run(scenario()) == ["active"]


def test_thousands_of_opened_sessions_stay_bounded_and_leave_a_flight_intact():
    clock = Clock()

    async def scenario() -> None:
        manager = SessionManager(NullPolicy(), clock=clock)
        await manager.start("", Start(id=1, session="flight", prompt="go"))
        for index in range(1000):
            clock.now += 1
            if index % 16 == 0:
                frames = (await manager.state("", "flight", 0)).frames
                await manager.observe("", observe(1, first=frames + 1, session="flight"))
            await manager.start("", Start(id=1, session=f"other-{index}", prompt="go"))
            assert manager.sessions <= manager.limits.max_sessions
        assert (await manager.state("", "flight", 0)).frames == 49
        manager.close()

    asyncio.run(scenario())


def test_store_of_undigested_frames_is_bounded():
    async def scenario() -> None:
        manager = SessionManager(NullPolicy(), limits=Limits(max_stored_bytes=5 * 8 * 8 * 3))
        await manager.start("", Start(id=1, session="s", prompt="go"))
        with pytest.raises(ProtocolError, match="undigested") as refusal:
            await manager.observe("", observe(2, count=6))
        assert (refusal.value.code, refusal.value.frames) == ("overloaded", 0)
        assert (await manager.observe("", observe(3, count=5))).frames == 5
        manager.close()

    asyncio.run(scenario())


def test_one_key_may_not_hold_every_place():
    async def scenario() -> None:
        manager = SessionManager(NullPolicy(), limits=Limits(max_open_sessions_per_key=2))
        for name in ("a", "b"):
            await manager.start("key-1", Start(id=1, session=name, prompt="go"))
        with pytest.raises(ProtocolError, match="2 open sessions") as refusal:
            await manager.start("key-1", Start(id=1, session="c", prompt="go"))
        assert refusal.value.code == "busy"
        await manager.start("key-1", Start(id=1, session="b", prompt="replaces"))
        await manager.start("key-2", Start(id=1, session="c", prompt="go"))
        manager.close()

    asyncio.run(scenario())


def test_device_queue_takes_the_oldest_deadline_first_and_survives_cancelled_waits():
    order: list[str] = []

    async def scenario() -> None:
        queue = DeviceQueue()
        now = asyncio.get_running_loop().time()

        def work(name: str, seconds: float = 0.0):
            def run() -> None:
                time.sleep(seconds)
                order.append(name)

            return run

        first = asyncio.create_task(queue.run(work("first", 0.1), priority=now, ticket=Ticket()))
        await asyncio.sleep(0.02)
        rest = [
            asyncio.create_task(queue.run(work(name), priority=now + after, ticket=Ticket(), start_by=start_by))
            for name, after, start_by in (("patient", 9, None), ("urgent", 1, None), ("hopeless", 0.5, now + 0.04))
        ]
        torn_down = asyncio.create_task(queue.run(work("torn down"), priority=now, ticket=Ticket()))
        await asyncio.sleep(0.01)
        torn_down.cancel()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        assert isinstance(results[3], StartedTooLateError)
        await queue.run(work("last"), priority=0, ticket=Ticket())
        assert queue.running <= 1
        queue.close()

    asyncio.run(scenario())
    assert order == ["first", "urgent", "patient", "last"]


def test_estimate_is_a_median_and_softens_so_that_it_cannot_refuse_for_ever():
    estimate = DurationEstimate()
    assert estimate.seconds == 0.0
    for seconds in (30.0, 1.0, 1.2):
        estimate.add(seconds)
    assert estimate.seconds == 1.2
    for _ in range(100):
        estimate.soften()
    assert estimate.seconds < 0.02
