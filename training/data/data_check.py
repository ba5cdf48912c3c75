"""What is wrong with a dataset, row by row: every row is read as training would read it.

Checked: rows that are left out (fields, captions, lengths), frames that do not decode, motion that is missing in some
rows, not finite or impossible for a drone (wrong units, mostly), and time stamps that do not follow the frame rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.frame_selection import is_clip_length
from worldvln_edge.training.data.lerobot_reader import LeRobotFlights
from worldvln_edge.training.data.open_flights import (
    ReadFlights,
    ReadingOptions,
    kind_of_flights,
    open_flights,
)
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.data.simulator_flights import SimulatorFlights
from worldvln_edge.training.data.uav_flow import check_uav_flow
from worldvln_edge.training.data.video_file import read_video_index
from worldvln_edge.training.data.video_shards import VideoShards
from worldvln_edge.training.sim.shards import FlightDataError

_RATE_TOLERANCE = 0.05
_STAMP_TOLERANCE = 0.25  # of the time between two frames


class MotionLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a drone can do between two frames of a row."""

    max_step_m: float = 2.0
    max_turn_deg: float = 45.0
    min_path_m: float = 0.3
    """Nine flights of ten are shorter than this: the dataset's lengths are probably m that were declared cm."""


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a check."""

    path: str
    kind: str
    rows: int
    """Usable rows, those with problems included."""
    problems: tuple[RowProblem, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Problems of every kind."""
        kinds = [problem.kind for problem in self.problems]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def check_dataset(
    path: Path,
    options: ReadingOptions | None = None,
    limits: MotionLimits | None = None,
    *,
    show_progress: bool = True,
) -> CheckReport:
    """Read every row of a dataset and report what is wrong.

    Args:
        path: as for `open_flights`; UAV-Flow's parquet files too.
        options: how it is read.
        limits: what motion is believed.
        show_progress: a bar on stderr.

    Raises:
        FlightDataError: there is no dataset. A dataset that cannot be opened is a problem of its folder.
    """
    limits = limits or MotionLimits()
    kind = kind_of_flights(path)
    if kind == "uav-flow":
        rows, found = check_uav_flow(path, show_progress=show_progress)
        return CheckReport(path=str(path), kind=kind, rows=rows, problems=tuple(found))
    try:
        source = open_flights(path, options)
    except FlightDataError as error:
        problem = RowProblem(str(path), str(error), "folder")
        return CheckReport(path=str(path), kind=kind, rows=0, problems=(problem,))
    damaged = source.broken_shards() if isinstance(source, SimulatorFlights) else []
    problems = [*source.skipped, *damaged, *check_rows(source, limits, show_progress=show_progress)]
    return CheckReport(path=str(path), kind=kind, rows=len(source), problems=tuple(problems))


def check_rows(source: ReadFlights, limits: MotionLimits, *, show_progress: bool = False) -> list[RowProblem]:
    """Problems of the usable rows, in their order; those of the whole come last."""
    problems: list[RowProblem] = []
    paths: list[float] = []
    without_motion: list[int] = []
    for row in tqdm(range(len(source)), unit="row", disable=not show_progress):
        name = source.name(row)
        problems += [RowProblem(name, *found) for found in _frame_problems(source, row)]
        problems += [RowProblem(name, reason, "stamps") for reason in _stamp_problems(source, row)]
        try:
            deltas = source.deltas(row)
        except FlightDataError as error:
            problems.append(RowProblem(name, _without_name(error, name), "motion"))
            continue
        if deltas is None:
            without_motion += [row] if source.frame_count(row) > 1 else []
            continue
        problems += [RowProblem(name, reason, "motion") for reason in _length_problems(source, row)]
        paths.append(float(np.linalg.norm(deltas[:, 3:], axis=1).sum()))
        problems += [RowProblem(name, reason, "units") for reason in motion_problems(deltas, limits)]
    if paths and without_motion:
        first = source.name(without_motion[0])
        problems.append(RowProblem(first, f"no motion, as in {len(without_motion)} of {len(source)} rows", "motion"))
    if paths and 0 < float(np.quantile(paths, 0.9)) < limits.min_path_m:
        reason = f"nine flights of ten are shorter than {limits.min_path_m} m; are lengths in m that were declared cm?"
        problems.append(RowProblem("all rows", reason, "units"))
    return problems


