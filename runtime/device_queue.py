"""Who may use the device next: a few worker threads, an ordered line in front of them, and no waiting in vain.

Inference never runs on the event loop. Waiting work is taken oldest deadline first; work that could only start too
late, or that its client cancelled, leaves the line without having cost device time.
Source: spec/session_protocol.md 2.8, 7.5.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import statistics
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
        """Stop the work if it still waits. Running inference finishes; its result is kept but not answered."""
        self.is_cancelled = True
        if self._turn is not None:
            _fail(self._turn, WorkCancelledError())


class DurationEstimate:
    """What one inference takes, in seconds: the median of the last few."""

    def __init__(self, window: int = 8):
        self._recent: deque[float] = deque(maxlen=window)
        self._discount = 1.0

    @property
    def seconds(self) -> float:
        """0 until something was measured."""
        return statistics.median(self._recent) * self._discount if self._recent else 0.0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self._discount = 1.0

    def soften(self) -> None:
        """Trust the estimate a little less after it refused work, so that one slow start cannot refuse for ever."""
        self._discount *= 0.95


class DeviceQueue:
    """Worker threads behind a line ordered by priority. All methods are called from one event loop."""

    def __init__(self, workers: int = 1):
        if workers < 1:
            raise ValueError(f"workers must be >= 1, found {workers}")
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="device")
        self._workers = self._free = workers
        self._line: list[tuple[float, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @property
    def running(self) -> int:
        """Work on a thread now."""
        return self._workers - self._free

    async def run(self, work: Callable[[], T], *, priority: float, ticket: Ticket, start_by: float | None = None) -> T:
        """Run `work` on a worker thread when its turn comes.

        Args:
            work: blocking function.
            priority: smaller runs first, for example the deadline; equal ones in order of arrival.
            ticket: cancels the wait.
            start_by: event-loop time after which starting is useless; None waits as long as it takes.

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
        if self._free:
            self._free -= 1
        else:
            await self._wait_turn(loop, priority, ticket, start_by)
        running = self._executor.submit(work)
        running.add_done_callback(lambda _: self._release_from_thread(loop))
        return await asyncio.wrap_future(running)

    async def _wait_turn(
        self, loop: asyncio.AbstractEventLoop, priority: float, ticket: Ticket, start_by: float | None
    ) -> None:
        turn = loop.create_future()
        heapq.heappush(self._line, (priority, next(self._arrivals), turn))
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
            ticket._turn = None
            if timer is not None:
                timer.cancel()

    def _release(self) -> None:
        while self._line:
            _, _, turn = heapq.heappop(self._line)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _release_from_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._release)

    def submit_background(self, work: Callable[[], None]) -> Future[None]:
        """Run short clean-up work on a device thread, behind what runs now; nobody waits for it."""
        return self._executor.submit(work)

    def close(self) -> None:
        """Take no more work; what runs finishes in its thread."""
        self._executor.shutdown(wait=False)


def _fail(turn: asyncio.Future[None], error: Exception) -> None:
    if not turn.done():
        turn.set_exception(error)
