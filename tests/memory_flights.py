"""A `FlightSource` of a few flights in memory, for tests of training stages."""

import hashlib

import numpy as np
import torch
from small_models import random_frames

from worldvln_edge.config import ModelConfig

INSTRUCTIONS = ("fly forward 5 m .", "turn left", "climb", "fly back", "turn right")


class MemoryFlights:
    """Flights over smooth moving pictures, lit from the right where the next step goes forward; pitch and roll stay.

    Args:
        config: size of the frames.
        frame_counts: F of every row.
        seed: of frames and motions.
        has_motion: False leaves the motions out.
    """

    def __init__(self, config: ModelConfig, frame_counts: tuple[int, ...], *, seed: int = 0, has_motion: bool = True):
        rng = np.random.default_rng(seed)
        self._frames: list[np.ndarray] = []
        self.motions: list[np.ndarray | None] = []
        for row, count in enumerate(frame_counts):
            deltas = rng.normal(0, 0.1, (count - 1, 6)).astype(np.float32)
            deltas[:, 1:3] = 0
            deltas[:, 3] = rng.choice([-0.1, 0.1], count - 1)
            pictures = np.stack(random_frames(config, count, seed=100 * seed + row)) // 4
            light = 800 * np.append(deltas[:, 3], 0)[:, None] * np.linspace(-1, 1, config.image_hw[1])
            self._frames.append(np.clip(pictures + 96 + light[:, None, :, None], 0, 255).astype(np.uint8))
            self.motions.append(deltas if has_motion else None)

    def __len__(self) -> int:
        return len(self._frames)

    def key(self, row: int) -> str:
        return hashlib.sha256(self._frames[row].tobytes()).hexdigest()

    def name(self, row: int) -> str:
        return f"memory row {row}"

    def frame_count(self, row: int) -> int:
        return len(self._frames[row])

    def frames(self, row: int) -> np.ndarray:
        return self._frames[row]

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return INSTRUCTIONS[row % len(INSTRUCTIONS)]

    def deltas(self, row: int) -> np.ndarray | None:
        return self.motions[row]
