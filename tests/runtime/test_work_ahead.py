"""What can be done before a segment is due is done while nobody waits, and nobody waits for it."""

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from worldvln_edge.protocol import Observe, Start
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.session_manager import SessionManager

PIXELS = np.zeros((4, 4, 3), np.uint8).tobytes()


class AheadSession(NullSession):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.ahead_of: list[int] = []
        self.fails = False

    def work_ahead(self, should_stop=lambda: False) -> bool:
        self.ahead_of.append(self.emitted + 1)
        if self.fails:
            raise RuntimeError("device lost")
        return False


class AheadPolicy(NullPolicy):
    def __init__(self, **options):
        super().__init__(**options)
        self.opened: list[AheadSession] = []

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.opened.append(AheadSession(self, prompt, seed=seed, emit=emit))
        return self.opened[-1]


class PatientSession(AheadSession):
    """Would work ahead for ever."""

    def work_ahead(self, should_stop=lambda: False) -> bool:
        super().work_ahead(should_stop)
        while not should_stop():
            time.sleep(0.005)
        return True


class PatientPolicy(AheadPolicy):
    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.opened.append(PatientSession(self, prompt, seed=seed, emit=emit))
        return self.opened[-1]


def observe(first: int, count: int, session: str = "s") -> Observe:
    return Observe(id=first, session=session, first=first, frames=[PIXELS] * count, fmt="rgb8", w=4, h=4)


async def settled(manager: SessionManager) -> None:
    while manager._ahead.is_busy:
        await asyncio.sleep(0.005)


def test_work_is_done_after_the_start_and_after_every_segment_but_the_last():
    policy = AheadPolicy()

    async def fly() -> None:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await settled(manager)
        for first, count in ((1, 1), (2, 16), (18, 16)):
            await manager.observe("", observe(first, count))
            await settled(manager)
        manager.close()

    asyncio.run(fly())
    assert policy.opened[0].ahead_of == [0, 1, 2]


def test_frames_that_emit_nothing_start_no_work():
    policy = AheadPolicy()

    async def fly() -> None:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await settled(manager)
        await manager.observe("", observe(1, 1))
        await settled(manager)
        await manager.observe("", observe(2, 3))
        await settled(manager)
        manager.close()

    asyncio.run(fly())
    assert policy.opened[0].ahead_of == [0, 1]


def test_request_does_not_wait_behind_work_that_waits_for_an_idle_device():
    policy = AheadPolicy()

    async def fly() -> float:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await settled(manager)
        block = threading.Event()
        busy = asyncio.create_task(manager._device.run(block.wait, priority=0.0, ticket=Ticket()))
        await asyncio.sleep(0.02)
        manager._ahead.begin(manager._table.find(("", "s")))
        await asyncio.sleep(0.02)  # it waits for the device, and holds the session's turn
        request = asyncio.create_task(manager.observe("", observe(1, 1)))
        await asyncio.sleep(0.02)
        block.set()
        started = time.perf_counter()
        answer = await request
        assert answer.seg == 0
        await busy
        await settled(manager)
        manager.close()
        return time.perf_counter() - started

    asyncio.run(fly())
    assert policy.opened[0].ahead_of == [0, 1]  # the cancelled work for segment 0 never ran


def test_request_that_comes_before_the_work_began_leaves_it_for_afterwards():
    policy = AheadPolicy()

    async def fly() -> None:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await settled(manager)
        await manager.observe("", observe(1, 1))
        await manager.observe("", observe(2, 1))  # nothing was awaited in between, so the work did not begin
        await settled(manager)
        manager.close()

    asyncio.run(fly())
    assert policy.opened[0].ahead_of == [0, 1]


def test_new_work_takes_the_place_of_work_that_waits():
    policy = AheadPolicy()

    async def fly() -> None:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await settled(manager)
        session = manager._table.find(("", "s"))
        manager._ahead.begin(session)
        manager._ahead.begin(session)
        await settled(manager)
        manager.close()

    asyncio.run(fly())
    assert policy.opened[0].ahead_of == [0, 0]


