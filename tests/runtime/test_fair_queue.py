"""Sessions share the device evenly, whatever one of them sends and however urgent it says it is."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter

import numpy as np
import pytest

from worldvln_edge.config import HorizonConfig
from worldvln_edge.protocol import Limits, Observe, ProtocolError, Start
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, StartedTooLateError, Ticket, WorkCancelledError
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.session_manager import SessionManager

PIXELS = np.zeros((4, 4, 3), np.uint8).tobytes()
STEP, SEGMENTS = 4, 200
INFER_S = 0.005


class LoggingSession(NullSession):
    def observe(self, frames, *, budget_s=None, **options):
        chunk = super().observe(frames, budget_s=budget_s)
        if chunk is not None:
            self._policy.flown.append(self.prompt)
            self._policy.device_s += self._policy.infer_s
        return chunk


class LoggingPolicy(NullPolicy):
    """Remembers whose segment was flown when. By its clock every segment takes as long, however busy the machine is."""

    def __init__(self, infer_s: float = INFER_S):
        super().__init__(HorizonConfig(num_frames=1 + SEGMENTS * STEP, step=STEP), infer_s=infer_s)
        self.flown: list[str] = []
        self.device_s = 0.0

    def manager(self, **options) -> SessionManager:
        manager = SessionManager(self, **options)
        manager._device._clock = lambda: self.device_s
        return manager

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return LoggingSession(self, prompt, seed=seed, emit=emit)


class Client:
    """One drone: a session that is named as its prompt, so that the log tells them apart."""

    def __init__(self, manager: SessionManager, name: str):
        self.manager, self.name, self.sent = manager, name, 0

    async def start(self) -> None:
        await self.manager.start("", Start(id=1, session=self.name, prompt=self.name))

    async def observe(self, count: int, **fields) -> int:
        first, self.sent = self.sent + 1, self.sent + count
        frames = [PIXELS] * count
        request = Observe(id=first, session=self.name, first=first, frames=frames, fmt="rgb8", w=4, h=4, **fields)
        return (await self.manager.observe("", request)).seg

    async def fly(self, until_s: float, *, pause_s: float = 0.0) -> None:
        """A segment's frames, its actions, the next segment's frames."""
        await self.observe(1)
        while time.monotonic() < until_s:
            await self.observe(STEP)
            await asyncio.sleep(pause_s)

    async def send_without_pause(self, until_s: float, requests: int, **fields) -> None:
        """So many unanswered requests at any time, each with a segment's frames."""

        async def one_after_the_other() -> None:
            while time.monotonic() < until_s:
                # A deadline that cannot be met is refused; the segment is asked for with the next request.
                with contextlib.suppress(ProtocolError):
                    await self.observe(STEP, **fields)

        await self.observe(1)
        await asyncio.gather(*(one_after_the_other() for _ in range(requests)))


def fly(policy: LoggingPolicy, seconds: float, **flights) -> Counter:
    """Fly sessions at once; each keyword is a name and what its client does until a time. Segments by name."""

    async def all_of_them() -> None:
        manager = policy.manager()
        clients = {name: Client(manager, name) for name in flights}
        await asyncio.gather(*(client.start() for client in clients.values()))
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(flight(clients[name], until_s) for name, flight in flights.items()))
        manager.close()

    asyncio.run(all_of_them())
    return Counter(policy.flown)


@pytest.mark.parametrize("sessions", [2, 3, 7])
def test_sessions_of_the_same_demand_fly_as_many_segments(sessions: int):
    policy = LoggingPolicy()
    flights = {f"drone-{index}": lambda client, until_s: client.fly(until_s) for index in range(sessions)}
    flown = fly(policy, 0.6, **flights)
    assert len(flown) == sessions
    assert min(flown.values()) >= 0.8 * max(flown.values())
    assert sum(flown.values()) >= 10  # enough to compare, on a slow machine too


@pytest.mark.parametrize("deadline_ms", [None, 100.0, 5000.0])
def test_clients_that_send_without_pause_get_no_more_than_their_share(deadline_ms: float | None):
    def greedy(client: Client, until_s: float):
        return client.send_without_pause(until_s, 4, deadline_ms=deadline_ms)

    flown = fly(
        LoggingPolicy(), 0.8, greedy=greedy, greedy_too=greedy, modest=lambda client, until_s: client.fly(until_s)
    )
    assert flown["modest"] >= 0.8 * max(flown["greedy"], flown["greedy_too"])
    assert sum(flown.values()) >= 10  # enough to compare, on a slow machine too


def test_slow_client_waits_for_no_more_than_one_segment_of_each_greedy_one():
    def greedy(client: Client, until_s: float):
        return client.send_without_pause(until_s, 4, deadline_ms=200.0)

    flown = fly(
        LoggingPolicy(),
        0.8,
        greedy=greedy,
        greedy_too=greedy,
        slow=lambda client, until_s: client.fly(until_s, pause_s=0.03),
    )
    # Its turn takes its pause, its own segment, the one that is running, and what comes in between.
    assert flown["slow"] >= 0.7 * 0.8 / (0.03 + 4 * INFER_S)
    assert flown["greedy"] > flown["slow"]  # what the slow one leaves is not wasted


def run_in_order(works: list[tuple[str, float, str | None]], *, seconds: float = 0.01) -> list[str]:
    """Put works (name, priority after now, session) into the line of a busy queue; names in the order they ran in."""
    order: list[str] = []

    async def scenario() -> None:
        queue = DeviceQueue()
        now = asyncio.get_running_loop().time()

        def work(name: str):
            def run() -> None:
                time.sleep(seconds)
                order.append(name)

            return run

        busy = asyncio.create_task(queue.run(lambda: time.sleep(0.05), priority=now, ticket=Ticket()))
        await asyncio.sleep(0.01)
        await asyncio.gather(
            *(queue.run(work(name), priority=now + after, ticket=Ticket(), session=who) for name, after, who in works)
        )
        await busy
        queue.close()

    asyncio.run(scenario())
    return order


