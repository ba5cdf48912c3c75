"""Scale schedule: which (clip, scale, repetition) steps exist, what they see, and where their frames lie.

Legend: T latent frames, h w rows and columns of a scale, S scales per clip, sid = clip*S + scale (global scale index).
Source: spec/world_model.md 3.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from worldvln_edge.config import ConfigError, ScheduleConfig

_BASE_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 40, 60)
_BASE_ASPECTS = (1.0, 100 / 116, 3 / 4, 2 / 3, 9 / 16, 1 / 2, 2 / 5, 1 / 3)
SCALES_PER_PIXEL_BUDGET = {"0.06M": 11, "0.25M": 13, "0.40M": 14, "0.90M": 15}


def aspect_templates() -> dict[float, tuple[tuple[int, int], ...]]:
    """All 15 aspect templates: key (h/w, cut to 3 digits) -> 15 (rows, columns) pairs, in table order."""
    templates: dict[float, tuple[tuple[int, int], ...]] = {}
    for aspect in _BASE_ASPECTS:
        sizes = []
        for side in _BASE_SIDES:
            exact_width = math.sqrt(side * side / aspect)
            sizes.append((int(np.rint(exact_width * aspect)), int(np.rint(exact_width))))
        rows, cols = sizes[-1]
        templates[math.floor(1000 * rows / cols) / 1000] = tuple(sizes)
        if aspect != 1.0:
            templates[math.floor(1000 * cols / rows) / 1000] = tuple((w, h) for h, w in sizes)
    return templates


def pixel_budget_scales(pixel_budget: str, aspect: float) -> tuple[tuple[int, int], ...]:
    """Scale sizes of the template nearest to `aspect` (h/w) under a pixel budget (`0.06M` ... `0.90M`)."""
    if pixel_budget not in SCALES_PER_PIXEL_BUDGET:
        raise ConfigError(f"unknown pixel budget {pixel_budget!r}; choose one of {', '.join(SCALES_PER_PIXEL_BUDGET)}")
    templates = aspect_templates()
    nearest = min(templates, key=lambda key: abs(key - aspect))
    return templates[nearest][: SCALES_PER_PIXEL_BUDGET[pixel_budget]]


@dataclass(frozen=True, kw_only=True)
class ScaleStep:
    """One forward pass of the world model: one repetition of one scale of one clip."""

    clip: int
    scale: int
    repetition: int
    real_scale_id: int  # running index over (scale, repetition) of all clips: entry of the observed bits, RoPE position
    step_in_clip: int  # running index over (scale, repetition) inside the clip: counter of the random draws
    thw: tuple[int, int, int]
    is_last_repetition: bool
    is_semantic: bool

    @property
    def tokens(self) -> int:
        t, h, w = self.thw
        return t * h * w


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A group of latent frames that is generated together. Clip 0 is the first latent frame alone."""

    index: int
    first_frame: int  # latent frames, 0-based
    frames: int
    steps: tuple[ScaleStep, ...]

    @property
    def frame_slice(self) -> slice:
        return slice(self.first_frame, self.first_frame + self.frames)


class ScaleSchedule:
    """The steps of a video of `latent_frames` latent frames, clip by clip."""

    def __init__(self, config: ScheduleConfig, latent_frames: int):
        if latent_frames < 1:
            raise ConfigError(f"a schedule needs at least one latent frame, found {latent_frames}")
        self.config = config
        self.latent_frames = latent_frames
        per_clip = config.frames_inner_clip
        lengths = [1] + [min(per_clip, latent_frames - first) for first in range(1, latent_frames, per_clip)]
        clips, first_frame, real_scale_id = [], 0, 0
        for index, frames in enumerate(lengths):
            steps: list[ScaleStep] = []
            repetitions = config.image_repetition if index == 0 else config.video_repetition
            for scale, ((h, w), count) in enumerate(zip(config.scale_hw, repetitions, strict=True)):
                for repetition in range(count):
                    steps.append(
                        ScaleStep(
                            clip=index,
                            scale=scale,
                            repetition=repetition,
                            real_scale_id=real_scale_id,
                            step_in_clip=len(steps),
                            thw=(frames, h, w),
                            is_last_repetition=repetition == count - 1,
                            is_semantic=scale < config.semantic_scales,
                        )
                    )
                    real_scale_id += 1
            clips.append(Clip(index=index, first_frame=first_frame, frames=frames, steps=tuple(steps)))
            first_frame += frames
        self.clips = tuple(clips)

    def steps(self) -> Iterator[ScaleStep]:
        for clip in self.clips:
            yield from clip.steps

    def last_step(self, clip: int, scale: int) -> ScaleStep:
        """The last repetition of a scale: the step whose keys and values later clips see."""
        return next(s for s in self.clips[clip].steps if s.scale == scale and s.is_last_repetition)

    def references(self, clip: int) -> tuple[tuple[int, int], ...]:
        """Earlier (clip, scale) pairs that every scale of `clip` attends to, in key order (3.3).

        With `context_from_largest_no <= 0` this holds all scales of the earlier clips only; use
        `references_of_scale` there, because a scale then also sees the earlier scales of its own clip.
        """
        config, scales = self.config, self.config.scales_per_clip
        if config.context_from_largest_no <= 0:
            return tuple((c, s) for c in range(clip) for s in range(scales))
        pairs = [
            (clip - 1 - i, max(0, scales - config.context_from_largest_no - config.context_interval * i))
            for i in range(clip)
        ]
        return tuple(pairs[: config.context_frames // config.frames_inner_clip])

    def references_of_scale(self, clip: int, scale: int) -> tuple[tuple[int, int], ...]:
        """Earlier (clip, scale) pairs that one scale attends to."""
        own = () if self.config.context_from_largest_no > 0 else tuple((clip, s) for s in range(scale))
        return self.references(clip) + own

    def scales_referred_to(self, clip: int) -> tuple[int, ...]:
        """Scales of `clip` that a later clip of this schedule refers to, finest first."""
        later = range(clip + 1, len(self.clips))
        return tuple(sorted({s for k in later for c, s in self.references(k) if c == clip}, reverse=True))
