"""Parts of a schedule, by name: what a flight that is too long for one sequence trains on in one epoch.

Source: spec/training.md 2.5 (Product).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from worldvln_edge.config import ConfigError
from worldvln_edge.models.attention_mask import ScaleKey
from worldvln_edge.scale_schedule import ScaleSchedule

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "image": 20,
    "c1-sem8": 15,
    "c1-sem": 10,
    "c1-d0": 4,
    "c1-d1": 2,
    "c1-d2": 1,
    "c2-sem": 10,
    "c2-d0": 3,
    "c2-d1": 2,
    "c2-d2": 1,
    "c3-sem": 10,
    "c3-d0": 3,
    "c3-d1": 2,
    "c3-d2": 1,
    "all-sem": 5,
}
_NAME = re.compile(r"c([1-9]\d*)-(?:sem([1-9]\d*)?|d(\d+))")


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError for names that mean nothing, or weights that cannot be drawn from."""
    for name, weight in weights.items():
        if name not in ("image", "all-sem") and not _NAME.fullmatch(name):
            raise ConfigError(
                f"partial_scales: {name!r} names no part of a schedule; choose image, all-sem, c1-sem, c1-sem8 (its "
                "first 8 semantic scales) or c1-d0 (its first detail scale), with any clip's number for 1"
            )
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"partial_scales: weight of {name!r} must be finite and >= 0, found {weight}")
    if not any(weights.values()):
        raise ConfigError("partial_scales: no option has a weight above 0")


def partial_scales(name: str, schedule: ScaleSchedule) -> tuple[ScaleKey, ...] | None:
    """Scales of an option, in schedule order; None where the schedule has no such clip or scale.

    - `image`: all of clip 0.
    - `c1-sem`: all of clip 0 and the semantic scales of clip 1; `c1-sem8`: its first 8 semantic scales;
      `c1-d0`: `c1-sem` and the first detail scale of clip 1.
    - `c2-sem`, later clips alike: the last scale of every earlier clip and the semantic scales of clip 2;
      `c2-d0`: the last scale of every earlier clip and the first detail scale of clip 2.
    - `all-sem`: the semantic scales of all clips and the detail scales of clip 0.
    """
    scales, semantic = schedule.config.scales_per_clip, schedule.config.semantic_scales
    image = tuple((0, scale) for scale in range(scales))
    if name == "image":
        return image
    if name == "all-sem":
        if semantic == 0:
            return None
        return image + tuple((clip.index, scale) for clip in schedule.clips[1:] for scale in range(semantic))
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"partial_scales: {name!r} names no part of a schedule")
    clip, first, detail = int(match[1]), match[2], match[3]
    if clip >= len(schedule.clips):
        return None
    context = image if clip == 1 else tuple((earlier, scales - 1) for earlier in range(clip))
    own_semantic = tuple((clip, scale) for scale in range(semantic))
    if detail is not None:
        scale = semantic + int(detail)
        if scale >= scales:
            return None
        return context + (own_semantic if clip == 1 else ()) + ((clip, scale),)
    # As many as there are, or more, is what the option without a number says.
    if semantic == 0 or (first is not None and int(first) >= semantic):
        return None
    return context + own_semantic[: int(first) if first is not None else None]


def draw_scales(
    schedule: ScaleSchedule, weights: Mapping[str, float], generator: torch.Generator
) -> tuple[ScaleKey, ...]:
    """Scales of one option, drawn by weight among those that the schedule has.

    Raises:
        ConfigError: the schedule has none of the options.
    """
    options = {name: scales for name in weights if (scales := partial_scales(name, schedule)) is not None}
    chances = torch.tensor([weights[name] for name in options], dtype=torch.float64)
    if not options or chances.sum() == 0:
        raise ConfigError(
            f"partial_scales: a flight of {len(schedule.clips)} clips has none of {', '.join(weights)}; add an option "
            "such as image"
        )
    return list(options.values())[int(torch.multinomial(chances, 1, generator=generator))]
