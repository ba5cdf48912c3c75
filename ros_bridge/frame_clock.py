"""The model's frame clock: which camera frame belongs to which moment, by the stamps of capture.

The model reads one frame for every action (16 a second in flight). A moment at which a frame is due is a slot; the
frame whose stamp lies nearest to it is taken, whenever it arrived. What arrives late, doubled or out of order is
dropped. When no frame lies near a slot, or stamps jump, the sequence is broken, and stays so until `restart`: a model
must not be shown a motion that did not happen.

Times are nanoseconds of the clock that stamps the images (ROS time).
Source: spec/session_protocol.md 1 (frames and actions), 7.4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from worldvln_edge.ros_bridge.diagnostics import Diagnostic, error, warning

CHECK = "camera/stamps"
Frame = TypeVar("Frame")
_NS = 1_000_000_000


class FrameClockConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_skew_s: float = 0.04
    """How far a frame may lie from its slot."""
    jump_back_s: float = 0.5
    """A stamp that lies further back is no reordering, but another clock."""
    memory_s: float = 1.0
    """How long frames are kept for slots that become known after the frame."""

    def __post_init__(self) -> None:
        for name in ("max_skew_s", "jump_back_s", "memory_s"):
            if not 0 < getattr(self, name) < 60:
                raise ValueError(f"frame_clock.{name} must be over 0 and below 60 s, found {getattr(self, name):g}")


@dataclass(frozen=True)
class ChosenFrame(Generic[Frame]):
    slot_ns: int
    stamp_ns: int
    frame: Frame


class FrameClock(Generic[Frame]):
    """Frames in, the frames of the slots out; `Frame` is whatever the caller keeps for one. Not thread-safe."""

    def __init__(self, config: FrameClockConfig | None = None):
        self.config = config or FrameClockConfig()
        self._stamps: list[int] = []
        self._frames: list[Frame] = []
        self._slots: deque[int] = deque()
        self._last_slot_ns: int | None = None
        self.broken: Diagnostic | None = None
        """Why no frame is chosen any more; None as long as the sequence is whole."""

    def restart(self) -> None:
        """Forget frames and slots, and begin with the next frame."""
        self._stamps.clear()
        self._frames.clear()
        self._slots.clear()
        self._last_slot_ns, self.broken = None, None

    @property
    def newest_stamp_ns(self) -> int | None:
        return self._stamps[-1] if self._stamps else None

    @property
    def last_slot_ns(self) -> int:
        """The latest moment at which a frame was or is due; 0 if there is none."""
        return self._last_slot_ns or 0

    def expect(self, slot_ns: int) -> None:
        """A frame is due at `slot_ns`. Raises ValueError: not later than the slot before."""
        if self._last_slot_ns is not None and slot_ns <= self._last_slot_ns:
            raise ValueError(f"slot {slot_ns} ns is not behind the last one, {self._last_slot_ns} ns")
        self._last_slot_ns = slot_ns
        self._slots.append(slot_ns)

    def expect_run(self, first_ns: int, count: int, fps: float) -> None:
        """`count` slots from `first_ns` on, `fps` a second. Raises ValueError as `expect`."""
        for index in range(count):
            self.expect(first_ns + round(index * _NS / fps))

    def push(self, stamp_ns: int, frame: Frame) -> Diagnostic | None:
        """Take a frame in; says what is wrong with its stamp, if anything is. The frame is dropped then."""
        if stamp_ns <= 0:
            return error(CHECK, "an image has no capture time (stamp 0)", "have the camera driver set header.stamp")
        newest = self.newest_stamp_ns
        if newest is not None and stamp_ns <= newest:
            back_s = (newest - stamp_ns) / _NS
            if back_s > self.config.jump_back_s:
                self.broken = error(
                    CHECK,
                    f"capture times jumped back by {back_s:.3f} s",
                    "let one clock stamp all images; the flight starts anew from the next frame",
                )
                return self.broken
            if back_s == 0:
                return warning(CHECK, "two images have the same capture time", "publish every image once")
            return warning(CHECK, f"an image came {back_s:.3f} s late", "look for a slow or lossy link to the camera")
        self._stamps.append(stamp_ns)
        self._frames.append(frame)
        self._forget_old()
        return None

    def take(self) -> list[ChosenFrame[Frame]]:
        """The frames of all slots that are decided by now, in order; each is given once."""
        chosen: list[ChosenFrame[Frame]] = []
        while self._slots and self.broken is None and self._stamps and self._stamps[-1] >= self._slots[0]:
            slot_ns = self._slots[0]
            after = bisect_left(self._stamps, slot_ns)
            index = after
            if after > 0 and slot_ns - self._stamps[after - 1] <= self._stamps[after] - slot_ns:
                index = after - 1
            skew_s = abs(self._stamps[index] - slot_ns) / _NS
            if skew_s > self.config.max_skew_s:
                self.broken = error(
                    CHECK,
                    f"no image within {self.config.max_skew_s:g} s of a frame that was due; the nearest lies "
                    f"{skew_s:.3f} s away",
                    "raise the camera's rate above the model's, or frame_clock.max_skew_s",
                )
                break
            chosen.append(ChosenFrame(slot_ns, self._stamps[index], self._frames[index]))
            self._slots.popleft()
        return chosen

    def _forget_old(self) -> None:
        """Frames that no slot can ask for any more; the one in front of the oldest waiting slot is kept."""
        oldest_ns = self._stamps[-1] - round(self.config.memory_s * _NS)
        if self._slots:
            oldest_ns = min(oldest_ns, self._slots[0] - round(self.config.max_skew_s * _NS))
        keep = bisect_left(self._stamps, oldest_ns)
        del self._stamps[:keep], self._frames[:keep]
