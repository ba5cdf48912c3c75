"""Whether a request may come in: not before the server is warm, not when it ends, not when too many wait already.

Source: spec/session_protocol.md 2.8, 7.5.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worldvln_edge.protocol import Limits, ProtocolError
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, DurationEstimate
from worldvln_edge.runtime.sessions.meter import Meter
from worldvln_edge.runtime.sessions.policy_calls import internal_error


class Admission:
    """Counts the requests that were let in. All methods are called from one event loop.

    Args:
        limits: how many may wait.
        device: that they wait for.
        workers: of the device.
        estimate: of one segment, for how soon a refused request should come again.
        meter: is told what was refused.
    """

    def __init__(self, limits: Limits, device: DeviceQueue, workers: int, estimate: DurationEstimate, meter: Meter):
        self._limits, self._device, self._workers = limits, device, workers
        self._estimate, self._meter = estimate, meter
        self.is_open = True
        self._is_warming_up = False
        self._admitted = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn, for decoding or for the device."""
        return max(0, self._admitted - self._device.running)

    def begin_warm_up(self) -> None:
        """Refuse requests with `not_ready` from now on."""
        self.is_open, self._is_warming_up = False, True

    def end_warm_up(self) -> None:
        """Let requests in, if the server was not told to end in the meantime."""
        if self._is_warming_up:
            self.is_open, self._is_warming_up = True, False

    def close(self) -> None:
        """Let nothing in any more."""
        self.is_open = self._is_warming_up = False

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing that was let in is left; False if something was after the time-out."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Count a request in, or refuse it; whatever goes wrong within leaves as `internal`.

        Raises:
            ProtocolError: `not_ready`, `overloaded`; and what the request raises.
        """
        try:
            self._check()
            self._admitted += 1
            self._idle.clear()
            try:
                yield
            except ProtocolError:
                raise
            except Exception as error:  # a fault of this code, or of an image library, is answered too
                raise internal_error(error) from None
            finally:
                self._admitted -= 1
                if self._admitted == 0:
                    self._idle.set()
        except ProtocolError as error:
            self._meter.refused(error.code)
            raise

    def _check(self) -> None:
        if self._is_warming_up:
            raise ProtocolError("not_ready", "the server is warming up; send it again in a moment", retry_ms=1000)
        if not self.is_open:
            raise ProtocolError("overloaded", "the server is shutting down; connect again in a moment", retry_ms=2000)
        if self.waiting >= self._limits.max_queue:
            wait_s = self._estimate.seconds * self.waiting / self._workers
            raise ProtocolError(
                "overloaded", f"{self.waiting} requests are waiting", retry_ms=max(1, math.ceil(wait_s * 1e3))
            )
