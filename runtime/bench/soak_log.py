"""What a soak measures of every segment, in memory that is taken before the first one: the log must not grow itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Clock = Literal["processor", "wall"]


@dataclass(frozen=True, kw_only=True)
class SegmentSample:
    """One segment of a soak."""

    kind: str
    """Segments of one kind do the same work."""
    elapsed_s: float
    """Since the first segment of the warm-up began."""
    wall_ms: float
    processor_ms: float
    rss_bytes: int
    sessions: int
    """Started so far."""


class SoakLog:
    """The segments of a run, in order.

    Args:
        segments: as many as will be added.
    """

    def __init__(self, segments: int):
        self._numbers = np.full((segments, 5), -1.0)  # written once now, so that its pages are there
        self._kind = np.full(segments, -1, np.int32)
        self._kinds: dict[str, int] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, sample: SegmentSample) -> None:
        """Raises IndexError for more segments than there is room for."""
        self._numbers[self._length] = (
            sample.elapsed_s,
            sample.wall_ms,
            sample.processor_ms,
            sample.rss_bytes,
            sample.sessions,
        )
        self._kind[self._length] = self._kinds.setdefault(sample.kind, len(self._kinds))
        self._length += 1

    @property
    def elapsed_s(self) -> np.ndarray:
        """float64 [N], like all that follow."""
        return self._numbers[: self._length, 0]

    @property
    def wall_ms(self) -> np.ndarray:
        return self._numbers[: self._length, 1]

    @property
    def processor_ms(self) -> np.ndarray:
        return self._numbers[: self._length, 2]

    @property
    def rss_bytes(self) -> np.ndarray:
        return self._numbers[: self._length, 3]

    @property
    def sessions(self) -> np.ndarray:
        return self._numbers[: self._length, 4]

    def relative_ms(self, clock: Clock) -> np.ndarray:
        """Every segment's time over the median of its kind, so that another mix of segments is no trend."""
        times, kinds = self.processor_ms if clock == "processor" else self.wall_ms, self._kind[: self._length]
        relative = np.empty(self._length)
        for kind in self._kinds.values():
            relative[kinds == kind] = times[kinds == kind] / np.median(times[kinds == kind])
        return relative
