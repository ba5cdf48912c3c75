"""Training flights at the size of a preset, and what tells them from others.

Source: spec/training.md 1, 1.6 (splits of a manifest), 4.7.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from worldvln_edge.config import ModelConfig
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.open_flights import ReadingOptions, kind_of_flights, open_flights
from worldvln_edge.training.sim.shards import FlightDataError, fingerprint_shards, list_shards

HELD_OUT_ITEMS = "items_val"


@dataclass(frozen=True, kw_only=True)
class TrainingFlights:
    source: FlightSource
    fingerprint: str
    """sha256 of the rows: of the simulator's shards their content, of other kinds files with size and date."""


def open_training_flights(path: Path, config: ModelConfig, options: ReadingOptions) -> TrainingFlights:
    """Open flights with frames of the preset's size, unless the options name another.

    Raises:
        FlightDataError: nothing usable is there, or it needs options.
    """
    if options.image_hw is None:
        options = msgspec.structs.replace(options, image_hw=config.image_hw)
    source = open_flights(path, options)
    if kind_of_flights(path) == "simulator":
        return TrainingFlights(source=source, fingerprint=fingerprint_shards(list_shards(path)))
    digest = hashlib.sha256()
    for row in range(len(source)):
        digest.update(json.dumps([source.key(row), source.instruction(row), source.frame_count(row)]).encode())
        digest.update(_motion_bytes(source, row))
    return TrainingFlights(source=source, fingerprint=digest.hexdigest())


def open_held_out_flights(
    path: Path | None, training: Path, config: ModelConfig, options: ReadingOptions
) -> TrainingFlights | None:
    """Open the flights of validation: those at `path`, or else the held-out split of a manifest that is trained on.

    Args:
        path: of any kind; of a manifest that has `items_val`, those are taken. May be the training manifest itself.
        training: path of the training flights.
        config, options: as for `open_training_flights`.

    Raises:
        FlightDataError: as `open_training_flights`, or the flights are those of training.
    """
    has_split = HELD_OUT_ITEMS in _splits(path or training)
    if path is None and not has_split:
        return None
    if not has_split and (path or training).resolve() == training.resolve():
        raise FlightDataError(
            f"{training}: flights that are trained on cannot be held out; give others, or a manifest with items_val"
        )
    if has_split:
        options = msgspec.structs.replace(options, items_key=HELD_OUT_ITEMS)
    return open_training_flights(path or training, config, options)


def _splits(path: Path) -> list[str]:
    """Lists of items of a manifest, none of another kind of flights."""
    if kind_of_flights(path) != "manifest":
        return []
    from worldvln_edge.training.data.action_manifest import list_splits

    return list_splits(path)


def _motion_bytes(source: FlightSource, row: int) -> bytes:
    """Motion of a row, or why it cannot be read: stages that need none train without, the others say it again."""
    try:
        motion = source.deltas(row)
    except FlightDataError as error:
        return str(error).encode()
    return b"" if motion is None else motion.tobytes()
