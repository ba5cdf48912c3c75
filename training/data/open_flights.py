"""Open flights of any stored kind: what a path holds is told by its files.

| kind | what the path holds |
|---|---|
| simulator | shards of `worldvln-edge sim flights` (*.npz) |
| lerobot | meta/info.json |
| video-shards | *.jsonl, in the folder or one folder down |
| manifest | a JSON file with lists `items_...` |
| routes | folders with images/ and meta.json |
| uav-flow | *.parquet: to be converted first |
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import msgspec

from worldvln_edge.training.data.captions import CaptionConfig
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.frame_selection import FrameSelection
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.sim.shards import FlightDataError, present_shards

Kind = Literal["simulator", "lerobot", "video-shards", "manifest", "routes", "uav-flow"]


class ReadFlights(FlightSource, Protocol):
    """A FlightSource that was read from files."""

    skipped: list[RowProblem]
    """Rows that were left out when it was read."""


class ReadingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How flights are read; what a kind does not know is ignored by it."""

    image_hw: tuple[int, int] | None = None
    """Size of the frames; None leaves them as they are stored."""
    selection: FrameSelection = FrameSelection()
    captions: CaptionConfig = CaptionConfig()
    items_key: str = "items_train"
    """manifest: which items."""
    route_fps: float = 16.0
    """routes: pictures a second."""
    camera: str | None = None
    """lerobot: which camera."""
    motion_column: str | None = None
    """lerobot: column with the motion, for datasets that are not our own; needs the three below."""
    motion_layout: Literal["pose6", "delta6", "delta4"] | None = None
    length_unit: Literal["cm", "m"] | None = None
    angle_unit: Literal["deg", "rad"] | None = None


def kind_of_flights(path: Path) -> Kind:
    """What a path holds.

    Raises:
        FlightDataError: nothing is there, or nothing that is known.
    """
    if path.is_file():
        return _kind_of_file(path)
    if not path.is_dir():
        raise FlightDataError(f"{path}: no such file or folder")
    from worldvln_edge.training.data.route_folder import list_routes
    from worldvln_edge.training.data.video_shards import list_video_shards

    if (path / "meta/info.json").is_file():
        return "lerobot"
    if present_shards(path):
        return "simulator"
    if list_video_shards(path):
        return "video-shards"
    if list_routes(path):
        return "routes"
    if next(path.rglob("*.parquet"), None) is not None:
        return "uav-flow"
    raise FlightDataError(
        f"{path}: no flights that are known here; wanted *.npz shards, *.jsonl, meta/info.json, a manifest.json, "
        "folders with images/ and meta.json, or *.parquet"
    )


def open_flights(path: Path, options: ReadingOptions | None = None) -> ReadFlights:
    """Open the flights at a path.

    Raises:
        FlightDataError: nothing usable is there; UAV-Flow's parquet files must be converted first.
    """
    options = options or ReadingOptions()
    kind = kind_of_flights(path)
    size = options.image_hw
    if kind == "simulator":
        from worldvln_edge.training.data.simulator_flights import SimulatorFlights

        return SimulatorFlights(path, size)
    if kind == "video-shards":
        from worldvln_edge.training.data.video_shards import VideoShards

        return VideoShards(path, size, selection=options.selection, captions=options.captions)
    if kind == "manifest":
        from worldvln_edge.training.data.action_manifest import ActionManifest

        return ActionManifest(path, size, items_key=options.items_key)
    if kind == "routes":
        from worldvln_edge.training.data.route_folder import RouteFolder

        return RouteFolder(path, size, selection=options.selection, fps=options.route_fps)
    if kind == "lerobot":
        return _open_lerobot(path, options)
    raise FlightDataError(
        f"{path}: UAV-Flow's parquet files are converted first: "
        "worldvln-edge data convert PATH --out FOLDER --length-unit m (or cm)"
    )


def _kind_of_file(path: Path) -> Kind:
    if path.suffix == ".parquet":
        return "uav-flow"
    from worldvln_edge.training.data.action_manifest import is_manifest

    if is_manifest(path):
        return "manifest"
    raise FlightDataError(f"{path}: neither a manifest (JSON with items_train) nor a parquet file; give the folder")


def _open_lerobot(path: Path, options: ReadingOptions) -> ReadFlights:
    from worldvln_edge.training.data.lerobot_reader import LeRobotFlights, LeRobotMotion
    from worldvln_edge.training.data.trajectory_file import TrajectoryUnits

    motion = None
    if options.motion_column is not None:
        if options.motion_layout is None or options.length_unit is None or options.angle_unit is None:
            raise FlightDataError(
                f"{path}: the motion column {options.motion_column!r} needs its layout, length unit and angle unit"
            )
        units = TrajectoryUnits(length=options.length_unit, angle=options.angle_unit)
        motion = LeRobotMotion(column=options.motion_column, layout=options.motion_layout, units=units)
    return LeRobotFlights(path, options.image_hw, selection=options.selection, camera=options.camera, motion=motion)
