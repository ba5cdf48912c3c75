"""Small datasets on disk for the tests of training data. A frame's grey level tells its number."""

import hashlib
import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldvln_edge.training.data.video_file import write_video

HW = (32, 48)
_LEVELS = 4  # grey levels from one frame to the next: more than what compression changes


def numbered_frames(count: int, hw: tuple[int, int] = HW) -> np.ndarray:
    """uint8 [count, H, W, 3]; at most 62 frames."""
    levels = (_LEVELS * (np.arange(count) + 1)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, *hw, 3)).copy()


def numbers_of(frames: np.ndarray) -> list[int]:
    """Which frames these are."""
    return [round(float(frame.mean()) / _LEVELS) - 1 for frame in frames]


def numbered_video(path: Path, count: int, hw: tuple[int, int] = HW, fps: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, numbered_frames(count, hw), fps)
    return path


def video_row(**changes: Any) -> dict[str, Any]:
    """A complete row of a video shard; None leaves a key out."""
    row = {
        "video_path": "v.mp4",
        "begin_frame_id": 0,
        "end_frame_id": 48,
        "fps": 16.0,
        "tarsier2_caption": "fly forward",
        **changes,
    }
    return {key: value for key, value in row.items() if value is not None}


def write_rows(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def straight_poses(frames: int, step: float = 10.0) -> np.ndarray:
    """[frames, 6] forward along x with a slow turn, cm and deg by default."""
    poses = np.zeros((frames, 6))
    poses[:, 0] = step * np.arange(frames)
    poses[:, 4] = 0.5 * np.arange(frames)
    return poses


class HeldFlights:
    """A `FlightSource` of arrays: frames [N, F, H, W, 3], deltas [N, F-1, 6] and N instructions."""

    def __init__(self, frames: np.ndarray, deltas: np.ndarray, instructions: Sequence[str]):
        self._frames, self._deltas, self._instructions = frames, deltas, tuple(instructions)
        self.skipped: list[Any] = []

    def __len__(self) -> int:
        return len(self._frames)

    def key(self, row: int) -> str:
        return hashlib.sha256(self._frames[row].tobytes()).hexdigest()

    def name(self, row: int) -> str:
        return f"held flight {row}"

    def frame_count(self, row: int) -> int:
        return self._frames.shape[1]

    def frames(self, row: int) -> np.ndarray:
        return self._frames[row]

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self._instructions[row]

    def deltas(self, row: int) -> np.ndarray | None:
        return self._deltas[row]


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
