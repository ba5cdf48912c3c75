"""Flights as every stage of training sees them, wherever they are stored.

Legend: F frames of a flight (4k+1, may differ between rows), H W pixels of the preset.
Source: spec/training.md 1.1-1.3, 1.6, 4.1.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch


class FlightSource(Protocol):
    """Rows of frames, instruction and (where recorded) motion."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """Names the content of the row's frames: equal keys, equal frames (for caches, spec/training.md 1.4)."""

    def name(self, row: int) -> str:
        """File and row, for messages."""

    def frame_count(self, row: int) -> int:
        """F, without decoding."""

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3] at the preset's size."""

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        """The instruction without the prompt tag; with a generator, drawn where a row offers a choice."""

    def deltas(self, row: int) -> np.ndarray | None:
        """float32 [F-1, 6] labels `[dyaw, dpitch, droll, tx, ty, tz]` in rad and m; None where not recorded."""
