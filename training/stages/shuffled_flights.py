"""The control of an action head: flights whose frames lost their order, so that nothing can be known of their motion.

Source: spec/training.md 8.4 (row `action`, control).
"""

from __future__ import annotations

import numpy as np
import torch

from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.trainer.stage import row_generator


def shuffled_frames(row: int, frames: int) -> torch.Tensor:
    """The order of frames in which a held-out row is shown for the control; the same in every validation."""
    return torch.randperm(frames, generator=row_generator(0, 0, row))


class ShuffledFlights:
    """Flights with their frames in a random order, and all else as it was: a `FlightSource`.

    Latents that were recorded with a flight are of its own order; here frames are encoded.
    """

    def __init__(self, flights: FlightSource):
        self._flights = flights

    def __len__(self) -> int:
        return len(self._flights)

    def key(self, row: int) -> str:
        return f"shuffled {row} {self._flights.key(row)}"

    def name(self, row: int) -> str:
        return self._flights.name(row)

    def frame_count(self, row: int) -> int:
        return self._flights.frame_count(row)

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3]."""
        frames = self._flights.frames(row)
        return frames[shuffled_frames(row, len(frames)).numpy()]

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self._flights.instruction(row, generator)

    def deltas(self, row: int) -> np.ndarray | None:
        """float32 [F-1, 6], of the frames in their own order."""
        return self._flights.deltas(row)