def motion_problems(deltas_N6: np.ndarray, limits: MotionLimits) -> Iterator[str]:
    """What is impossible about labels (rad, m)."""
    if not np.isfinite(deltas_N6).all():
        yield f"motion {int(np.flatnonzero(~np.isfinite(deltas_N6).all(1))[0])} is not finite"
        return
    steps = np.linalg.norm(deltas_N6[:, 3:], axis=1)
    turns = np.abs(np.degrees(deltas_N6[:, :3])).max(axis=1)
    if len(steps) and steps.max() > limits.max_step_m:
        at = int(steps.argmax())
        yield (
            f"moves {steps[at]:.3g} m from frame {at} to {at + 1}, more than {limits.max_step_m:g} m; "
            "are lengths in cm that were declared m?"
        )
    if len(turns) and turns.max() > limits.max_turn_deg:
        at = int(turns.argmax())
        yield (
            f"turns {turns[at]:.3g} deg from frame {at} to {at + 1}, more than {limits.max_turn_deg:g} deg; "
            "are angles in deg that were declared rad?"
        )


def _frame_problems(source: FlightSource, row: int) -> Iterator[tuple[str, str]]:
    """(reason, kind) of what is wrong with the pictures."""
    count = source.frame_count(row)
    if not is_clip_length(count):
        yield f"{count} frames, which is not 4k+1", "length"
    try:
        frames = source.frames(row)
    except FlightDataError as error:
        yield _without_name(error, source.name(row)), "video"
        return
    if len(frames) != count:
        yield f"{len(frames)} frames, {count} are announced", "length"
    if count > 1 and int(frames.max()) == int(frames.min()):
        yield f"all pixels of all {count} frames are {int(frames.max())}", "video"


def _stamp_problems(source: ReadFlights, row: int) -> Iterator[str]:
    if isinstance(source, VideoShards):
        yield from _video_stamps(source, row)
    if isinstance(source, LeRobotFlights):
        try:
            stamps = source.stamps_s(row)
        except FlightDataError as error:
            yield _without_name(error, source.name(row))
            return
        late = np.abs(stamps - np.arange(len(stamps)) / source.info.fps) * source.info.fps
        if len(late) and not late.max() <= _STAMP_TOLERANCE:
            at = int(np.nan_to_num(late, nan=math.inf).argmax())
            expected = at / source.info.fps
            yield f"frame {at} is stamped {stamps[at]:.3f} s, at {source.info.fps:g} fps it is {expected:.3f} s"


def _length_problems(source: ReadFlights, row: int) -> Iterator[str]:
    """A trajectory with another number of poses than the video has frames would be read, shifted or stretched."""
    if not isinstance(source, VideoShards):
        return
    entry, logged = source.rows[row], source.trajectory(row)
    try:
        frames = read_video_index(entry.file).frames
    except FlightDataError:
        return  # the frames say so already
    if logged is not None and logged.frames != frames:
        yield f"{entry.trajectory}: covers {logged.frames} frames, {entry.file.name} holds {frames}"


def _video_stamps(source: VideoShards, row: int) -> Iterator[str]:
    entry = source.rows[row]
    if entry.fps is None:
        return  # an image
    try:
        index = read_video_index(entry.file)
    except FlightDataError:
        return  # the frames say so already
    if not index.is_regular:
        yield f"{entry.file}: the time between frames is not constant"
    if index.fps and abs(index.fps / entry.fps - 1) > _RATE_TOLERANCE:
        yield f"{entry.file}: {index.fps:.3g} frames a second, the row says fps {entry.fps:g}"


def _without_name(error: FlightDataError, name: str) -> str:
    return str(error).removeprefix(f"{name}: ")
