"""The words of a row: which caption, how much of it, and what is added.

The duration tag is not added here: `worldvln_edge.prompts.tagged_prompt` does, once, for training and serving alike. A
caption that brings a tag of its own loses it.
Source: spec/training.md 1.3.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
import torch

_TAG = re.compile(r"(?:\s*<<<t=[^>]*>>>)+")


class CaptionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where captions stand and what is drawn."""

    caption_field: str = "tarsier2_caption"
    second_field: str = "MiniCPM_V_2_6_caption"
    """If non-empty in a row, one of the two is drawn, 50/50."""
    enable_dynamic_length_prompt: bool = False
    short_cap_prob: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.3
    """With dynamic length: how often only the first sentences are kept. Of image rows: how often `text` is shown."""


def draw_caption(
    caption: str, second: str, quality_prompt: str, config: CaptionConfig, generator: torch.Generator | None
) -> str:
    """The instruction of a row.

    Args:
        caption: the row's caption, not blank and not only a tag.
        second: another one, or "".
        quality_prompt: appended after a space, unless "".
        config: what may be drawn.
        generator: of this row in this epoch; None draws nothing: the first caption, whole.
    """
    text = caption
    if generator is not None:
        if without_tag(second) and _draw(generator) < 0.5:
            text = second
        text = without_tag(text)  # before it is cut: the published tag, <<<t=3.0s>>>, has a point in it
        if config.enable_dynamic_length_prompt and _draw(generator) < config.short_cap_prob:
            text = shorten(text, generator)
    text = without_tag(text)
    return f"{text} {quality_prompt}" if quality_prompt else text


def draw_image_caption(
    long_caption: str, text: str, quality_prompt: str, config: CaptionConfig, generator: torch.Generator | None
) -> str:
    """The words of a row that shows one image: the long caption, or now and then the short one.

    Args:
        long_caption, text: one of them may be "".
        quality_prompt, config, generator: as for `draw_caption`; `short_cap_prob` is the share of `text`.
    """
    has_both = bool(without_tag(long_caption)) and bool(without_tag(text))
    is_short = has_both and generator is not None and _draw(generator) < config.short_cap_prob
    chosen = text if is_short or not without_tag(long_caption) else long_caption
    return draw_caption(chosen, "", quality_prompt, CaptionConfig(), None)


def shorten(caption: str, generator: torch.Generator) -> str:
    """The first k sentences, k uniform in 1..n; a caption of fewer than two sentences as it is."""
    sentences = [part for part in caption.split(".") if part.strip()]
    if len(sentences) < 2:
        return caption
    keep = int(torch.randint(1, len(sentences) + 1, (), generator=generator))
    return ".".join(sentences[:keep]) + "."


def without_tag(caption: str) -> str:
    """The caption without duration tags in front and without spaces around it."""
    return _TAG.sub("", caption, count=1).strip() if _TAG.match(caption) else caption.strip()


def _draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
