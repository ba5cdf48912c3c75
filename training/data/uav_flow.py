"""UAV-Flow's parquet files to video shards.

A parquet row is one picture: `id` of the flight, `frame_idx`, `image` (encoded, or {"bytes": ...}) and `log`, JSON with
`instruction_unified` or `instruction`, and poses under `preprocessed_logs` or `raw_logs`. Real flights were logged in
m, simulated ones in cm; the file does not say which, so the caller does. Angles are in deg.
Source: spec/training.md 1.1; spec/session_protocol.md 4.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from worldvln_edge.images import ImageError, decode_image
from worldvln_edge.training.data.flight_folder_writer import new_flight_folder
from worldvln_edge.training.data.frame_selection import longest_clip
from worldvln_edge.training.data.parquet_file import opened_parquet
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.data.trajectory_file import TrajectoryUnits
from worldvln_edge.training.sim.shards import FlightDataError

FPS = 16
MAX_FRAMES = 49
_COLUMNS = ("id", "frame_idx", "image", "log")
_PROMPTS = ("instruction_unified", "instruction")
_POSES = ("preprocessed_logs", "raw_logs")
_Place = tuple[Path, int, int]  # file, row group, row in it


def list_parquet(root: Path) -> list[Path]:
    """The file itself, or all parquet files below a folder, in name order."""
    return [root] if root.is_file() else sorted(root.rglob("*.parquet"))


def convert_uav_flow(
    root: Path, out: Path, *, length_unit: Literal["cm", "m"], show_progress: bool = True
) -> list[RowProblem]:
    """Convert UAV-Flow parquet files.

    Args:
        root: a parquet file, or a folder of them; a flight's rows may be spread over several.
        out: folder to write (see flight_folder_writer).
        length_unit: of the logged poses.
        show_progress: a bar on stderr.

    Returns:
        Flights that were left out, and why.

    Raises:
        FlightDataError: no parquet files, not UAV-Flow's columns, no usable flight, or the disk is full.
        FolderInUseError: `out` holds something.
    """
    places = _flights(root)
    problems: list[RowProblem] = []
    reader = _RowReader()
    with new_flight_folder(out, fps=FPS) as flights:
        for flight, rows in tqdm(places.items(), unit="flight", disable=not show_progress):
            where = f"{rows[0][1][0]}: flight {flight}"
            try:
                frames, caption, poses = _read_flight(reader, _in_order(rows))
            except FlightDataError as error:
                problems.append(RowProblem(where, str(error)))
                continue
            units = TrajectoryUnits(length=length_unit, angle="deg")
            shown = spread_frames(len(frames))
            flights.add(
                frames,
                caption,
                frame_idxs=shown,
                trajectory=None if poses is None else (poses, "pose6", units),
            )
    return problems


def check_uav_flow(root: Path, *, show_progress: bool = True) -> tuple[int, list[RowProblem]]:
    """Read every flight as a conversion would; returns how many there are, and what is wrong with some.

    Raises:
        FlightDataError: no parquet files, or not UAV-Flow's columns.
    """
    places, reader = _flights(root), _RowReader()
    problems: list[RowProblem] = []
    for flight, rows in tqdm(places.items(), unit="flight", disable=not show_progress):
        try:
            _read_flight(reader, _in_order(rows))
        except FlightDataError as error:
            problems.append(RowProblem(f"{rows[0][1][0]}: flight {flight}", str(error)))
    return len(places), problems


def spread_frames(frames: int) -> list[int]:
    """49 frames spread over a longer flight, the largest 4k+1 of a shorter one (spec/training.md 1.1)."""
    if frames > MAX_FRAMES:
        return [i * (frames - 1) // (MAX_FRAMES - 1) for i in range(MAX_FRAMES)]
    return list(range(longest_clip(frames)))


def _flights(root: Path) -> dict[str, list[tuple[int, _Place]]]:
    """Rows of every flight: (frame_idx, place), flights in the order in which they first come."""
    files = list_parquet(root)
    if not files:
        raise FlightDataError(f"{root}: no parquet files")
    flights: dict[str, list[tuple[int, _Place]]] = defaultdict(list)
    for path in files:
        with opened_parquet(path, _COLUMNS) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["id", "frame_idx"])
                for i, (flight, frame) in enumerate(_pairs(table)):
                    if flight is None or frame is None:
                        raise FlightDataError(f"{path}: row {i} of group {group} has no id or frame_idx")
                    number = _frame_number(frame, f"{path}: row {i} of group {group}")
                    flights[str(flight)].append((number, (path, group, i)))
    return flights


def _frame_number(value: Any, where: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise FlightDataError(f"{where}: frame_idx {str(value)[:40]!r} is no number") from error


def _in_order(rows: list[tuple[int, _Place]]) -> list[_Place]:
    """Places by frame number. Raises FlightDataError where a number comes twice, as in files that were copied."""
    ordered = sorted(rows)
    for (number, first), (again, second) in pairwise(ordered):
        if number == again:
            raise FlightDataError(f"frame_idx {number} comes twice, in {first[0].name} and {second[0].name}")
    return [place for _, place in ordered]


def _pairs(table: pa.Table) -> Iterator[tuple[Any, Any]]:
    return zip(table["id"].to_pylist(), table["frame_idx"].to_pylist(), strict=True)


class _RowReader:
    """Pictures and logs by place; the row group that was read last is kept, as a flight's rows lie together."""

    def __init__(self) -> None:
        self._group: tuple[Path, int] | None = None
        self._table: pa.Table | None = None

    def read(self, place: _Place) -> tuple[Any, Any]:
        path, group, row = place
        if self._group != (path, group) or self._table is None:
            with opened_parquet(path, _COLUMNS) as file:
                self._table = file.read_row_group(group, columns=["image", "log"])
            self._group = (path, group)
        return self._table["image"][row].as_py(), self._table["log"][row].as_py()