def test_deadlines_order_the_first_work_of_every_session():
    works = [("patient", 10.0, "a"), ("urgent", 1.0, "b"), ("idle", float("inf"), None), ("soon", 5.0, "c")]
    assert run_in_order(works) == ["urgent", "soon", "patient", "idle"]


def test_urgent_session_that_had_its_share_lets_the_other_one_catch_up():
    async def scenario() -> list[str]:
        pieces = itertools.count()
        queue, order = DeviceQueue(clock=lambda: float(next(pieces))), []  # every piece takes 1 s of it
        now = asyncio.get_running_loop().time()

        async def keep_busy(name: str, after: float, count: int) -> None:
            for _ in range(count):
                await queue.run(lambda: time.sleep(0.01), priority=now + after, ticket=Ticket(), session=name)
                order.append(name)

        await asyncio.gather(keep_busy("urgent", 1.0, 8), keep_busy("urgent too", 1.0, 8), keep_busy("patient", 9.0, 8))
        queue.close()
        return order

    order = asyncio.run(scenario())
    turns = [index for index, name in enumerate(order) if name == "patient"]
    assert turns[0] <= 2
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) <= 3


def test_work_that_waited_beyond_its_patience_runs_whatever_its_session_had():
    async def scenario() -> list[str]:
        queue, order = DeviceQueue(), []
        now = asyncio.get_running_loop().time()

        async def run(name: str, seconds: float, priority: float) -> None:
            await queue.run(lambda: time.sleep(seconds), priority=priority, ticket=Ticket(), session=name)
            order.append(name)

        busy = asyncio.create_task(run("had much", 0.1, now))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(run(f"other {index}", 0.01, now + 1)) for index in range(3)]
        await busy
        overdue = asyncio.create_task(run("had much", 0.01, now + 0.01))
        await asyncio.gather(*others, overdue)
        queue.close()
        return order

    assert asyncio.run(scenario()).index("had much", 1) <= 2


def test_share_that_was_not_used_is_not_saved_up():
    async def scenario() -> list[str]:
        queue, order = DeviceQueue(), []

        async def run(name: str) -> None:
            priority = asyncio.get_running_loop().time() + 10
            await queue.run(lambda: time.sleep(0.01), priority=priority, ticket=Ticket(), session=name)
            order.append(name)

        for _ in range(10):
            await run("busy")
        await asyncio.gather(*(run(name) for name in ("busy", "fresh") for _ in range(4)))
        queue.close()
        return order[10:]

    assert Counter(asyncio.run(scenario())[:4])["busy"] >= 1


def test_waiters_that_give_up_leave_the_line_and_the_device():
    async def scenario() -> None:
        queue = DeviceQueue()
        now = asyncio.get_running_loop().time()
        ticket = Ticket()
        busy = asyncio.create_task(queue.run(lambda: time.sleep(0.05), priority=now, ticket=Ticket()))
        await asyncio.sleep(0.01)
        assert not queue.is_wanted
        cancelled = asyncio.create_task(queue.run(lambda: None, priority=now + 1, ticket=ticket, session="a"))
        late = asyncio.create_task(
            queue.run(lambda: None, priority=now + 1, ticket=Ticket(), start_by=now + 0.02, session="b")
        )
        torn_down = asyncio.create_task(queue.run(lambda: None, priority=now + 1, ticket=Ticket(), session="c"))
        await asyncio.sleep(0.005)
        assert queue.is_wanted
        ticket.cancel()
        torn_down.cancel()
        results = await asyncio.gather(cancelled, late, torn_down, return_exceptions=True)
        assert [type(result) for result in results] == [
            WorkCancelledError,
            StartedTooLateError,
            asyncio.CancelledError,
        ]
        assert not queue.is_wanted
        await busy
        await queue.run(lambda: None, priority=0, ticket=Ticket())
        await asyncio.sleep(0.01)
        assert queue.running == 0
        queue.close()

    asyncio.run(scenario())


def test_queue_remembers_nothing_of_sessions_that_are_gone():
    policy = LoggingPolicy(infer_s=0.0)

    async def scenario() -> int:
        manager = policy.manager(limits=Limits(max_sessions=4, min_idle_s=0))
        for index in range(50):
            client = Client(manager, f"s{index}")
            await client.start()
            await client.observe(1)
        manager.close()
        return len(manager._device._had_s)

    assert asyncio.run(scenario()) <= 4


def test_sessions_that_come_once_do_not_keep_a_drone_waiting_however_many_they_are():
    device_s, crowd = 0.0, 8

    def work() -> None:
        nonlocal device_s
        device_s += INFER_S

    async def scenario() -> list[int]:
        queue, served, is_over = DeviceQueue(clock=lambda: device_s), 0, False
        far_s = asyncio.get_running_loop().time() + 1000

        async def come_once_again_and_again(place: int) -> None:
            nonlocal served
            while not is_over:
                name = (place, served)
                await queue.run(work, priority=far_s, ticket=Ticket(), session=name)
                queue.forget(name)
                served += 1

        others = [asyncio.create_task(come_once_again_and_again(place)) for place in range(crowd)]
        passed_by = []
        for _ in range(20):
            before = served
            await queue.run(work, priority=far_s, ticket=Ticket(), session="drone")
            passed_by.append(served - before)
        is_over = True
        await asyncio.gather(*others)
        queue.close()
        return passed_by

    assert max(asyncio.run(asyncio.wait_for(scenario(), 60))) <= 2 * crowd
