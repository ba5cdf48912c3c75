"""A journal that cannot be restored is said once, set aside, and in nobody's way."""

import asyncio
import dataclasses
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from crashing_server import SeeingPolicy, SeeingSession
from http_calls import HttpCalls, frame
from openpi_calls import PolicyClient, pixels

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import Observe, ProtocolError, Start
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_manager import SessionManager

FRAMES = [np.full((8, 8, 3), index, np.uint8) for index in range(60)]
RGB8 = {"fmt": "rgb8", "w": 8, "h": 8}
REFUSAL = "could not be restored after the server was started again; start it again"


class ClosableSession(SeeingSession):
    is_closed = False

    def restore(self, frames, emitted):
        if self._policy.fails_with is not None:
            raise self._policy.fails_with
        super().restore(frames, emitted)

    def close(self):
        self.is_closed = True


class FailingPolicy(SeeingPolicy):
    """Its sessions cannot be restored while `fails_with` is set."""

    def __init__(self, **options):
        super().__init__(**options)
        self.opened: list[ClosableSession] = []
        self.fails_with: Exception | None = None

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.opened.append(ClosableSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt))
        return self.opened[-1]


def serve(folder: Path, policy=None, **options) -> BackgroundServer:
    return BackgroundServer(policy or FailingPolicy(), journal=SessionJournal(folder), **options)


