"""Who may use the device next: a few worker threads, an ordered line in front of them, and no waiting in vain.

Inference never runs on the event loop. Sessions share the device evenly, a segment at a time; among those that have
not had their share, waiting work is taken oldest deadline first. Work that could only start too late, or that its
client cancelled, leaves the line without having cost device time.
Source: spec/session_protocol.md 2.8, 7.5.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class StartedTooLateError(RuntimeError):
    """The work waited until its last useful start had passed; it did not run."""


class WorkCancelledError(RuntimeError):
    """The client cancelled the work before it ran."""


class Ticket:
    """One request's way through the server: lets a later message, or a lost connection, cancel it."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self._turn: asyncio.Future[None] | None = None

    def cancel(self) -> None:
        """Stop the work if it still waits; running inference stops at the next step of the world model."""
        self.is_cancelled = True
        if self._turn is not None:
            _fail(self._turn, WorkCancelledError())


class DurationEstimate:
    """What one inference takes, in seconds: the median of the last few."""

    def __init__(self, window: int = 8):
        self._recent: deque[float] = deque(maxlen=window)
        self.trust = 1.0
        """How far estimates are believed: 1, and less after some that refused work."""

    @property
    def seconds(self) -> float:
        """0 until something was measured."""
        return statistics.median(self._recent) * self.trust if self._recent else 0.0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self.trust = 1.0

    def soften(self) -> None:
        """Trust the estimate a little less after it refused work, so that one slow start cannot refuse for ever."""
        self.trust *= 0.95


@dataclass(frozen=True, eq=False)
class _Waiting:
    priority: float
    arrival: int
    begins_s: float
    """Where its session stands in the shared time."""
    turn: asyncio.Future[None]


