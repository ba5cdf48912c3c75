"""LeRobot datasets, version 3: where things stand, and how our motion is called in them.

    meta/info.json                                        sizes, rate, features
    meta/stats.json                                       of every feature
    meta/tasks.parquet                                    task_index of every instruction
    meta/episodes/chunk-000/file-000.parquet              length, instructions, places and statistics of every episode
    data/chunk-000/file-000.parquet                       a row a frame, many episodes a file
    videos/<camera>/chunk-000/file-000.mp4                many episodes a file

Features of our own datasets: `observation.images.camera`; `observation.state`, the pose from the start of the flight;
`action`, the motion from this frame to the next (zeros in the last). Their names carry the units.
Source: the format's documentation, huggingface.co/docs/lerobot/lerobot-dataset-v3.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from worldvln_edge.poses import ACTION_ORDER, ACTION_UNITS, POSE_ORDER
from worldvln_edge.training.sim.shards import FlightDataError

VERSION = "v3.0"
INFO_FILE, STATS_FILE, TASKS_FILE = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

CAMERA, STATE, ACTION = "observation.images.camera", "observation.state", "action"
STATE_NAMES = [f"{name}_{unit}" for name, unit in zip(POSE_ORDER, ACTION_UNITS, strict=True)]
ACTION_NAMES = [f"{name}_{unit}" for name, unit in zip(ACTION_ORDER, ACTION_UNITS, strict=True)]


class Feature(msgspec.Struct, kw_only=True):
    """One column, or one camera."""

    dtype: str
    shape: list[int]
    names: Any = None

    def flat_names(self) -> list[str]:
        """Names of a vector's numbers; some datasets group them under a title."""
        names = self.names
        if isinstance(names, dict):
            names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
        return [str(name) for name in names] if isinstance(names, list) else []


class Info(msgspec.Struct, kw_only=True):
    """What a reader needs of `info.json`."""

    codebase_version: str
    fps: float
    features: dict[str, Feature]
    data_path: str = DATA_PATH
    video_path: str | None = None

    def cameras(self) -> list[str]:
        """Features with pictures."""
        return [key for key, feature in self.features.items() if feature.dtype in ("video", "image")]


def read_info(root: Path) -> Info:
    """Read `meta/info.json`.

    Raises:
        FlightDataError: none, not version 3, or not such a file.
    """
    path = root / INFO_FILE
    try:
        info = msgspec.json.decode(path.read_bytes(), type=Info)
    except OSError as error:
        raise FlightDataError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FlightDataError(f"{path}: not the info of a LeRobot dataset ({error})") from error
    if not re.fullmatch(r"v?3(\.\d+)*", info.codebase_version):
        raise FlightDataError(
            f"{path}: a dataset of version {info.codebase_version}, wanted {VERSION}; convert it with LeRobot's own "
            "script (lerobot.datasets.v30.convert_dataset_v21_to_v30)"
        )
    if not info.fps > 0:
        raise FlightDataError(f"{path}: fps must be above 0, found {info.fps}")
    return info


def place(root: Path, template: str, **numbers: int | str) -> Path:
    """A file of the dataset. Raises FlightDataError for a template that asks for other fields."""
    try:
        return root / template.format(**numbers)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise FlightDataError(f"{root / INFO_FILE}: unknown path pattern {template!r} ({error})") from error
