"""Frames that lie as single pictures in a folder, and frames at the size that a network reads.

Legend: F frames, H W pixels. Source: spec/training.md 1.2 (frame transform), 1.6; spec/session_protocol.md 4.1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from worldvln_edge.images import ImageError, decode_image, fit_frame
from worldvln_edge.training.sim.shards import FlightDataError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder in plain name order.

    Raises:
        FlightDataError: no such folder, or no pictures.
    """
    try:
        pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    except OSError as error:
        raise FlightDataError(f"{folder}: {error.strerror}") from error
    if not pictures:
        raise FlightDataError(f"{folder}: no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return pictures


def numbered_picture(folder: Path, frame: int) -> Path:
    """`frame_000000.png`, or the same name as .jpg, .jpeg, .webp.

    Raises:
        FlightDataError: none of them is there.
    """
    for suffix in PICTURE_SUFFIXES[:-1]:
        path = folder / f"frame_{frame:06d}{suffix}"
        if path.is_file():
            return path
    raise FlightDataError(f"{folder / f'frame_{frame:06d}.png'}: no such picture (nor .jpg, .jpeg, .webp)")


def read_pictures(paths: Sequence[Path], image_hw: tuple[int, int] | None) -> np.ndarray:
    """Pictures at the wanted size, or at their own (of the first) for None: uint8 RGB [F, H, W, 3].

    Raises:
        FlightDataError: a file that cannot be read, is no picture, or differs in size from the first.
    """
    frames: list[np.ndarray] = []
    for path in paths:
        try:
            frame = decode_image(path.read_bytes())
        except OSError as error:
            raise FlightDataError(f"{path}: {error.strerror}") from error
        except ImageError as error:
            raise FlightDataError(f"{path}: {error}") from error
        frame = frame if image_hw is None else fit_frame(frame, image_hw)
        if frames and frame.shape != frames[0].shape:
            raise FlightDataError(f"{path}: {frame.shape[:2]} pixels, the first frame has {frames[0].shape[:2]}")
        frames.append(frame)
    return np.stack(frames)


def fit_frames(frames_FHW3: np.ndarray, image_hw: tuple[int, int] | None) -> np.ndarray:
    """Frames covered and cut to the wanted size; as they are for None. uint8 [F, H, W, 3]."""
    if image_hw is None or frames_FHW3.shape[1:3] == tuple(image_hw):
        return frames_FHW3
    return np.stack([fit_frame(frame, image_hw) for frame in frames_FHW3])


def content_key(paths: Sequence[Path], frames: Sequence[int], image_hw: tuple[int, int] | None) -> str:
    """sha256 over resolved paths, sizes and dates of files, frame numbers and the size of frames.

    Raises:
        FlightDataError: a file is not there.
    """
    files = []
    for path in paths:
        try:
            state = path.stat()
        except OSError as error:
            raise FlightDataError(f"{path}: {error.strerror}") from error
        files.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    content = [files, list(frames), list(image_hw) if image_hw else None]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