class DeviceQueue:
    """Worker threads behind a line that sessions share evenly. All methods are called from one event loop.

    Waiting work with the smallest priority runs first, as long as its session has not had a piece of work more than
    another one that waits. So deadlines order what is due, and a client that sends without pause, however short its
    deadlines, leaves the others their share. A share that was not used is not saved up. Work whose priority, as an
    event-loop time, has passed may run in any case.

    Source: start-time fair queueing (Goyal, Vin, Cheng 1996), with the clock of self-clocked fair queueing (Golestani
    1994), because a start-time clock stands still while ever new sessions come.
    """

    def __init__(self, workers: int = 1, *, clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            workers: pieces of work that may run at the same time.
            clock: seconds, to measure what a session had of the device.

        Raises:
            ValueError: no worker.
        """
        if workers < 1:
            raise ValueError(f"workers must be >= 1, found {workers}")
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="device")
        self._workers = self._free = workers
        self._line: list[_Waiting] = []
        self._idle_line: deque[_Waiting] = deque()
        self._arrivals = itertools.count()
        # Seconds of the device, as if every session had its own: how far the line has come, and each session in it.
        self._virtual_s = 0.0
        self._had_s: dict[Hashable, float] = {}
        self._clock = clock
        self._recent_s: deque[float] = deque(maxlen=16)
        self._started_s: dict[int, float] = {}  # of what is on a thread now, by thread

    @property
    def running_s(self) -> float:
        """How long the longest piece of work is on a thread now, 0 without any. May be read from any thread."""
        started = min(tuple(self._started_s.values()), default=None)
        return 0.0 if started is None else self._clock() - started

    @property
    def running(self) -> int:
        """Work on a thread now."""
        return self._workers - self._free

    @property
    def is_wanted(self) -> bool:
        """Does work wait that is not only for an idle device? May be read from any thread."""
        return bool(self._line)

    async def run(
        self,
        work: Callable[[], T],
        *,
        priority: float,
        ticket: Ticket,
        start_by: float | None = None,
        session: Hashable | None = None,
    ) -> T:
        """Run `work` on a worker thread when its turn comes.

        Args:
            work: blocking function.
            priority: smaller runs first, for example the deadline; equal ones in order of arrival. Infinity: only when
                nothing else waits, and no session is charged for it.
            ticket: cancels the wait.
            start_by: event-loop time after which starting is useless; None waits as long as it takes.
            session: whose share of the device it takes; None: nobody's.

        Raises:
            StartedTooLateError: `start_by` passed in the line.
            WorkCancelledError: the ticket was cancelled in the line.
            Exception: whatever `work` raises.
        """
        loop = asyncio.get_running_loop()
        if ticket.is_cancelled:
            raise WorkCancelledError()
        if start_by is not None and loop.time() >= start_by:
            raise StartedTooLateError()
        begins_s = max(self._virtual_s, self._had_s.get(session, 0.0))
        if self._free:
            self._free -= 1
        else:
            waiting = _Waiting(priority, next(self._arrivals), begins_s, loop.create_future())
            await self._wait_turn(loop, waiting, ticket, start_by)
        charged = None if math.isinf(priority) else session
        if charged is not None:
            self._virtual_s = max(self._virtual_s, begins_s)
        took_s = 0.0

        def timed() -> T:
            nonlocal took_s
            start = self._clock()
            self._started_s[threading.get_ident()] = start
            try:
                return work()
            finally:
                del self._started_s[threading.get_ident()]
                took_s = self._clock() - start

        def done(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._finish, charged, begins_s, took_s)

        running = self._executor.submit(timed)
        running.add_done_callback(done)
        return await asyncio.wrap_future(running)

    async def _wait_turn(
        self, loop: asyncio.AbstractEventLoop, waiting: _Waiting, ticket: Ticket, start_by: float | None
    ) -> None:
        line, turn = self._idle_line if math.isinf(waiting.priority) else self._line, waiting.turn
        line.append(waiting)
        ticket._turn = turn
        timer = None
        if start_by is not None:
            timer = loop.call_at(start_by, _fail, turn, StartedTooLateError())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release()  # the place was granted in the moment the waiter was torn down
            raise
        finally:
            if waiting in line:
                line.remove(waiting)
            ticket._turn = None
            if timer is not None:
                timer.cancel()

    def _finish(self, session: Hashable | None, began_s: float, took_s: float) -> None:
        if session is not None:
            self._recent_s.append(took_s)
            self._had_s[session] = ended_s = began_s + took_s
            # Whoever comes next begins here: sessions that come once, however many, pass nobody who waits.
            self._virtual_s = max(self._virtual_s, ended_s)
        self._release()
        if self._free == self._workers:  # nobody waits, so nobody is ahead of anybody
            self._virtual_s = max([self._virtual_s, *self._had_s.values()])
            self._had_s.clear()

    def _release(self) -> None:
        chosen = self._choose()
        if chosen is None:
            self._free += 1
        else:
            chosen.turn.set_result(None)

    def _choose(self) -> _Waiting | None:
        """Whose turn it is; the waiters themselves leave the line."""
        waiting = [each for each in self._line if not each.turn.done()]
        if not waiting:
            return next((each for each in self._idle_line if not each.turn.done()), None)
        least_s = min(each.begins_s for each in waiting)
        # One that had a piece of work more than another has to let it catch up. Half a piece is between none and one.
        border_s = least_s + (statistics.median(self._recent_s) / 2 if self._recent_s else 0.0)
        now = asyncio.get_running_loop().time()

        def may_run(each: _Waiting) -> bool:
            return each.begins_s == least_s or each.begins_s < border_s or each.priority <= now

        return min(filter(may_run, waiting), key=lambda each: (each.priority, each.arrival))

    def forget(self, session: Hashable) -> None:
        """The session is gone: whoever comes next under its name owes nothing."""
        self._had_s.pop(session, None)

    def submit_background(self, work: Callable[[], None]) -> Future[None]:
        """Run short clean-up work on a device thread, behind what runs now; nobody waits for it."""
        return self._executor.submit(work)

    def close(self) -> None:
        """Take no more work; what runs finishes in its thread."""
        self._executor.shutdown(wait=False)


def _fail(turn: asyncio.Future[None], error: Exception) -> None:
    if not turn.done():
        turn.set_exception(error)
