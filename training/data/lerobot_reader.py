"""Episodes of a LeRobot dataset, version 3, as flights.

Our own datasets name their motion and its units (`lerobot_format`). Of other datasets the caller says which column
holds the motion, in which layout and units; without that their flights have no motion. It is never guessed.
Legend: L frames of an episode, F frames of a row.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch

from worldvln_edge.images import ImageError, decode_image
from worldvln_edge.poses import actions_to_deltas
from worldvln_edge.training.data.captions import without_tag
from worldvln_edge.training.data.frame_pictures import content_key, fit_frames
from worldvln_edge.training.data.frame_selection import FrameSelection, UnusableRowError, select_frames
from worldvln_edge.training.data.lerobot_format import ACTION, ACTION_NAMES, Info, place, read_info
from worldvln_edge.training.data.parquet_file import read_parquet
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.data.trajectory_file import Layout, Trajectory, TrajectoryUnits, trajectory_of_rows
from worldvln_edge.training.data.video_file import decode_frames, read_video_index
from worldvln_edge.training.sim.shards import FlightDataError

_FILES_REMEMBERED = 8
_STAMP_TOLERANCE = 0.25  # of the time between two frames


class LeRobotMotion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a dataset keeps its motion. Rows of deltas lead from their frame to the next; the last one is not used."""

    column: str
    layout: Layout
    units: TrajectoryUnits


