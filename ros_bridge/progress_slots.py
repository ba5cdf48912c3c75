"""When the frames of a flown chunk are due: whenever another action has been consumed.

The model was trained on one frame for every action. The drone may fly slower than that (it brakes, limits act), so
frames are due by what was flown, as the setpoint process reports it, and at full speed that is the model's frame rate.

Times are nanoseconds; those of reports are monotonic, those of slots are on the clock that stamps images.
"""

from __future__ import annotations

from collections.abc import Callable

from worldvln_edge.ros_bridge.setpoints.policy_link import Progress

_LEAST_NS = 1_000_000
"""Between two slots, when one report crosses several actions."""


class ProgressSlots:
    """Slots of one chunk: one for each action.

    Args:
        chunk: its number.
        actions: how many it has.
        after_ns: slots lie behind this one, of the chunk before.
        begun_ns: monotonic time at which the drone was at its start, that is, of its last frame.
        expect: is told every slot, in order (`FrameClock.expect`).
        to_stamp_ns: monotonic time -> time on the clock of the images.
    """

    def __init__(
        self,
        chunk: int,
        actions: int,
        *,
        after_ns: int,
        begun_ns: int,
        expect: Callable[[int], None],
        to_stamp_ns: Callable[[int], int],
    ):
        self.chunk, self.actions = chunk, actions
        self.known = 0
        """Slots that were told."""
        self._expect, self._to_stamp_ns = expect, to_stamp_ns
        self._last_ns, self._last_progress = begun_ns, 0.0
        self._last_slot_ns = max(to_stamp_ns(begun_ns), after_ns)

    @property
    def is_complete(self) -> bool:
        return self.known == self.actions

    def add(self, report: Progress) -> None:
        """Take a report in; those of other chunks are ignored."""
        if report.chunk != self.chunk or report.at_ns <= self._last_ns or report.progress < self._last_progress:
            return
        while not self.is_complete and self.known + 1 <= report.progress + 1e-9:
            share = (self.known + 1 - self._last_progress) / max(report.progress - self._last_progress, 1e-9)
            crossed_ns = self._last_ns + round(min(share, 1.0) * (report.at_ns - self._last_ns))
            self._last_slot_ns = max(self._to_stamp_ns(crossed_ns), self._last_slot_ns + _LEAST_NS)
            self._expect(self._last_slot_ns)
            self.known += 1
        self._last_ns, self._last_progress = report.at_ns, report.progress