def fly(folder: Path) -> str:
    """Two segments, and a server that ends; returns the session's name."""
    with serve(folder) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start("go", seed=3)
        client.observe(FRAMES[:1])
        client.observe(FRAMES[1:17])
        return client.session


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut_into_the_first_record(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def other_weights() -> FailingPolicy:
    policy = FailingPolicy()
    policy.info = dataclasses.replace(policy.info, weights="another export")
    return policy


def broken_policy() -> FailingPolicy:
    policy = FailingPolicy()
    policy.fails_with = RuntimeError("device lost in /srv/secret")
    return policy


def leave_alone(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "make_policy", "reason"),
    [
        (flip_a_byte, FailingPolicy, "is not as it was written"),
        (cut_into_the_first_record, FailingPolicy, "ends within its first record"),
        (leave_alone, other_weights, "this server flies null fp32 .* another export"),
        (leave_alone, broken_policy, "RuntimeError: device lost"),
    ],
)
def test_client_is_told_to_start_again_and_can_at_once(tmp_path, caplog, damage, make_policy, reason):
    name = fly(tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    data, policy = path.read_bytes(), make_policy()
    with serve(tmp_path, policy) as server, SessionClient(server.url, frame_format="rgb8") as client:
        for message in (REFUSAL, "no such session"):  # asked a second time, there is nothing to be restored
            with pytest.raises(ServerError, match=message) as refusal:
                client.start(session=name, resume=True)
            assert (refusal.value.code, refusal.value.retry) == ("unknown_session", False)
            assert "/srv" not in str(refusal.value)
            assert str(tmp_path) not in str(refusal.value)
        (aside,) = tmp_path.iterdir()
        assert aside.suffix == ".aside"
        assert aside.read_bytes() == data
        (told,) = [record for record in caplog.records if "could not be restored" in record.message]
        assert str(aside) in told.message
        assert re.search(reason, told.message)
        assert name not in told.message
        assert all(session.is_closed for session in policy.opened)
        assert server.server.manager.sessions == 0
        client.start("go", session=name)
        assert client.observe(FRAMES[:1]).segment == 0


def test_a_session_set_aside_for_other_weights_goes_on_once_its_file_has_its_name_again(tmp_path):
    name = fly(tmp_path)
    (path,) = tmp_path.iterdir()
    with serve(tmp_path, other_weights()) as server, SessionClient(server.url) as client, pytest.raises(ServerError):
        client.start(session=name, resume=True)
    (aside,) = tmp_path.iterdir()
    aside.rename(path)
    with serve(tmp_path) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(session=name, resume=True)
        assert client.observe(FRAMES[17:33]).segment == 2


def test_a_record_that_was_cut_off_costs_only_what_was_not_acknowledged(tmp_path):
    name = fly(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b"\x10\x00\x00")  # the beginning of another record
    with serve(tmp_path) as server, SessionClient(server.url, frame_format="rgb8") as client:
        client.start(session=name, resume=True)
        assert client.observe(FRAMES[17:33]).segment == 2


def test_a_device_that_opens_no_session_now_leaves_the_journal_for_later(tmp_path):
    name, policy = fly(tmp_path), FailingPolicy()
    opens, policy.new_session = policy.new_session, None
    with serve(tmp_path, policy, warm_up=False) as server, SessionClient(server.url, frame_format="rgb8") as client:
        with pytest.raises(ServerError) as refusal:
            client.start(session=name, resume=True)
        assert refusal.value.code == "internal"
        policy.new_session = opens
        client.start(session=name, resume=True)
        assert client.observe(FRAMES[17:33]).segment == 2


def damaged(folder: Path) -> SessionJournal:
    for path in folder.glob("*.journal"):
        flip_a_byte(path)
    return SessionJournal(folder)


def test_http_client_hears_it_once_and_its_next_prompt_starts(tmp_path):
    ahead = {"allow_future_segments": True}
    with serve(tmp_path) as server, HttpCalls(server) as calls:
        calls.fly([frame(0)], instruction="go", **ahead)
    with BackgroundServer(FailingPolicy(), journal=damaged(tmp_path)) as server, HttpCalls(server) as calls:
        status, answer = calls.ask([frame(1)] * 16, instruction="go", **ahead)
        assert (status, answer["code"]) == (400, "unknown_session")
        assert REFUSAL in answer["detail"]
        assert calls.fly([frame(0)] * 2, instruction="go", **ahead)["segment_index"] == 0


def test_http_call_that_starts_afresh_does_not_ask_the_journal(tmp_path, caplog):
    with serve(tmp_path) as server, HttpCalls(server) as calls:
        calls.fly([frame(0)], instruction="go")
    with BackgroundServer(FailingPolicy(), journal=damaged(tmp_path)) as server, HttpCalls(server) as calls:
        assert calls.fly([frame(0)], instruction="go", allow_future_segments=True)["segment_index"] == 0
    assert "could not be restored" not in caplog.text
    assert [path.suffix for path in tmp_path.iterdir()] == [".journal"]


def test_openpi_client_hears_it_once_and_its_next_prompt_starts(tmp_path):
    observation = {"images": pixels(0), "prompt": "go", "session_id": "drone"}
    with serve(tmp_path) as server, PolicyClient(server) as client:
        client.ask(**observation)
    with BackgroundServer(FailingPolicy(), journal=damaged(tmp_path)) as server, PolicyClient(server) as client:
        refusal = client.ask(**observation)
        assert refusal.startswith("unknown_session: ")
        assert REFUSAL in refusal
        assert client.ask(**observation)["segment_index"] == 0


def test_a_start_is_on_disk_before_it_is_acknowledged(tmp_path):
    async def start() -> tuple[bool, bool]:
        journal = SessionJournal(tmp_path)
        manager, may_write = SessionManager(FailingPolicy(), journal=journal), threading.Event()
        journal._writer.submit(may_write.wait)
        starting = asyncio.create_task(manager.start("", Start(id=1, session="s", prompt="go")))
        await asyncio.sleep(0.1)
        was_done = starting.done()
        may_write.set()
        await starting
        is_read = SessionJournal(tmp_path).read(("", "s")).result() is not None
        manager.close()
        return was_done, is_read

    assert asyncio.run(start()) == (False, True)


def test_a_prompt_that_the_policy_has_not_heard_yet_survives(tmp_path):
    def observe(id_: int, first: int, count: int, prompt: str | None = None) -> Observe:
        pixels = [frame.tobytes() for frame in FRAMES[first - 1 : first - 1 + count]]
        return Observe(id=id_, session="s", first=first, frames=pixels, prompt=prompt, **RGB8)

    async def fly_to_the_end(*, restarts: bool) -> list:
        manager = SessionManager(FailingPolicy(), journal=SessionJournal(tmp_path))
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await manager.observe("", observe(2, 1, 1))
        await manager.observe("", observe(3, 2, 0, prompt="turn around"))  # no frames: nothing to tell the policy yet
        if restarts:
            manager.close()
            manager = SessionManager(FailingPolicy(), journal=SessionJournal(tmp_path))
            await manager.start("", Start(id=4, session="s", resume=True))
        answer = await manager.observe("", observe(5, 2, 16))
        manager.close()
        return answer.actions

    without, with_restart = (asyncio.run(fly_to_the_end(restarts=restarts)) for restarts in (False, True))
    assert without == with_restart
    assert len(without) == 16


def test_a_session_that_was_done_counts_what_it_holds(tmp_path):
    class HoldingSession(SeeingSession):
        held_bytes = 123

    class HoldingPolicy(SeeingPolicy):
        session_bytes = 4567

        def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
            return HoldingSession(self, prompt, seed=seed, emit=emit)

    async def fly_and_resume() -> list[int]:
        counted = []
        for request in (Start(id=1, session="s", prompt="go"), Start(id=1, session="s", resume=True)):
            manager = SessionManager(HoldingPolicy(), journal=SessionJournal(tmp_path))
            await manager.start("", request)
            for sent, count in ((0, 1), (1, 16), (17, 16)):
                pixels = [frame.tobytes() for frame in FRAMES[sent : sent + count]]
                await manager.observe("", Observe(id=2, session="s", first=1 + sent, frames=pixels, **RGB8))
            counted.append(manager._table.find(("", "s")).counted_bytes)
            manager.close()
        return counted

    assert asyncio.run(fly_and_resume()) == [123, 123]


def test_frames_grow_old_while_the_server_is_away(tmp_path, monkeypatch):
    clock = time.time
    envelope = EnvelopeConfig(age_s=60.0)

    def fly_and_resume(away_s: float) -> str | None:
        async def flight() -> str | None:
            manager = SessionManager(FailingPolicy(infer_s=0.05), journal=SessionJournal(tmp_path), envelope=envelope)
            await manager.start("", Start(id=1, session="s", prompt="go"))
            await manager.observe("", Observe(id=2, session="s", first=1, frames=[FRAMES[0].tobytes()], **RGB8))
            pixels = [frame.tobytes() for frame in FRAMES[1:17]]
            with pytest.raises(ProtocolError) as refusal:
                await manager.observe("", Observe(id=3, session="s", first=2, frames=pixels, deadline_ms=1, **RGB8))
            assert refusal.value.code == "deadline"
            manager.close()
            monkeypatch.setattr(time, "time", lambda: clock() + away_s)
            manager = SessionManager(FailingPolicy(), journal=SessionJournal(tmp_path), envelope=envelope)
            await manager.start("", Start(id=4, session="s", resume=True))
            answer = await manager.observe("", Observe(id=5, session="s", first=18, frames=[]))
            manager.close()
            return answer.hold or None

        try:
            return asyncio.run(flight())
        finally:
            monkeypatch.undo()

    assert fly_and_resume(100.0) == "stale"
    assert fly_and_resume(10.0) is None
    assert fly_and_resume(-100.0) is None  # the machine's clock was set back
