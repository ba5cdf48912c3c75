"""From camera messages to the model's frames, and what is wrong when there are none.

Four checks, each a diagnostic: who publishes, what the images are, how they are stamped, whether they come at all. As
long as one of them is in error the camera is not usable, no frame goes to the policy, and the drone holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from worldvln_edge.ros_bridge.diagnostics import Diagnostic, Level, error, ok
from worldvln_edge.ros_bridge.frame_clock import CHECK as STAMPS
from worldvln_edge.ros_bridge.frame_clock import FrameClock
from worldvln_edge.ros_bridge.image_decoding import (
    CompressedImage,
    ImageMessageError,
    RawImage,
    decode_message,
)

PUBLISHERS, IMAGES, RATE = "camera/publishers", "camera/images", "camera/rate"
ImageMessage = RawImage | CompressedImage


class CameraIntakeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    missing_after_s: float = 0.5
    """Without an image for so long, the camera counts as missing."""
    finding_s: float = 2.0
    """How long a wrong image, stamp or second publisher is reported."""

    def __post_init__(self) -> None:
        for name in ("missing_after_s", "finding_s"):
            if not 0 < getattr(self, name) < 60:
                raise ValueError(f"camera.{name} must be over 0 and below 60 s, found {getattr(self, name):g}")


@dataclass(frozen=True, kw_only=True)
class ModelFrame:
    """One frame for the model: uint8 RGB [H, W, 3], and the capture stamp in ns."""

    image_HW3: np.ndarray
    stamp_ns: int


class CameraIntake:
    """Checks every message, keeps it for the clock, decodes only what the clock chooses. Not thread-safe.

    Args:
        clock: whose slots say when a frame is due.
        started_s: monotonic time, from which on images are missed.
    """

    def __init__(self, clock: FrameClock[ImageMessage], started_s: float, config: CameraIntakeConfig | None = None):
        self.config = config or CameraIntakeConfig()
        self.clock = clock
        self._last_arrival_s = started_s
        self._has_image = False
        self._source_seen_s: dict[str, float] = {}
        self._size_hw: tuple[int, int] | None = None
        self._findings: dict[str, tuple[Diagnostic, float]] = {}

    def receive(self, message: ImageMessage, *, stamp_ns: int, source: str, now_s: float) -> None:
        """Take a message in.

        Args:
            stamp_ns: header.stamp.
            source: who published it: any name that differs from one publisher to the next.
            now_s: monotonic time of arrival.
        """
        self._last_arrival_s, self._has_image = now_s, True
        self._source_seen_s[source] = now_s
        self._source_seen_s = {name: self._source_seen_s[name] for name in self._sources(now_s)}
        if len(self._source_seen_s) > 1:
            return  # whose image it should be is not ours to guess
        try:
            message.check()
        except ImageMessageError as refusal:
            self._find(error(IMAGES, refusal.message, refusal.what_to_do), now_s)
            return
        if isinstance(message, RawImage) and not self._has_same_size((message.height, message.width), now_s):
            return
        finding = self.clock.push(stamp_ns, message)
        if finding is not None:
            self._find(finding, now_s)

    def take(self, now_s: float) -> list[ModelFrame]:
        """The frames that are due and decided, in order; none while the camera is not usable."""
        if not self.is_usable(now_s):
            return []
        frames = []
        for chosen in self.clock.take():
            try:
                image = decode_message(chosen.frame)
            except ImageMessageError as refusal:
                self._break_off(error(IMAGES, refusal.message, refusal.what_to_do), now_s)
                break
            if not self._has_same_size(image.shape[:2], now_s):
                self._break_off(self._findings[IMAGES][0], now_s)
                break
            frames.append(ModelFrame(image_HW3=image, stamp_ns=chosen.stamp_ns))
        return frames

    def restart(self) -> None:
        """A new flight: its frames may have another size, and stamps may start anew."""
        self.clock.restart()
        self._size_hw = None
        self._findings.clear()

    def is_usable(self, now_s: float) -> bool:
        """Whether no check is in error."""
        return all(check.level < Level.ERROR for check in self.diagnostics(now_s))

    def diagnostics(self, now_s: float) -> list[Diagnostic]:
        """The four checks, in fixed order."""
        return [
            self._check_publishers(now_s),
            self._check(IMAGES, now_s),
            self._check_stamps(now_s),
            self._check_rate(now_s),
        ]

    def _break_off(self, why: Diagnostic, now_s: float) -> None:
        """A frame that was due cannot be had, so the sequence has a hole."""
        self.clock.broken = why
        self._find(why, now_s)

    def _has_same_size(self, size_hw: tuple[int, ...], now_s: float) -> bool:
        height, width = size_hw
        if self._size_hw is None:
            self._size_hw = (height, width)
        if (height, width) == self._size_hw:
            return True
        was = f"{self._size_hw[1]}x{self._size_hw[0]}"
        self._find(
            error(IMAGES, f"image size changed from {was} to {width}x{height}", "keep one size for the whole flight"),
            now_s,
        )
        return False

    def _find(self, finding: Diagnostic, now_s: float) -> None:
        self._findings[finding.name] = (finding, now_s)

    def _check(self, name: str, now_s: float) -> Diagnostic:
        finding, found_s = self._findings.get(name, (None, 0.0))
        return finding if finding is not None and now_s - found_s <= self.config.finding_s else ok(name)

    def _check_stamps(self, now_s: float) -> Diagnostic:
        return self.clock.broken or self._check(STAMPS, now_s)

    def _sources(self, now_s: float) -> list[str]:
        return sorted(name for name, seen_s in self._source_seen_s.items() if now_s - seen_s <= self.config.finding_s)

    def _check_publishers(self, now_s: float) -> Diagnostic:
        sources = self._sources(now_s)
        if len(sources) < 2:
            return ok(PUBLISHERS)
        return error(
            PUBLISHERS,
            f"{len(sources)} publishers on the camera topic: {', '.join(sources)}",
            "stop all but one, or give each camera its own topic",
        )

    def _check_rate(self, now_s: float) -> Diagnostic:
        silent_s = now_s - self._last_arrival_s
        if silent_s <= self.config.missing_after_s:
            return ok(RATE)
        if not self._has_image:
            return error(RATE, f"no image came within {silent_s:.1f} s", "check the camera topic's name and its driver")
        return error(RATE, f"the last image came {silent_s:.1f} s ago", "check the camera and its link")
