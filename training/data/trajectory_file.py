"""Trajectory files: recorded poses or motions with their layout and units written down.

    {"layout": "pose6", "units": {"length": "cm", "angle": "deg"}, "rows": [[x, y, z, roll, yaw, pitch], ...]}

| layout | rows | a flight of T frames has |
|---|---|---|
| pose6 | x, y, z, roll, yaw, pitch | T rows |
| delta6 | dyaw, dpitch, droll, tx, ty, tz, in the axes of the earlier frame | T-1 rows |
| delta4 | tx, ty, tz, dyaw | T-1 rows |

Older files are bare lists, or objects with the list under another key; what they hold is told by whoever reads them and
never guessed from the numbers.
Source: spec/training.md 1.6, 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from worldvln_edge.atomic import atomic_file
from worldvln_edge.rigid_motion import angles_of_rotations, deltas_of_poses, integrate_deltas
from worldvln_edge.training.sim.shards import FlightDataError

Layout = Literal["pose6", "delta6", "delta4"]
_COLUMNS: dict[str, int] = {"pose6": 6, "delta6": 6, "delta4": 4}
_OLD_KEYS = ("preprocessed_logs", "processed_logs", "traj", "poses", "logs")
_HOW = 'give "traj_layout" (pose6, delta6, delta4) and "traj_units" ({"length": "cm|m", "angle": "deg|rad"})'


class TrajectoryUnits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Units of a file's numbers."""

    length: Literal["cm", "m"]
    angle: Literal["deg", "rad"]


class _Declared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    layout: Layout
    units: TrajectoryUnits
    rows: list[list[float]]


@dataclass(frozen=True)
class Trajectory:
    """Motion of one flight, in m and rad."""

    layout: Layout
    rows: np.ndarray  # float64 [T, 6] poses, or [T-1, 6] deltas

    @property
    def frames(self) -> int:
        return len(self.rows) + (self.layout != "pose6")

    def poses(self) -> np.ndarray:
        """float64 [T, 6] [x, y, z, roll, yaw, pitch]; from zero where only motions were recorded."""
        if self.layout == "pose6":
            return self.rows
        positions, rotations = integrate_deltas(self.rows)
        return np.concatenate([positions, np.unwrap(angles_of_rotations(rotations), axis=0)], axis=1)

    def deltas(self, frames: Sequence[int] | None = None) -> np.ndarray:
        """Labels between neighbouring frames, or between the named ones (0-based): float32 [n-1, 6].

        Raises:
            IndexError: a frame that the trajectory does not have.
        """
        chosen = range(self.frames) if frames is None else frames
        if len(chosen) and max(chosen) >= self.frames:
            raise IndexError(f"frame {max(chosen)} has no pose, the trajectory covers {self.frames} frames")
        is_each_one = len(chosen) > 1 and all(b - a == 1 for a, b in pairwise(chosen))
        if self.layout != "pose6" and is_each_one:
            return self.rows[chosen[0] : chosen[-1]].astype(np.float32)
        poses = self.poses()[list(chosen)]
        return deltas_of_poses(poses[:, :3], poses[:, 3:])[1:].astype(np.float32)


def read_trajectory(path: Path, *, layout: Layout | None = None, units: TrajectoryUnits | None = None) -> Trajectory:
    """Read a trajectory file.

    Args:
        path: JSON file.
        layout, units: of an older file that does not say it; a file that says it may not be contradicted.

    Raises:
        FlightDataError: no such file, not JSON, nothing declared, contradicted, a row that is not numbers.
    """
    content = read_json(path)
    if isinstance(content, dict) and "layout" in content:
        try:
            declared = msgspec.convert(content, _Declared)
        except msgspec.ValidationError as error:
            raise FlightDataError(f"{path}: {error}") from error
        if (layout or declared.layout) != declared.layout or (units or declared.units) != declared.units:
            raise FlightDataError(
                f"{path}: says {_words(declared.layout, declared.units)}, but the manifest says "
                f"{_words(layout or declared.layout, units or declared.units)}; correct one of them"
            )
        rows = _numbers(declared.rows, path, declared.layout, is_exact=True)
        return trajectory_of_rows(rows, declared.layout, declared.units, path)
    found, rows_as_read = _old_rows(content, path)
    if found is not None:
        if layout not in (None, found):
            raise FlightDataError(f"{path}: holds action6, which is {found}, but the manifest says {layout}")
        layout, named = found, _units_of_names(content)
        if named is not None and units not in (None, named):
            raise FlightDataError(
                f"{path}: its columns are named in {named.length} and {named.angle}, but the manifest says "
                f"{units.length} and {units.angle}; correct one of them"
            )
        units = units or named
    if layout is None or units is None:
        raise FlightDataError(f"{path}: does not say its layout and units; {_HOW} in the manifest or the JSONL row")
    return trajectory_of_rows(_numbers(rows_as_read, path, layout, is_exact=False), layout, units, path)


