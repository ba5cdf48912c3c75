"""Shards of flights: the file format that the simulator writes and the trainers read.

A folder holds one run of `worldvln-edge sim flights`. Its `flights.json` says which: count, split, flights of a shard,
frame size, dynamics and disturbance; the seed of every flight follows from the split and its index. A shard is called
`flights-FIRST-COUNT.npz` and is an uncompressed `.npz` without pickle:

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

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

SETTINGS_FILE = "flights.json"
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


class _Run(msgspec.Struct, frozen=True):
    """What a loader needs of `flights.json`."""

    shard_flights: Annotated[int, msgspec.Meta(ge=1)]
    count: Annotated[int, msgspec.Meta(ge=1)] | None = None  # folders of format 1 do not say it


def shard_sizes(count: int, shard_flights: int) -> dict[str, tuple[int, int]]:
    """Shards of a run of `count` flights, in order: file name -> (index of its first flight, flights in it)."""
    firsts = range(0, count, shard_flights)
    sizes = [(first, min(shard_flights, count - first)) for first in firsts]
    return {f"flights-{first:07d}-{size:04d}.npz": (first, size) for first, size in sizes}


def list_shards(folder: str | Path) -> list[Path]:
    """Shards of a folder, in name order.

    A folder without `flights.json` may hold any shards; one with it must hold exactly those of its run.

    Raises:
        FlightDataError: no shards, some of the run are missing, or some are not of the run.
    """
    folder = Path(folder)
    shards = present_shards(folder)
    if not shards:
        raise FlightDataError(f"{folder} holds no flight shards (*.npz); make some with `worldvln-edge sim flights`")
    settings = folder / SETTINGS_FILE
    if settings.is_file():
        try:
            run = msgspec.json.decode(settings.read_bytes(), type=_Run)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise FlightDataError(f"{settings}: not the settings of a run ({error}); use another folder") from error
        _check_whole(folder, [path.name for path in shards], run)
    return shards


def present_shards(folder: Path) -> list[Path]:
    """Finished shards of a folder, in name order; half-written ones have hidden names."""
    return sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))


def refuse_foreign_shards(folder: Path, present: Iterable[str], expected: Iterable[str]) -> None:
    """Raise FlightDataError when a folder holds shards that its run does not have."""
    foreign = sorted(set(present) - set(expected))
    if foreign:
        raise FlightDataError(
            f"{folder}: {foreign[0]} ({len(foreign)} such) is not of the run that {SETTINGS_FILE} describes; "
            "move it away, or generate into another folder"
        )


def fingerprint_shards(shards: Sequence[Path]) -> str:
    """sha256 of what shards hold, without reading the frames.

    It covers every shard's name, and of every array in it the name, the size and the CRC-32 that the zip directory
    states; numpy checks those CRCs whenever it reads an array.

    Raises:
        FlightDataError: a file is no shard.
    """
    content = []
    for path in shards:
        try:
            with zipfile.ZipFile(path) as archive:
                content.append([path.name, [[e.filename, e.file_size, e.CRC] for e in archive.infolist()]])
        except (OSError, zipfile.BadZipFile) as error:
            raise _broken(path, error) from error
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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
        raise _broken(path, error) from error


def _check_whole(folder: Path, names: list[str], run: _Run) -> None:
    count = run.count
    if count is None:  # as far as the last shard reaches
        found = re.fullmatch(r"flights-(\d+)-(\d+)\.npz", names[-1])
        count = int(found[1]) + int(found[2]) if found else 0
    expected = shard_sizes(count, run.shard_flights)
    refuse_foreign_shards(folder, names, expected)
    missing = [name for name in expected if name not in names]
    if missing:
        raise FlightDataError(
            f"{folder} holds {len(names)} of {len(expected)} shards, {missing[0]} is missing; "
            "finish the run: give `worldvln-edge sim flights` the same options again"
        )


def _broken(path: str | Path, error: Exception) -> FlightDataError:
    return FlightDataError(f"{path}: broken shard ({error}); delete it and generate again")
