"""Flights to a LeRobot dataset, version 3 (`lerobot_format`). The folder appears whole or not at all.

Legend: F frames of an episode, H W pixels. Poses and actions: cm and deg.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.data.lerobot_format import (
    ACTION,
    ACTION_NAMES,
    CAMERA,
    DATA_PATH,
    EPISODES_PATH,
    INFO_FILE,
    STATE,
    STATE_NAMES,
    STATS_FILE,
    TASKS_FILE,
    VERSION,
    VIDEO_PATH,
)
from worldvln_edge.training.data.lerobot_stats import Stats, column_stats, merged_image_stats, picture_stats
from worldvln_edge.training.data.lerobot_tables import (
    COUNTERS,
    frames_schema,
    frames_table,
    motion_columns,
    tasks_table,
)
from worldvln_edge.training.data.new_folder import new_folder
from worldvln_edge.training.data.video_file import VideoWriter
from worldvln_edge.training.sim.shards import FlightDataError

_FILES_PER_CHUNK = 1000
_DATA_MB, _VIDEO_MB = 100, 200
_EPISODES_TOGETHER = 1000
"""Episodes whose descriptions are written at once: with their statistics each takes 25 kB in memory."""


def write_lerobot(
    source: FlightSource,
    rows: Sequence[int],
    out: Path,
    *,
    fps: int = 16,
    robot_type: str = "drone",
    video_bytes: int = _VIDEO_MB * 2**20,
    show_progress: bool = True,
) -> None:
    """Write rows of a source as episodes.

    Args:
        source: whose frames all have one size.
        rows: which rows, in the order of the episodes.
        out: folder of the dataset.
        fps: rate of the frames.
        robot_type: as the dataset says it.
        video_bytes: a new video file is begun beyond that size.
        show_progress: a bar on stderr.

    Raises:
        FlightDataError: no rows, a row that cannot be read, motion in some rows only, frames of another size, or the
            disk is full.
        FolderInUseError: `out` holds something.
    """
    if not rows:
        raise FlightDataError(f"{out}: not written, no flights are left to write")
    with new_folder(out, INFO_FILE) as building:
        writer = _DatasetWriter(building, fps, robot_type, video_bytes)
        try:
            with writer:
                for row in tqdm(rows, unit="flight", disable=not show_progress):
                    writer.add(source, row)
            writer.finish()
        except (OSError, pa.ArrowException) as error:
            raise FlightDataError(f"{out}: cannot be written ({error}); nothing was left behind") from error


class _DatasetWriter:
    """A dataset that is being written. Video and data files begin and end together."""

    def __init__(self, folder: Path, fps: int, robot_type: str, video_bytes: int):
        self._folder, self._fps, self._robot_type, self._video_bytes = folder, fps, robot_type, video_bytes
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []  # that are not written yet
        self._episode_count = 0
        self._episode_file: pq.ParquetWriter | None = None
        self._columns: dict[str, list[np.ndarray]] = {}
        self._picture_stats: list[Stats] = []
        self._frames = 0
        self._file = -1
        self._video: VideoWriter | None = None
        self._data: pq.ParquetWriter | None = None
        self._hw: tuple[int, int] | None = None
        self._has_motion = False

    def __enter__(self) -> _DatasetWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        try:
            self._close_files(*failure)
        finally:
            if self._episode_file is not None and failure[0] is not None:
                self._episode_file.close()

    def add(self, source: FlightSource, row: int) -> None:
        """Append an episode."""
        frames, deltas = source.frames(row), source.deltas(row)
        if self._hw is None:
            self._hw, self._has_motion = (int(frames.shape[1]), int(frames.shape[2])), deltas is not None
        if frames.shape[1:3] != self._hw:
            raise FlightDataError(
                f"{source.name(row)}: frames of {frames.shape[1:3]}, those of the first flight have {self._hw}; "
                "give an image size"
            )
        if (deltas is not None) != self._has_motion:
            raise FlightDataError(
                f"{source.name(row)}: {'no' if deltas is None else 'a'} motion, unlike the first flight; "
                "a dataset has motion in all episodes or in none"
            )
        if self._video is None or self._video.written_bytes >= self._video_bytes:
            self._close_files()
            self._open_files()
        self._append(frames, deltas, source.instruction(row))

    def finish(self) -> None:
        """Write what describes the whole."""
        _write_table(self._folder / TASKS_FILE, tasks_table(self._tasks))
        self._write_episodes()
        if self._episode_file is not None:
            self._episode_file.close()
        stats = {key: column_stats(np.concatenate(parts)) for key, parts in self._columns.items()}
        stats[CAMERA] = merged_image_stats(self._picture_stats)
        _write_json(self._folder / STATS_FILE, stats)
        _write_json(self._folder / INFO_FILE, self._info())

    def _append(self, frames: np.ndarray, deltas: np.ndarray | None, instruction: str) -> None:
        assert self._video is not None
        assert self._data is not None
        count, episode, first_in_file = len(frames), self._episode_count, self._video.frames
        task = self._tasks.setdefault(instruction, len(self._tasks))
        for frame in frames:
            self._video.add(frame)
        columns = motion_columns(deltas) | {
            "timestamp": (np.arange(count) / self._fps).astype(np.float32),
            "frame_index": np.arange(count, dtype=np.int64),
            "episode_index": np.full(count, episode, np.int64),
            "index": np.arange(self._frames, self._frames + count, dtype=np.int64),
            "task_index": np.full(count, task, np.int64),
        }
        self._data.write_table(frames_table(columns))
        pictures = picture_stats(frames)
        self._picture_stats.append(pictures)
        for key, values in columns.items():
            self._columns.setdefault(key, []).append(values)
        chunk, file = divmod(self._file, _FILES_PER_CHUNK)
        stats = {key: column_stats(values) for key, values in columns.items()} | {CAMERA: pictures}
        self._episodes.append(
            {
                "episode_index": episode,
                "tasks": [instruction],
                "length": count,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + count,
                f"videos/{CAMERA}/chunk_index": chunk,
                f"videos/{CAMERA}/file_index": file,
                f"videos/{CAMERA}/from_timestamp": first_in_file / self._fps,
                f"videos/{CAMERA}/to_timestamp": (first_in_file + count) / self._fps,
                **{f"stats/{key}/{name}": value for key, of in stats.items() for name, value in of.items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._frames += count
        self._episode_count += 1
        if len(self._episodes) >= _EPISODES_TOGETHER:
            self._write_episodes()

    def _write_episodes(self) -> None:
        """Write the descriptions of the episodes since the last time."""
        if not self._episodes:
            return
        schema = None if self._episode_file is None else self._episode_file.schema
        table = pa.Table.from_pylist(self._episodes, schema=schema)
        if self._episode_file is None:
            path = self._folder / EPISODES_PATH.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._episode_file = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._episode_file.write_table(table)
        self._episodes = []

    def _open_files(self) -> None:
        self._file += 1
        chunk, file = divmod(self._file, _FILES_PER_CHUNK)
        video = self._folder / VIDEO_PATH.format(video_key=CAMERA, chunk_index=chunk, file_index=file)
        data = self._folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
        data.parent.mkdir(parents=True, exist_ok=True)
        self._video = VideoWriter(video, self._fps).__enter__()
        self._data = pq.ParquetWriter(data, frames_schema(self._has_motion), compression="snappy")

    def _close_files(self, *failure: Any) -> None:
        video, self._video = self._video, None
        data, self._data = self._data, None
        try:
            if data is not None:
                data.close()
        finally:
            if video is not None:
                video.__exit__(*(failure or (None, None, None)))

    def _info(self) -> dict[str, Any]:
        assert self._hw is not None
        height, width = self._hw
        camera = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p",
                "video.is_depth_map": False,
                "video.fps": self._fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }
        vectors = {STATE: STATE_NAMES, ACTION: ACTION_NAMES} if self._has_motion else {}
        features: dict[str, Any] = {CAMERA: camera}
        features |= {key: {"dtype": "float32", "shape": [6], "names": names} for key, names in vectors.items()}
        for key in COUNTERS:
            features[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
        return {
            "codebase_version": VERSION,
            "robot_type": self._robot_type,
            "total_episodes": self._episode_count,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{self._episode_count}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="snappy")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=4))
