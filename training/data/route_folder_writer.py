"""Write flights as dataset route folders, which flight clients replay: pictures, words and poses of every flight.

    flight_000000/images/frame_000000.png ...
    flight_000000/meta.json            instruction, and the unit of length
    flight_000000/raw_logs.json        poses from the start of the flight, where the motion is known; cm and deg

The folder appears whole or not at all. Source: spec/session_protocol.md 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image
from tqdm import tqdm

from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.new_folder import new_folder
from worldvln_edge.training.data.route_folder import IMAGES, META, RAW_LOGS
from worldvln_edge.training.data.trajectory_file import Trajectory
from worldvln_edge.training.sim.shards import FlightDataError


def write_routes(source: FlightSource, rows: Sequence[int], out: Path, *, show_progress: bool = True) -> None:
    """Write rows of a source as routes.

    Args:
        source: flights; those without motion get no `raw_logs.json`.
        rows: which rows, in the order of the routes' names.
        out: folder to write.
        show_progress: a bar on stderr.

    Raises:
        FlightDataError: no rows, a row that cannot be read or says nothing, or the disk is full.
        FolderInUseError: `out` holds something.
    """
    if not rows:
        raise FlightDataError(f"{out}: not written, no flights are left to write")
    with new_folder(out, f"{_name(0)}/{META}") as building:
        for number, row in enumerate(tqdm(rows, unit="flight", disable=not show_progress)):
            frames, deltas, words = source.frames(row), source.deltas(row), source.instruction(row)
            if not words:
                raise FlightDataError(f"{source.name(row)}: no instruction, which a route must have")
            try:
                _write_route(building / _name(number), frames, deltas, words)
            except OSError as error:
                raise FlightDataError(f"{out}: cannot be written ({error}); nothing was left behind") from error


def _write_route(folder: Path, frames_FHW3: np.ndarray, deltas: np.ndarray | None, words: str) -> None:
    (folder / IMAGES).mkdir(parents=True)
    for i, frame in enumerate(frames_FHW3):
        Image.fromarray(frame).save(folder / IMAGES / f"frame_{i:06d}.png")
    (folder / META).write_bytes(msgspec.json.encode({"instruction": words, "units": "cm"}))
    if deltas is not None:
        poses = Trajectory("delta6", deltas.astype(np.float64)).poses()
        poses = np.concatenate([100 * poses[:, :3], np.degrees(poses[:, 3:])], axis=1)
        (folder / RAW_LOGS).write_bytes(msgspec.json.encode(poses.tolist()))


def _name(number: int) -> str:
    return f"flight_{number:06d}"
