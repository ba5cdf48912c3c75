"""Shards of flights: the file format that the simulator writes and the trainers read.

A shard is an uncompressed `.npz` without pickle:

    frames        uint8    [N, 49, H, W, 3]  RGB
    actions       float32  [N, 48, 6]        achieved motion, cm and deg, order poses.ACTION_ORDER
    poses         float32  [N, 49, 6]        achieved poses, cm and deg
    instructions  str      [N]
    kinds         str      [N]
    magnitudes    float32  [N, 2]            numbers in the text, m before deg; NaN where there are fewer
    landmarks     str      [N]               name, or "" for a motion task
    task_indices  int64    [N]               index in the split: generate_task(split, index)
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SHARD_KEYS = (
    "frames",
    "actions",
    "poses",
    "instructions",
    "kinds",
    "magnitudes",
    "landmarks",
    "task_indices",
)


class FlightDataError(ValueError):
    """Flight data that cannot be used. The message says which file and what to do."""


def list_shards(folder: str | Path) -> list[Path]:
    """Shards of a folder, in name order. Raises FlightDataError when there are none."""
    shards = sorted(Path(folder).glob("*.npz"))
    if not shards:
        raise FlightDataError(f"{folder} holds no flight shards (*.npz); make some with `worldvln-edge sim flights`")
    return shards


def read_shard(path: str | Path, keys: Sequence[str] = SHARD_KEYS) -> dict[str, np.ndarray]:
    """Arrays of a shard; what is not asked for is not read.

    Raises:
        FlightDataError: not a shard of flights.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            lacking = [name for name in keys if name not in archive.files]
            if lacking:
                raise FlightDataError(f"{path}: lacks {', '.join(lacking)}; it was not written by `sim flights`")
            return {name: archive[name] for name in keys}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, FlightDataError):
            raise
        raise FlightDataError(f"{path}: broken shard ({error}); delete it and generate again") from error