def _read_flight(reader: _RowReader, places: list[_Place]) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Frames uint8 [F, H, W, 3], the instruction and poses [F, 6], None where none were logged."""
    frames: list[np.ndarray] = []
    caption, poses = "", None
    for path, group, row in places:
        image, log = reader.read((path, group, row))
        where = f"{path}, row group {group}, row {row}"
        frames.append(_picture(image, where))
        if frames[-1].shape != frames[0].shape:
            raise FlightDataError(f"{where}: picture of another size than the flight's first")
        if not caption and log:
            content = _log(log, where)
            caption = next((t.strip() for t in map(content.get, _PROMPTS) if isinstance(t, str) and t.strip()), "")
            poses = poses if poses is not None else _poses(content, len(places), where)
    if not caption:
        raise FlightDataError(f"no text in {' or '.join(_PROMPTS)} of the log")
    return np.stack(frames), caption, poses


def _picture(image: Any, where: str) -> np.ndarray:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise FlightDataError(f"{where}: no picture in `image`")
    try:
        return decode_image(data)
    except ImageError as error:
        raise FlightDataError(f"{where}: {error}") from error


def _log(log: Any, where: str) -> dict[str, Any]:
    try:
        content = msgspec.json.decode(log) if isinstance(log, str | bytes) else log
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FlightDataError(f"{where}: `log` is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise FlightDataError(f"{where}: `log` is not a JSON object")
    return content


def _poses(log: dict[str, Any], frames: int, where: str) -> np.ndarray | None:
    rows = next((log[key] for key in _POSES if isinstance(log.get(key), list) and log[key]), None)
    if rows is None:
        return None
    try:
        poses = np.array([row[:6] for row in rows], np.float64)
    except (TypeError, ValueError, LookupError) as error:
        raise FlightDataError(f"{where}: logged poses are not rows of numbers") from error
    if poses.shape != (frames, 6) or not np.isfinite(poses).all():
        raise FlightDataError(f"{where}: {len(rows)} poses of 6 finite numbers for {frames} pictures are wanted")
    return poses
