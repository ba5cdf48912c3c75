"""A recorded flight as training data (a FlightSource): a row for every instruction that was flown.

An instruction holds from the segment after it on, so a row ends where that segment begins. The motion is what the
client said of its poses; where it said none, what was answered may be taken for it, which is what the drone was told
and not what it did.

Legend: F frames of a row, N steps. Poses and actions: cm and deg.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import torch

from worldvln_edge.images import ImageError, decode_image, fit_frame
from worldvln_edge.poses import actions_to_deltas
from worldvln_edge.runtime.recording.recording_messages import FrameNote, Gap, Instruction, Picture, Segment
from worldvln_edge.runtime.recording.recording_reader import Recording
from worldvln_edge.training.data.frame_pictures import content_key
from worldvln_edge.training.data.trajectory_file import TrajectoryUnits, trajectory_of_rows
from worldvln_edge.training.sim.shards import FlightDataError

Motion = Literal["poses", "actions", "none"]


class _Row(NamedTuple):
    instruction: str
    first: int
    """0-based, of the recording."""
    end: int


class RecordingFlights:
    """Rows of one recording.

    Args:
        recording: all its parts.
        image_hw: size of the frames; None leaves them as they were sent.
        motion: poses: the client's, or none where it sent none; actions: as they were answered; none: no motion.

    Raises:
        FlightDataError: frames are missing in it, or too few for a row.
    """

    def __init__(self, recording: Recording, image_hw: tuple[int, int] | None = None, *, motion: Motion = "poses"):
        self._recording, self._image_hw, self._motion = recording, image_hw, motion
        self._pictures: list[Picture] = []
        self._poses: list[tuple[float, ...]] = []
        self._actions: list[np.ndarray] = []
        self._has_all_actions = True
        changes = [(0, recording.opening.prompt)]
        points, emitted = recording.opening.horizon.points, recording.opening.restored_emitted
        for timed in recording:
            message = timed.message
            if isinstance(message, Picture):
                self._take(message)
            elif isinstance(message, FrameNote) and message.pose is not None:
                self._poses.append(msgspec.structs.astuple(message.pose))
            elif isinstance(message, Instruction) and emitted + 1 < len(points) - 1:
                changes.append((points[emitted + 1] - 1, message.prompt))
            elif isinstance(message, Segment):
                emitted = message.segment
                self._has_all_actions &= emitted == len(self._actions)
                self._actions.append(message.answered_actions())
            elif isinstance(message, Gap):
                raise FlightDataError(f"{self._file}: {message}; a flight with a hole in it is no training data")
        self._rows = self._split(changes)
        if not self._rows:
            raise FlightDataError(f"{self._file}: {len(self._pictures)} frames, which is too short for a flight")

    @property
    def problems(self) -> list[str]:
        """What is wrong with the files; rows end where they do."""
        return self._recording.problems

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, row: int) -> str:
        at = self._rows[row]
        return content_key(self._recording.parts, range(at.first, at.end), self._image_hw)

    def name(self, row: int) -> str:
        return f"{self._file}, frames {self._rows[row].first + 1} to {self._rows[row].end}"

    def frame_count(self, row: int) -> int:
        return self._rows[row].end - self._rows[row].first

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3]. Raises FlightDataError that names the frame."""
        at = self._rows[row]
        frames = [self._decoded(picture) for picture in self._pictures[at.first : at.end]]
        for number, frame in enumerate(frames, start=at.first + 1):
            if frame.shape != frames[0].shape:
                raise FlightDataError(
                    f"{self._file}: frame {number} has {frame.shape[:2]} pixels, the first one {frames[0].shape[:2]}; "
                    "give --image-size"
                )
        return np.stack(frames)

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self._rows[row].instruction

    def deltas(self, row: int) -> np.ndarray | None:
        """float32 [F-1, 6]; None without motion. Raises FlightDataError where some of it is missing."""
        at = self._rows[row]
        if self._motion == "none" or (self._motion == "poses" and not self._poses):
            return None
        if self._motion == "actions":
            answered = np.concatenate(self._actions or [np.zeros((0, 6))])[at.first : at.end - 1]
            if not self._has_all_actions or len(answered) < at.end - at.first - 1:
                raise FlightDataError(f"{self.name(row)}: some of its actions are not in the recording; leave it out")
            return actions_to_deltas(answered)
        if len(self._poses) != len(self._pictures):
            raise FlightDataError(
                f"{self._file}: {len(self._poses)} poses for {len(self._pictures)} frames; give --motion actions, or "
                "none"
            )
        rows = np.array(self._poses[at.first : at.end], np.float64)
        units = TrajectoryUnits(length="cm", angle="deg")
        return trajectory_of_rows(rows, "pose6", units, self._file).deltas()

    @property
    def _file(self) -> Path:
        return self._recording.parts[0]

    def _take(self, picture: Picture) -> None:
        if picture.index != len(self._pictures) + 1:
            raise FlightDataError(f"{self._file}: frame {len(self._pictures) + 1} is missing in it")
        self._pictures.append(picture)

    def _split(self, changes: list[tuple[int, str]]) -> list[_Row]:
        """Rows between changes of the instruction; neighbours share a frame. What has no motion at its end is cut."""
        frames = len(self._pictures)
        if self._motion == "actions":
            frames = min(frames, 1 + sum(map(len, self._actions)))
        rows: list[_Row] = []
        for (first, words), (following, _) in pairwise([*changes, (frames - 1, "")]):
            end = min(following + 1, frames)
            if end - first < 2:
                continue
            if rows and rows[-1].instruction == words:
                rows[-1] = rows[-1]._replace(end=end)
            else:
                rows.append(_Row(words, first, end))
        return rows

    def _decoded(self, picture: Picture) -> np.ndarray:
        if picture.raw_hw is not None:
            frame = np.frombuffer(picture.data, np.uint8).reshape(*picture.raw_hw, 3)
        else:
            try:
                frame = decode_image(picture.data)
            except ImageError as error:
                raise FlightDataError(f"{self._file}: frame {picture.index}: {error}") from error
        return frame if self._image_hw is None else fit_frame(frame, self._image_hw)
