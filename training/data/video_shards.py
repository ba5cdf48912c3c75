"""Video shards: rows of JSONL that name a video, a segment and a caption, or an image and its words.

Frames are resolved when the file is read. A row that cannot be used is left out and listed in `skipped` with its file,
line and reason; what only decoding shows (a broken video) is raised by `frames`.
Source: spec/training.md 1.1 (fields, lookup), 1.2 (frames), 1.3 (captions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from worldvln_edge.scale_schedule import aspect_templates
from worldvln_edge.training.data.captions import CaptionConfig, draw_caption, draw_image_caption, without_tag
from worldvln_edge.training.data.frame_pictures import content_key, read_pictures
from worldvln_edge.training.data.frame_selection import (
    FrameSelection,
    UnusableRowError,
    reference_frames,
    select_frames,
)
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.data.trajectory_file import Layout, Trajectory, TrajectoryUnits, read_trajectory
from worldvln_edge.training.data.video_file import decode_frames, read_video_index
from worldvln_edge.training.sim.shards import FlightDataError


class _SharedFields(msgspec.Struct, kw_only=True):
    quality_prompt: str | None = None
    force_h_div_w_template: float | None = None


class _VideoFields(_SharedFields, kw_only=True):
    """What a row with a video must have; its other keys are free."""

    video_path: Annotated[str, msgspec.Meta(min_length=1)]
    begin_frame_id: int
    end_frame_id: int
    fps: Annotated[float, msgspec.Meta(gt=0)]
    frame_idxs: list[int] | None = None
    gt_pose_json: str | None = None
    """Trajectory file; its poses are those of the container's frames."""
    traj_layout: Layout | None = None
    traj_units: TrajectoryUnits | None = None
    """Of a trajectory file that does not say them itself."""


class _ImageFields(_SharedFields, kw_only=True):
    """What a row with an image must have, and one of its two texts."""

    image_path: Annotated[str, msgspec.Meta(min_length=1)]
    text: str | None = None
    long_caption: str | None = None


class MediaRow(msgspec.Struct, frozen=True, kw_only=True):
    """A usable row."""

    where: str
    """File and line."""
    file: Path
    frames: Sequence[int]
    """Of the video; 0 alone of an image."""
    caption: str
    second_caption: str
    quality_prompt: str
    fps: float | None
    """None: the file is an image."""
    trajectory: Path | None = None
    traj_layout: Layout | None = None
    traj_units: TrajectoryUnits | None = None


def list_video_shards(root: Path) -> list[Path]:
    """JSONL files one folder down, or, only if there are none, in the folder itself; sorted. May be empty."""
    return sorted(root.glob("*/*.jsonl")) or sorted(root.glob("*.jsonl"))