class _Episode(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    instruction: str
    frames: tuple[int, ...]
    data: Path
    video: Path | None
    video_from_s: float


class LeRobotFlights:
    """Episodes of a dataset (a FlightSource).

    Args:
        root: folder of the dataset.
        image_hw: size of the frames; None leaves them as they are.
        selection: which frames of an episode.
        camera: which camera's pictures; None takes the only one.
        motion: of datasets that are not our own.

    Raises:
        FlightDataError: no dataset of version 3, several cameras and none chosen, or no such column.
    """

    def __init__(
        self,
        root: Path,
        image_hw: tuple[int, int] | None,
        *,
        selection: FrameSelection | None = None,
        camera: str | None = None,
        motion: LeRobotMotion | None = None,
    ):
        self.root, self.image_hw, self.motion = Path(root), image_hw, motion
        self.selection = selection or FrameSelection()
        self.info: Info = read_info(self.root)
        self.camera = self._choose_camera(camera)
        action = self.info.features.get(ACTION)
        self._is_own = motion is None and action is not None and action.flat_names() == ACTION_NAMES
        if motion is not None and motion.column not in self.info.features:
            raise FlightDataError(f"{self.root}: no column {motion.column!r}; it has {', '.join(self.info.features)}")
        self.episodes: list[_Episode] = []
        self.skipped: list[RowProblem] = []
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise FlightDataError(f"{self.root}: no parquet files in meta/episodes")
        for file in files:
            self._read_episodes(file)

    def __len__(self) -> int:
        return len(self.episodes)

    def key(self, row: int) -> str:
        episode = self.episodes[row]
        numbers = [episode.number, *episode.frames]
        return content_key([episode.video or episode.data, episode.data], numbers, self.image_hw)

    def name(self, row: int) -> str:
        return f"{self.root}: episode {self.episodes[row].number}"

    def frame_count(self, row: int) -> int:
        return len(self.episodes[row].frames)

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3]. Raises FlightDataError that names episode and file."""
        episode = self.episodes[row]
        try:
            if episode.video is None:
                return fit_frames(self._embedded_pictures(episode), self.image_hw)
            return decode_frames(episode.video, self._container_frames(episode), self.image_hw)
        except FlightDataError as error:
            raise FlightDataError(f"{self.name(row)}: {error}") from error

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self.episodes[row].instruction

    def deltas(self, row: int) -> np.ndarray | None:
        """float32 [F-1, 6]; None where no motion is known. Raises FlightDataError that names episode and file."""
        episode = self.episodes[row]
        try:
            if self._is_own:
                actions = self._column(episode, ACTION)
                trajectory = Trajectory("delta6", actions_to_deltas(actions[:-1]).astype(np.float64))
            elif self.motion is not None:
                values = self._column(episode, self.motion.column)
                values = values if self.motion.layout == "pose6" else values[:-1]
                trajectory = trajectory_of_rows(values, self.motion.layout, self.motion.units, episode.data)
            else:
                return None
            return trajectory.deltas(episode.frames)
        except (FlightDataError, IndexError) as error:
            raise FlightDataError(f"{self.name(row)}: {error}") from error

    def stamps_s(self, row: int) -> np.ndarray:
        """Recorded times of all frames of the episode: float64 [L]."""
        episode = self.episodes[row]
        return np.array(_rows_of(episode.data, "timestamp", episode.number).to_pylist(), np.float64)

    def _choose_camera(self, camera: str | None) -> str:
        cameras = self.info.cameras()
        if camera is None and len(cameras) == 1:
            return cameras[0]
        if camera is None or camera not in cameras:
            what = "no camera" if camera is None else f"no camera {camera!r}"
            raise FlightDataError(f"{self.root}: {what} chosen; it has {', '.join(cameras) or 'none'}")
        return camera

    def _read_episodes(self, file: Path) -> None:
        is_video = self.info.features[self.camera].dtype == "video"
        video_columns = [f"videos/{self.camera}/{n}" for n in ("chunk_index", "file_index", "from_timestamp")]
        columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
        for record in read_parquet(file, columns + (video_columns if is_video else [])).to_pylist():
            where = f"{file}: episode {record['episode_index']}"
            empty = [name for name, value in record.items() if value is None and name != "tasks"]
            if empty:
                self.skipped.append(RowProblem(where, f"nothing in {', '.join(empty)}"))
                continue
            tasks = [record["tasks"]] if isinstance(record["tasks"], str) else record["tasks"] or ()
            texts = [without_tag(text) for text in tasks if isinstance(text, str)]
            if not any(texts):
                self.skipped.append(RowProblem(where, "no instruction in `tasks`", "caption"))
                continue
            try:
                frames = select_frames(self.selection, begin=0, end=record["length"] - 1, fps=self.info.fps)
            except UnusableRowError as error:
                self.skipped.append(RowProblem(where, str(error), "length"))
                continue
            self.episodes.append(self._episode(record, frames, next(text for text in texts if text), is_video))

    def _episode(self, record: dict[str, Any], frames: tuple[int, ...], text: str, is_video: bool) -> _Episode:
        data = {"chunk_index": record["data/chunk_index"], "file_index": record["data/file_index"]}
        video, start = None, 0.0
        if is_video:
            prefix = f"videos/{self.camera}/"
            numbers = {n: record[prefix + n] for n in ("chunk_index", "file_index")}
            video = place(self.root, self.info.video_path or "", video_key=self.camera, **numbers)
            start = record[prefix + "from_timestamp"]
        return _Episode(
            number=record["episode_index"],
            instruction=text,
            frames=frames,
            data=place(self.root, self.info.data_path, **data),
            video=video,
            video_from_s=start,
        )

    def _container_frames(self, episode: _Episode) -> list[int]:
        """The video's frames at the episode's times."""
        assert episode.video is not None
        times = read_video_index(episode.video).times_s()
        wanted = episode.video_from_s + np.array(episode.frames) / self.info.fps
        after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
        before = (after - 1).clip(0)
        nearest = np.where(np.abs(times[before] - wanted) <= np.abs(times[after] - wanted), before, after)
        late = np.abs(times[nearest] - wanted) * self.info.fps
        if late.max() > _STAMP_TOLERANCE:
            worst = int(late.argmax())
            raise FlightDataError(
                f"{episode.video}: no frame at {wanted[worst]:.3f} s (frame {episode.frames[worst]} of the episode), "
                f"the nearest is at {times[nearest[worst]]:.3f} s"
            )
        return [int(i) for i in nearest]

    def _embedded_pictures(self, episode: _Episode) -> np.ndarray:
        cells = _rows_of(episode.data, self.camera, episode.number)
        if max(episode.frames) >= len(cells):
            raise FlightDataError(f"{episode.data}: {len(cells)} pictures, frame {max(episode.frames)} is wanted")
        pictures = []
        for frame in episode.frames:
            cell = cells[frame].as_py()
            try:
                pictures.append(decode_image((cell or {}).get("bytes") or b""))
            except ImageError as error:
                raise FlightDataError(f"{episode.data}: frame {frame}: {error}") from error
        return np.stack(pictures)

    def _column(self, episode: _Episode, column: str) -> np.ndarray:
        values = np.array(_rows_of(episode.data, column, episode.number).to_pylist(), np.float64)
        if not np.isfinite(values).all():
            raise FlightDataError(f"{episode.data}: numbers in {column} that are not finite")
        return values


def _rows_of(path: Path, column: str, episode: int) -> pa.ChunkedArray:
    """A column's cells of one episode, in the order of its frames."""
    try:
        state = path.stat()
    except OSError as error:
        raise FlightDataError(f"{path}: {error.strerror}") from error
    table, numbers = _column_table(str(path), column, state.st_size, state.st_mtime_ns)
    rows = np.flatnonzero(numbers == episode)
    if not len(rows):
        raise FlightDataError(f"{path}: holds no frames of episode {episode}")
    return table[column].take(pa.array(rows))


@lru_cache(maxsize=_FILES_REMEMBERED)
def _column_table(path: str, column: str, size: int, mtime_ns: int) -> tuple[pa.Table, np.ndarray]:
    table = read_parquet(Path(path), [column, "episode_index"])  # size and date: a changed file is read again
    return table, table["episode_index"].to_numpy()
