"""What parts of a flight took lately on this machine: how long a request that comes now would have to wait.

Source: spec/session_protocol.md 7.5.
"""

from __future__ import annotations

from worldvln_edge.runtime.sessions.device_queue import DurationEstimate


class FlightTimes:
    """Of all flights of a policy; seconds everywhere, 0 until something was measured."""

    def __init__(self) -> None:
        self._frame, self._segment, self._guess = DurationEstimate(), DurationEstimate(), DurationEstimate()

    def add_frames(self, count: int, seconds: float) -> None:
        """Frames were taken, encoded and decoded in that time."""
        self._frame.add(seconds / count)

    def add_segment(self, seconds: float) -> None:
        """A segment was generated while its client waited, from encoded frames to actions."""
        self._segment.add(seconds)

    def add_guess(self, seconds: float) -> None:
        """A segment that was there already was compared with the frames and taken."""
        self._guess.add(seconds)

    def frames_s(self, count: int) -> float:
        """To take that many frames."""
        return count * self._frame.seconds

    @property
    def segment_s(self) -> float:
        """To generate a segment."""
        return self._segment.seconds

    @property
    def guess_s(self) -> float:
        """To take a segment that is there already."""
        return self._guess.seconds
