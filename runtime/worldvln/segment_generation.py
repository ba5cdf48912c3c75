"""One segment from what it rests on: its clips generated, decoded, and read as actions.

Legend: F frames, N patch tokens, D their width.
Source: spec/world_model.md 7, spec/action_decoder.md 4, 10.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from worldvln_edge.generation_profile import GenerationProfile
from worldvln_edge.runtime.engines.engine import Tensor
from worldvln_edge.runtime.worldvln.stage_clock import StageClock
from worldvln_edge.runtime.worldvln.video_stream import FeatureDecoder, State
from worldvln_edge.runtime.worldvln.world_model import GeneratedClip, WorldModelDriver

if TYPE_CHECKING:
    from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What a segment rests on; generating changes nothing of it but the driver's stored keys and values."""

    driver: WorldModelDriver  # has the text, and every clip before the segment
    decoder: FeatureDecoder  # committed up to the segment's start
    context_tokens: np.ndarray  # [F, N, D] of the frames in front of the segment


@dataclass(frozen=True, kw_only=True)
class GeneratedSegment:
    segment: int
    profile: GenerationProfile
    clips: tuple[GeneratedClip, ...]
    actions: np.ndarray  # float32 [step, 6], cm and deg; NaN or infinity where the model gave that
    tokens: np.ndarray  # [F, N, D] of the context frames and the segment's
    decoder_state: State  # after the segment

    @property
    def is_finite(self) -> bool:
        """Are the actions numbers?"""
        return bool(np.isfinite(self.actions).all())

    @property
    def held(self) -> Iterator[Tensor]:
        """Its arrays, and the decoder's state."""
        for clip in self.clips:
            yield from clip.arrays
        yield from (self.actions, self.tokens, *(self.decoder_state or {}).values())


def generate_segment(
    policy: WorldVLNPolicy,
    basis: Basis,
    segment: int,
    *,
    seed: int,
    profile: GenerationProfile,
    record: bool,
    clock: StageClock,
) -> Generator[None, None, GeneratedSegment]:
    """Generate, pausing between steps; other sessions may use the engines meanwhile.

    Args:
        policy: engines, tables and horizon.
        segment: 0-based.
        seed: of the draws.
        profile: how deep.
        record: keep bits and probabilities.
        clock: of the stages.
    """
    indices = policy.clips_of(segment)
    with clock("world_model_context"):
        basis.driver.prepare(indices[0], profile)
    clips = []
    for index in indices:
        steps = basis.driver.generation(index, seed, more_follow=index != indices[-1], record=record, profile=profile)
        while True:
            try:
                with clock("world_model_step"):
                    next(steps)
            except StopIteration as end:
                clips.append(end.value)
                break
            yield
    with clock("vae_decoder"):
        features, after = basis.decoder.decode(np.concatenate([clip.codes for clip in clips], axis=1))
    with clock("action_decoder"):
        tokens = np.concatenate([basis.context_tokens, policy.tokens(features)])
        points = policy.config.horizon.points
        actions = policy.actions(tokens, points[segment], points[segment + 1])
    return GeneratedSegment(
        segment=segment, profile=profile, clips=tuple(clips), actions=actions, tokens=tokens, decoder_state=after
    )