class VideoShards:
    """Rows of all shards of a folder (a FlightSource).

    Args:
        root: folder of JSONL files.
        image_hw: size of the frames; None leaves them as the videos have them.
        selection, captions: how frames and captions are chosen.

    Raises:
        FlightDataError: no shards.
    """

    def __init__(
        self,
        root: Path,
        image_hw: tuple[int, int] | None,
        *,
        selection: FrameSelection | None = None,
        captions: CaptionConfig | None = None,
    ):
        self.root, self.image_hw = Path(root), image_hw
        self.selection, self.captions = selection or FrameSelection(), captions or CaptionConfig()
        self.rows: list[MediaRow] = []
        self.skipped: list[RowProblem] = []
        shards = list_video_shards(self.root)
        if not shards:
            raise FlightDataError(f"{self.root}: no video shards (*.jsonl) in it or one folder down")
        for shard in shards:
            for where, line in _lines(shard):
                row = self._read_row(where, line, shard.parent)
                if isinstance(row, MediaRow):
                    self.rows.append(row)
                else:
                    self.skipped.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        entry = self.rows[row]
        return content_key([entry.file], entry.frames, self.image_hw)

    def name(self, row: int) -> str:
        return self.rows[row].where

    def frame_count(self, row: int) -> int:
        return len(self.rows[row].frames)

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3]. Raises FlightDataError that names row and file where it cannot be decoded."""
        entry = self.rows[row]
        try:
            if entry.fps is None:
                return read_pictures([entry.file], self.image_hw)
            return decode_frames(entry.file, entry.frames, self.image_hw)
        except FlightDataError as error:
            raise FlightDataError(f"{entry.where}: {error}") from error

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        entry = self.rows[row]
        draw = draw_image_caption if entry.fps is None else draw_caption
        return draw(entry.caption, entry.second_caption, entry.quality_prompt, self.captions, generator)

    def deltas(self, row: int) -> np.ndarray | None:
        """float32 [F-1, 6] of the row's trajectory; None where it names none.

        Raises:
            FlightDataError: a trajectory that cannot be read or ends before the last frame.
        """
        entry, logged = self.rows[row], self.trajectory(row)
        if logged is None:
            return None
        try:
            return logged.deltas(entry.frames)
        except IndexError as error:
            raise FlightDataError(f"{entry.where}: {entry.trajectory}: {error}") from error

    def trajectory(self, row: int) -> Trajectory | None:
        """Motion of the whole video, None where the row names none. Raises FlightDataError: it cannot be read."""
        entry = self.rows[row]
        if entry.trajectory is None:
            return None
        try:
            return read_trajectory(entry.trajectory, layout=entry.traj_layout, units=entry.traj_units)
        except FlightDataError as error:
            raise FlightDataError(f"{entry.where}: {error}") from error

    def _read_row(self, where: str, line: bytes, folder: Path) -> MediaRow | RowProblem:
        try:
            content: Any = msgspec.json.decode(line)
            fields = _fields_of(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return RowProblem(where, str(error))
        if self._is_other_aspect(fields.force_h_div_w_template):
            return RowProblem(where, f"wants the aspect h/w {fields.force_h_div_w_template}, not that of the preset")
        if isinstance(fields, _ImageFields):
            return _image_row(where, fields, folder)
        return self._video_row(where, fields, content, folder)

    def _video_row(
        self, where: str, fields: _VideoFields, content: dict[str, Any], folder: Path
    ) -> MediaRow | RowProblem:
        config = self.captions
        caption, second = content.get(config.caption_field), content.get(config.second_field)
        if not isinstance(caption, str) or not without_tag(caption):
            texts = sorted(k for k, v in content.items() if isinstance(v, str) and k != "video_path")
            return RowProblem(
                where, f'no text in "{config.caption_field}"; the row has text in: {", ".join(texts) or "-"}', "caption"
            )
        if not isinstance(second, str | None):
            return RowProblem(where, f'"{config.second_field}" is not text', "caption")
        video = _place(fields.video_path, folder)
        try:
            frames = self._frames(fields, video)
        except UnusableRowError as error:
            return RowProblem(where, str(error), "length")
        except FlightDataError as error:
            return RowProblem(where, str(error), "video")
        return MediaRow(
            where=where,
            file=video,
            frames=_short(frames),
            caption=caption,
            second_caption=second or "",
            quality_prompt=fields.quality_prompt or "",
            fps=fields.fps,
            trajectory=_place(fields.gt_pose_json, folder) if fields.gt_pose_json else None,
            traj_layout=fields.traj_layout,
            traj_units=fields.traj_units,
        )

    def _frames(self, fields: _VideoFields, video: Path) -> tuple[int, ...]:
        begin, end, fps = fields.begin_frame_id, fields.end_frame_id, fields.fps
        exact = select_frames(self.selection, begin=begin, end=end, fps=fps, explicit=fields.frame_idxs)
        if self.selection.rule == "exact" or fields.frame_idxs is not None:
            return exact
        index = read_video_index(video)
        if not index.fps:
            raise UnusableRowError("the video holds one frame, which has no rate for the reference rule")
        return reference_frames(
            self.selection, begin=begin, end=end, fps=fps, container_fps=index.fps, container_frames=index.frames
        )

    def _is_other_aspect(self, forced: float | None) -> bool:
        if forced is None or self.image_hw is None:
            return False
        return nearest_aspect(forced) != nearest_aspect(self.image_hw[0] / self.image_hw[1])


def _fields_of(content: Any) -> _VideoFields | _ImageFields:
    """Raises msgspec.ValidationError: not the fields of a row."""
    if isinstance(content, dict) and "image_path" in content and "video_path" not in content:
        return msgspec.convert(content, _ImageFields)
    return msgspec.convert(content, _VideoFields)


def _image_row(where: str, fields: _ImageFields, folder: Path) -> MediaRow | RowProblem:
    long_caption, text = fields.long_caption or "", fields.text or ""
    if not (without_tag(long_caption) or without_tag(text)):
        return RowProblem(where, 'no text in "long_caption" or "text"', "caption")
    return MediaRow(
        where=where,
        file=_place(fields.image_path, folder),
        frames=(0,),
        caption=long_caption,
        second_caption=text,
        quality_prompt=fields.quality_prompt or "",
        fps=None,
    )


def _short(frames: tuple[int, ...]) -> Sequence[int]:
    """The same numbers; neighbours as a range, so that 100,000 rows do not hold five million numbers."""
    span = range(frames[0], frames[-1] + 1)
    return span if frames == tuple(span) else frames


def nearest_aspect(aspect: float) -> float:
    """Key (h/w) of the nearest aspect template."""
    return min(aspect_templates(), key=lambda key: abs(key - aspect))


def _lines(shard: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with shard.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{shard}:{number}", line
    except OSError as error:
        raise FlightDataError(f"{shard}: {error.strerror}") from error


def _place(path: str, folder: Path) -> Path:
    """Relative to the shard's folder; where nothing is there, to the working directory."""
    beside = folder / path
    return beside if beside.exists() or not Path(path).exists() else Path(path)
