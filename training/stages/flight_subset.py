"""Some rows of a source as a source of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.stages.recorded_latents import recorded_latents


class FlightSubset:
    """The given rows of `source`, in the given order (a FlightSource)."""

    def __init__(self, source: FlightSource, rows: Sequence[int]):
        self._source, self._rows = source, list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        return self._source.key(self._rows[row])

    def name(self, row: int) -> str:
        return self._source.name(self._rows[row])

    def frame_count(self, row: int) -> int:
        return self._source.frame_count(self._rows[row])

    def frames(self, row: int) -> np.ndarray:
        return self._source.frames(self._rows[row])

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self._source.instruction(self._rows[row], generator)

    def deltas(self, row: int) -> np.ndarray | None:
        return self._source.deltas(self._rows[row])

    def latents(self, row: int) -> torch.Tensor | None:
        """See `recorded_latents.RecordsLatents`."""
        return recorded_latents(self._source, self._rows[row])


def first_flights(source: FlightSource, most: int | None) -> FlightSource:
    """The first `most` rows of a source, or all of them."""
    return source if most is None or most >= len(source) else FlightSubset(source, range(most))
