"""Which frames of an annotated segment a row shows, as explicit container frame numbers.

Every row is resolved when it is read, and exactly those frames are decoded: what a label belongs to never depends on a
decoder's idea of time. Frame numbers count from 0; `begin` and `end` are both inside the segment.
Source: spec/training.md 1.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np

TEMPORAL_STRIDE = 4
"""Frames of a latent frame after the first; a row holds 4k+1 frames."""
_REFERENCE_SLACK_S = 0.2
_LONGEST_SEGMENT = 100_000  # hours of flight: more is a wrong number, and would fill the memory
_FPS = (0.1, 1000.0)

SampleMode = Literal["duration", "fixed_full", "segment_full", "segment_full_floor_sec", "whole"]
"""
duration                whole seconds from `begin`, at the model's rate
fixed_full              always `video_frames`, spread over the segment
segment_full            at most `video_frames`, spread over the segment
segment_full_floor_sec  the same, cut to whole seconds
whole                   the whole segment at the model's rate, however long: for conversions
"""


class UnusableRowError(ValueError):
    """A row that gives no frames. The message is the reason, without the row's name."""


class FrameSelection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How frames are chosen where a row does not list them."""

    mode: SampleMode = "duration"
    rule: Literal["exact", "reference"] = "exact"
    """`reference` repeats the published sampling, which shows frame 0 twice in `duration`: for comparisons only."""
    video_fps: Annotated[int, msgspec.Meta(ge=1)] = 16
    video_frames: Annotated[int, msgspec.Meta(ge=1)] = 49
    min_video_frames: int = -1
    """Segments that give fewer are left out; -1 keeps all."""
    drop_long_video: bool = False
    """In `duration`: leave segments out that are longer than `video_frames`, instead of taking their beginning."""

    def __post_init__(self) -> None:
        if not is_clip_length(self.video_frames):
            raise ValueError(f"video_frames must be 4k+1, found {self.video_frames}")


def is_clip_length(frames: int) -> bool:
    """Whether the VAE encodes that many frames without a rest (4k+1)."""
    return frames >= 1 and (frames - 1) % TEMPORAL_STRIDE == 0


def longest_clip(frames: int) -> int:
    """The largest 4k+1 that is not above `frames`."""
    return frames - (frames - 1) % TEMPORAL_STRIDE


def select_frames(
    config: FrameSelection, *, begin: int, end: int, fps: float, explicit: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Container frames of a row.

    Args:
        config: the mode and its filters.
        begin, end: first and last frame of the segment.
        fps: rate of the annotation, frames a second.
        explicit: frames that the row lists itself; they override the mode.

    Returns:
        4k+1 frame numbers, non-decreasing unless `explicit` is not.

    Raises:
        UnusableRowError: an impossible segment, a filter, or a list that is not 4k+1 long.
    """
    if explicit is not None:
        return _explicit_frames(config, explicit)
    if not 0 <= begin <= end:
        raise UnusableRowError(
            f"begin_frame_id {begin} and end_frame_id {end} are no segment; wanted 0 <= begin <= end"
        )
    if end - begin >= _LONGEST_SEGMENT:
        raise UnusableRowError(f"segment of more than {_LONGEST_SEGMENT} frames; is end_frame_id right?")
    if not _FPS[0] <= fps <= _FPS[1]:
        raise UnusableRowError(f"fps must be {_FPS[0]:g} to {_FPS[1]:g}, found {fps}")
    count = sampled_frames(config, begin=begin, end=end, fps=fps)
    if config.mode in ("duration", "whole"):
        return tuple(min(end, begin + math.floor(i * fps / config.video_fps + 0.5)) for i in range(count))
    if count == 1:
        return (begin,)
    return tuple(begin + math.floor(i * (end - begin) / (count - 1) + 0.5) for i in range(count))


def sampled_frames(config: FrameSelection, *, begin: int, end: int, fps: float) -> int:
    """How many frames the mode takes of a segment. Raises UnusableRowError when a filter leaves the segment out."""
    segment = end - begin + 1
    if config.mode == "whole":
        return longest_clip(1 + math.floor((segment - 1) * config.video_fps / fps))
    if config.mode == "duration":
        seconds, most = math.floor((end - begin) / fps), (config.video_frames - 1) // config.video_fps
        if config.drop_long_video and seconds > most:
            raise UnusableRowError(f"segment of {seconds} s is longer than {most} s (drop_long_video)")
        seconds = min(seconds, most)
        if seconds < (config.min_video_frames - 1) // config.video_fps:
            raise UnusableRowError(f"segment of {seconds} s is shorter than {config.min_video_frames} frames")
        return seconds * config.video_fps + 1
    if segment < config.min_video_frames:
        raise UnusableRowError(f"segment of {segment} frames is shorter than {config.min_video_frames}")
    if config.mode == "fixed_full":
        return config.video_frames
    step = config.video_fps if config.mode == "segment_full_floor_sec" else TEMPORAL_STRIDE
    return longest_clip(1 + step * ((min(segment, config.video_frames) - 1) // step))


def reference_frames(
    config: FrameSelection, *, begin: int, end: int, fps: float, container_fps: float, container_frames: int
) -> tuple[int, ...]:
    """The published sampling: times are spread over the container and cut to frame numbers.

    Args:
        config, begin, end, fps: as for `select_frames`.
        container_fps, container_frames: of the video file.

    Raises:
        UnusableRowError: as `select_frames`, or the segment ends more than 0.2 s after the container.
    """
    count = sampled_frames(config, begin=begin, end=end, fps=fps)
    start = begin / fps
    stop = start + (count - 1) / config.video_fps if config.mode == "duration" else (end + 1) / fps
    duration = container_frames / container_fps
    if stop > duration + _REFERENCE_SLACK_S:
        raise UnusableRowError(f"segment ends at {stop:.2f} s, the video at {duration:.2f} s")
    stop = min(stop, duration)
    first = math.ceil(container_fps * start)
    last = min(math.ceil(container_fps * stop), container_frames) - 1
    return tuple(int(frame) for frame in np.linspace(first, last, count).astype(int))


def _explicit_frames(config: FrameSelection, explicit: Sequence[int]) -> tuple[int, ...]:
    if not is_clip_length(len(explicit)):
        raise UnusableRowError(f"frame_idxs holds {len(explicit)} frames, which is not 4k+1; list 1, 5, 9, ... frames")
    if min(explicit) < 0:
        raise UnusableRowError(f"frame_idxs holds {min(explicit)}; frames count from 0")
    if config.mode not in ("duration", "whole") and len(explicit) < config.min_video_frames:
        raise UnusableRowError(f"frame_idxs holds {len(explicit)} frames, fewer than {config.min_video_frames}")
    return tuple(explicit)
