"""What the session manager and the doors report while they work: the edge between serving and measuring.

`metrics.py` turns the reports into Prometheus metrics; a server without them reports to `NoMeter`. Reports are made on
the event loop and never block.
"""

from __future__ import annotations

from typing import Protocol

from worldvln_edge.protocol import StageTimes
from worldvln_edge.runtime.sessions.policy import ActionChunk


class Meter(Protocol):
    def segment(self, chunk: ActionChunk, seconds: float) -> None:
        """The policy emitted a segment, in that time on the device."""
        ...

    def answered(self, times: StageTimes, *, is_late: bool = False, hold: str | None = None) -> None:
        """A request with an observation was answered."""
        ...

    def refused(self, code: str) -> None:
        """A request was refused; `code` is a key of protocol.ERRORS."""
        ...

    def cut_off(self, door: str) -> None:
        """A client of that door was given up because it does not read."""
        ...


class NoMeter:
    """Hears everything and remembers nothing."""

    def segment(self, chunk: ActionChunk, seconds: float) -> None: ...

    def answered(self, times: StageTimes, *, is_late: bool = False, hold: str | None = None) -> None: ...

    def refused(self, code: str) -> None: ...

    def cut_off(self, door: str) -> None: ...
