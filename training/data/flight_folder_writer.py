"""Write flights as video shards: one JSONL file, an mp4 and a trajectory for every flight.

    flights.jsonl
    videos/000000.mp4
    trajectories/000000.json      where the motion is known

The folder appears whole or not at all. Source: spec/training.md 1.1, 1.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.new_folder import new_folder
from worldvln_edge.training.data.trajectory_file import Layout, TrajectoryUnits, write_trajectory
from worldvln_edge.training.data.video_file import write_video
from worldvln_edge.training.sim.shards import FlightDataError

ROWS_FILE = "flights.jsonl"
METRES = TrajectoryUnits(length="m", angle="rad")


class FlightFolder:
    """Flights so far; get one from `new_flight_folder`."""

    def __init__(self, folder: Path, fps: int):
        self.folder, self.fps = folder, fps
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        frames_FHW3: np.ndarray,
        caption: str,
        *,
        trajectory: tuple[np.ndarray, Layout, TrajectoryUnits] | None = None,
        frame_idxs: Sequence[int] | None = None,
    ) -> None:
        """Write a flight.

        Args:
            frames_FHW3: uint8 RGB.
            caption: the instruction.
            trajectory: rows for every frame (or motion), their layout and units.
            frame_idxs: frames that a row shows; None leaves that to the reader.

        Raises:
            FlightDataError: the disk is full.
        """
        name = f"{len(self.rows):06d}"
        video, poses = f"videos/{name}.mp4", f"trajectories/{name}.json"
        write_video(self.folder / video, frames_FHW3, self.fps)
        row: dict[str, Any] = {
            "video_path": video,
            "begin_frame_id": 0,
            "end_frame_id": len(frames_FHW3) - 1,
            "fps": float(self.fps),
            "tarsier2_caption": caption,
        }
        if frame_idxs is not None:
            row |= {"frame_idxs": list(frame_idxs), "sample_frames": len(frame_idxs)}
        if trajectory is not None:
            write_trajectory(self.folder / poses, *trajectory)
            row["gt_pose_json"] = poses
        self.rows.append(row)


@contextmanager
def new_flight_folder(out: Path, *, fps: int = 16) -> Iterator[FlightFolder]:
    """Yield a folder to write flights into; it stands at `out` when the block ends without an error.

    Raises:
        FolderInUseError: `out` holds something.
        FlightDataError: no flights were added, or the disk is full.
    """
    with new_folder(out, ROWS_FILE) as building:
        flights = FlightFolder(building, fps)
        yield flights
        if not flights.rows:
            raise FlightDataError(f"{out}: not written, no flights are left to write")
        lines = b"\n".join(msgspec.json.encode(row) for row in flights.rows) + b"\n"
        try:
            (building / ROWS_FILE).write_bytes(lines)
        except OSError as error:
            raise FlightDataError(f"{out}: cannot be written ({error.strerror}); nothing was left behind") from error


def write_flight_folder(
    source: FlightSource, rows: Sequence[int], out: Path, *, fps: int = 16, show_progress: bool = True
) -> None:
    """Write rows of a source as video shards; a bar on stderr shows how far it is.

    Raises:
        FolderInUseError, FlightDataError: as `new_flight_folder`, or a row that cannot be read.
    """
    with new_flight_folder(out, fps=fps) as flights:
        for row in tqdm(rows, unit="flight", disable=not show_progress):
            deltas = source.deltas(row)
            flights.add(
                source.frames(row),
                source.instruction(row),
                trajectory=None if deltas is None else (deltas.astype(np.float64), "delta6", METRES),
            )
