"""Flights in memory: what the trainers read, from the shards that `worldvln-edge sim flights` writes.

Legend: N flights, F frames (num_frames), H W pixels.
Source: spec/training.md 1, 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.poses import actions_to_deltas
from worldvln_edge.training.sim.shards import FlightDataError, list_shards, read_shard

_ARRAYS = ("frames", "actions", "instructions")


@dataclass(frozen=True, kw_only=True)
class FlightSet:
    """Recorded flights."""

    frames: np.ndarray  # uint8 [N, F, H, W, 3]
    deltas: np.ndarray  # float32 [N, F-1, 6], labels in rad and m
    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, rows: np.ndarray) -> FlightSet:
        return FlightSet(
            frames=self.frames[rows],
            deltas=self.deltas[rows],
            instructions=tuple(self.instructions[i] for i in rows),
        )

    def label_stats(self) -> LabelStats:
        """Mean and population deviation of the labels, deviation at least 1e-6 (spec/training.md 4.1)."""
        rows = self.deltas.reshape(-1, 6).astype(np.float64)
        mean, std = rows.mean(0), np.maximum(rows.std(0), 1e-6)
        return LabelStats(
            mean_angles=tuple(mean[:3]), std_angles=tuple(std[:3]), mean_t=tuple(mean[3:]), std_t=tuple(std[3:])
        )


def load_flights(folder: Path, *, num_frames: int, image_hw: tuple[int, int], limit: int | None = None) -> FlightSet:
    """Read all shards of a folder, in name order.

    Args:
        folder: holds `*.npz` shards.
        num_frames, image_hw: what the preset needs; a shard of another size is refused.
        limit: stop after that many flights.

    Raises:
        FlightDataError: no shards, a run that is not whole or mixed with another, a broken shard, or frames of another
            size or count.
    """
    shards = list_shards(folder)
    parts: dict[str, list] = {name: [] for name in _ARRAYS}
    total = 0
    for shard in shards:
        part = read_shard(shard, _ARRAYS)
        expected = (num_frames, *image_hw, 3)
        if part["frames"].shape[1:] != expected:
            raise FlightDataError(f"{shard}: frames {part['frames'].shape[1:]}, the preset needs {expected}")
        for name, values in part.items():
            parts[name].append(values)
        total += len(part["frames"])
        if limit is not None and total >= limit:
            break
    actions = np.concatenate(parts["actions"])[:limit]
    return FlightSet(
        frames=np.concatenate(parts["frames"])[:limit],
        deltas=actions_to_deltas(actions),
        instructions=tuple(str(s) for s in np.concatenate(parts["instructions"])[:limit]),
    )