@pytest.mark.parametrize("resume", [False, True])
def test_start_does_not_wait_for_the_work_of_the_session_that_it_names(resume):
    policy = PatientPolicy()

    async def fly() -> None:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        while not policy.opened[0].ahead_of:
            await asyncio.sleep(0.005)
        await asyncio.wait_for(manager.start("", Start(id=2, session="s", prompt="go", resume=resume)), 30)
        while not policy.opened[-1].ahead_of[resume:]:  # and it is gone on with
            await asyncio.sleep(0.005)
        await manager.end("", "s", 3)
        manager.close()

    asyncio.run(asyncio.wait_for(fly(), 60))
    assert len(policy.opened) == (1 if resume else 2)


def test_work_that_fails_is_logged_and_the_flight_goes_on(caplog):
    policy = AheadPolicy()

    async def fly() -> list[int]:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await settled(manager)
        policy.opened[0].fails = True
        segments = []
        for first, count in ((1, 1), (2, 16), (18, 16)):
            segments.append((await manager.observe("", observe(first, count))).seg)
            await settled(manager)
        manager.close()
        return segments

    assert asyncio.run(fly()) == [0, 1, 2]
    assert "device lost" in caplog.text


def test_session_that_ended_is_not_worked_on():
    policy = AheadPolicy()

    async def fly() -> None:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await manager.end("", "s", 2)
        await settled(manager)
        manager.close()

    asyncio.run(fly())
    assert policy.opened[0].ahead_of == []


def test_closing_the_manager_leaves_no_work_behind():
    async def fly() -> None:
        manager = SessionManager(AheadPolicy())
        await manager.start("", Start(id=1, session="s", prompt="go"))
        manager.close()
        await settled(manager)

    asyncio.run(fly())


class LongAheadSession(AheadSession):
    """Work ahead in ten parts, which asks between them whether it should stop."""

    parts = 0

    def work_ahead(self, should_stop=lambda: False) -> bool:
        while self.parts < 10 and not should_stop():
            time.sleep(0.01)
            self.parts += 1
        return self.parts < 10


class LongAheadPolicy(AheadPolicy):
    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.opened.append(LongAheadSession(self, prompt, seed=seed, emit=emit))
        return self.opened[-1]


def test_long_work_makes_way_for_another_session_and_goes_on():
    policy = LongAheadPolicy()

    async def fly() -> int:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await asyncio.sleep(0.03)
        await manager.start("", Start(id=2, session="other", prompt="go"))
        parts = policy.opened[0].parts
        await settled(manager)
        manager.close()
        return parts

    assert 0 < asyncio.run(fly()) < 10
    assert [session.parts for session in policy.opened] == [10, 10]


def test_long_work_makes_way_for_its_own_frames_and_goes_on_after_them():
    policy = LongAheadPolicy()

    async def fly() -> None:
        manager = SessionManager(policy)
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await manager.observe("", observe(1, 1))
        await asyncio.sleep(0.03)
        answer = await manager.observe("", observe(2, 3))
        assert answer.seg == -1
        assert 0 < policy.opened[0].parts < 10
        await settled(manager)
        manager.close()

    asyncio.run(fly())
    assert policy.opened[0].parts == 10


class ReadySession(NullSession):
    """Its second segment was generated ahead, so it takes no time."""

    def observe(self, frames, **options):
        chunk = super().observe(frames, **options)
        self._policy.infer_s = 0.0
        return chunk and replace(chunk, was_ready=chunk.segment == 1)


class ReadyPolicy(NullPolicy):
    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return ReadySession(self, prompt, seed=seed, emit=emit)


def test_segment_that_was_ready_does_not_shorten_the_estimate_of_the_next():
    async def fly() -> tuple[float, float]:
        manager = SessionManager(ReadyPolicy(infer_s=0.2))
        await manager.start("", Start(id=1, session="s", prompt="go"))
        await manager.observe("", observe(1, 1))
        before = manager._observations.estimate.seconds
        await manager.observe("", observe(2, 16))
        after = manager._observations.estimate.seconds
        manager.close()
        return before, after

    before, after = asyncio.run(fly())
    assert before == after >= 0.2
