"""A bundle's world model run over a flight whose bits are given: the probability of every bit that it would have drawn.

Observed bits come from the given latents, drawn bits are PyTorch's, so both sides see the same past at every step.
Source: spec/world_model.md 6, 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from worldvln_edge.export.torch_flight import TorchSegment
from worldvln_edge.models.generation import StepRecord
from worldvln_edge.runtime.worldvln.kv_cache import KVCache
from worldvln_edge.runtime.worldvln.multiscale import ObservedClip, encode_clip
from worldvln_edge.runtime.worldvln.world_model import GeneratedClip, WorldModelDriver
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy


def forced_clips(
    policy: WorldVLNPolicy, instruction: str, segments: Sequence[TorchSegment]
) -> Iterator[tuple[TorchSegment, int, GeneratedClip]]:
    """Every generated clip of a flight.

    Args:
        policy: of the bundle.
        instruction: without tags.
        segments: of one flight in PyTorch; gives latents and bits.

    Yields:
        (segment, index of the clip, what the bundle makes of it).
    """
    driver = WorldModelDriver(policy.engines, policy.tables, KVCache(policy.workspace))
    driver.set_text(policy.encode_text(instruction, ""))
    seen = 0
    for segment in segments:
        observed = observed_clips(policy, segment)
        for index in range(seen, len(observed)):
            driver.observe(observed[index])
        seen = len(observed)
        last = segment.generated.records[-1].step.clip
        for index in range(seen, last + 1):
            forced = clip_bits(policy, segment.generated.bits, index)
            yield segment, index, driver.generate(index, 0, forced_bits=forced, more_follow=index < last)


def observed_clips(policy: WorldVLNPolicy, segment: TorchSegment) -> list[ObservedClip]:
    """The observed clips of a segment, quantised as the runtime does it, from PyTorch's latents."""
    latents, clips = segment.latents_DTHW.numpy(), []
    for clip in policy.tables.schedule.clips:
        if clip.frame_slice.stop <= latents.shape[1]:
            clips.append(encode_clip(latents[:, clip.frame_slice], clip, policy.config.world_model))
    return clips


def clip_bits(policy: WorldVLNPolicy, bits: list[torch.Tensor], clip_index: int) -> list[np.ndarray]:
    """Bits of one clip: bool [T, h, w, d] per step."""
    return [bits[step.real_scale_id][0].numpy() for step in policy.tables.schedule.clips[clip_index].steps]


def records_of(segment: TorchSegment, clip_index: int) -> list[StepRecord]:
    """Records of the steps of one clip."""
    return [record for record in segment.generated.records if record.step.clip == clip_index]


def probabilities(record: StepRecord) -> np.ndarray:
    """Probability of every bit of a step: float64 [L, d]."""
    guided = record.guided_BLd2[0].double()
    return torch.sigmoid(guided[..., 1] - guided[..., 0]).numpy()