def write_trajectory(path: Path, rows: np.ndarray, layout: Layout, units: TrajectoryUnits) -> None:
    """Write a trajectory file, whole or not at all.

    Args:
        path: file to write.
        rows: [T, 6], [T-1, 6] or [T-1, 4] numbers in `units`.
        layout, units: what they are.

    Raises:
        ValueError: rows that are not of the layout, or not finite.
        FlightDataError: the file cannot be written.
    """
    if rows.ndim != 2 or rows.shape[1] != _COLUMNS[layout] or not np.isfinite(rows).all():
        raise ValueError(f"{path}: {layout} needs finite rows of {_COLUMNS[layout]}, found {rows.shape}")
    content = {"layout": layout, "units": msgspec.to_builtins(units), "rows": rows.tolist()}
    try:
        with atomic_file(path) as building:
            building.write_bytes(msgspec.json.encode(content))
    except OSError as error:
        raise FlightDataError(f"{path}: cannot be written ({error.strerror}); nothing was left behind") from error


def trajectory_of_rows(rows: np.ndarray, layout: Layout, units: TrajectoryUnits, source: Path) -> Trajectory:
    """Numbers of a declared layout and units, from whatever holds them.

    Raises:
        FlightDataError: another number of columns; `source` is named.
    """
    if rows.ndim != 2 or rows.shape[1] != _COLUMNS[layout]:
        raise FlightDataError(f"{source}: {layout} has rows of {_COLUMNS[layout]} numbers, found {list(rows.shape)}")
    length = 0.01 if units.length == "cm" else 1.0
    angle = math.pi / 180 if units.angle == "deg" else 1.0
    if layout == "pose6":
        return Trajectory(layout, rows * np.array([length] * 3 + [angle] * 3))
    if layout == "delta4":
        turns = np.zeros((len(rows), 3))
        turns[:, 0] = rows[:, 3]
        rows = np.concatenate([turns, rows[:, :3]], axis=1)
    return Trajectory(layout, rows * np.array([angle] * 3 + [length] * 3))


def _old_rows(content: Any, path: Path) -> tuple[Layout | None, Any]:
    """The list of an older file, and its layout where its key tells it."""
    if isinstance(content, list):
        return None, content
    if isinstance(content, dict):
        if isinstance(content.get("action6"), list):
            return "delta6", content["action6"]
        for key in _OLD_KEYS:
            if isinstance(content.get(key), list):
                return None, content[key]
    raise FlightDataError(
        f"{path}: no trajectory in it; wanted {{layout, units, rows}}, a list, or a list under "
        f"{', '.join((*_OLD_KEYS, 'action6'))}"
    )


def _units_of_names(content: dict[str, Any]) -> TrajectoryUnits | None:
    """Units that `meta.action6_layout` writes behind every column's name (`dz_rad, ..., tx_m, ...`)."""
    meta = content.get("meta")
    names = meta.get("action6_layout") if isinstance(meta, dict) else None
    if isinstance(names, str):
        names = [name.strip() for name in names.strip("[] ").split(",")]
    if not (isinstance(names, list) and len(names) == 6 and all(isinstance(name, str) for name in names)):
        return None
    endings = [name.rpartition("_")[2].strip("'\" ") for name in names]
    angles, lengths = set(endings[:3]), set(endings[3:])
    if len(angles) == 1 and len(lengths) == 1 and angles <= {"deg", "rad"} and lengths <= {"cm", "m"}:
        return TrajectoryUnits(length=lengths.pop(), angle=angles.pop())
    return None


def _numbers(rows: Any, path: Path, layout: Layout, *, is_exact: bool) -> np.ndarray:
    columns = _COLUMNS[layout]
    result = np.empty((len(rows), columns))
    for i, row in enumerate(rows):
        is_long_enough = isinstance(row, list) and (len(row) == columns or (not is_exact and len(row) > columns))
        if not is_long_enough or not all(_is_number(value) for value in row[:columns]):
            raise FlightDataError(f"{path}: row {i} must be {columns} finite numbers ({layout}), found {str(row)[:80]}")
        result[i] = row[:columns]
    if layout == "pose6" and not len(result):
        raise FlightDataError(f"{path}: holds no poses")
    return result


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # JSON integers may be too long for a float
    return isinstance(value, float) and math.isfinite(value)


def _words(layout: str, units: TrajectoryUnits) -> str:
    return f"{layout} in {units.length} and {units.angle}"


def read_json(path: Path) -> Any:
    """Decoded JSON. Raises FlightDataError that names the file."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise FlightDataError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FlightDataError(f"{path}: not JSON ({error})") from error
