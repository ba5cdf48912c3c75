"""A flight computed in PyTorch the long way: the prefix again for every segment, nothing streamed, nothing cached.

It is what a bundle is held against. Every intermediate result is kept, so that each stage can be compared
on the same input.

Legend: F frames, D latent channels, T latent frames, H W latent grid, Cf feature channels, N tokens of a frame.
Source: spec/world_model.md 7; spec/video_vae.md 4, 5; spec/action_decoder.md 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldvln_edge.action_windows import context_frame
from worldvln_edge.images import transform
from worldvln_edge.models.generation import Generated, TextCondition, generate
from worldvln_edge.models.quantizer import encode_bits
from worldvln_edge.models.worldvln import Checkpoint
from worldvln_edge.scale_schedule import ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class TorchSegment:
    """One segment and everything on its way."""

    latents_DTHW: Tensor  # raw features of the observed prefix
    observed_bits: list[Tensor]  # bool [1, T, h, w, d] per step of the observed clips
    generated: Generated  # observed clips leaked, the segment's clips drawn, with records
    features_1CFhw: Tensor  # of all frames up to the segment's end
    tokens_FND: Tensor  # of the frames that the windows look at
    logits: Tensor
    actions: np.ndarray  # float32 [step, 6], cm and deg


@torch.no_grad()
def fly_in_torch(
    checkpoint: Checkpoint, ids_1L: np.ndarray, frames: list[np.ndarray], *, seed: int
) -> list[TorchSegment]:
    """All segments of one flight, conditioned on the given frames.

    Args:
        checkpoint: loaded in float32.
        ids_1L: int64 token ids of the tagged prompt.
        frames: uint8 RGB, at least up to the start of the last segment.
        seed: of the draws.
    """
    model, config = checkpoint.model, checkpoint.config
    video = torch.from_numpy(np.stack([transform(frame, config.image_hw) for frame in frames], 1))[None]
    features = model.text_encoder(torch.from_numpy(ids_1L))[0]
    text = TextCondition.build(model.world_model, features, guided=config.generation.cfg != 1)
    return [
        _segment(checkpoint, text, video, observed, following, seed)
        for observed, following in zip(config.horizon.points, config.horizon.points[1:], strict=False)
    ]


def _segment(
    checkpoint: Checkpoint, text: TextCondition, video: Tensor, observed: int, following: int, seed: int
) -> TorchSegment:
    model, config, head = checkpoint.model, checkpoint.config, checkpoint.model.latent_head
    stride = config.video_vae.temporal_stride
    latents = model.vae.raw_features(model.vae.encode(video[:, :, :observed])[0])
    prefix = ScaleSchedule(config.schedule, latents.shape[2])
    bits = [
        step
        for clip in prefix.clips
        for step in encode_bits(latents[:, :, clip.frame_slice], clip, config.world_model)[0]
    ]
    schedule = ScaleSchedule(config.schedule, 1 + (following - 1) // stride)
    leak = len(prefix.clips) * config.schedule.scales_per_clip
    generated = generate(
        model.world_model, schedule, text, config.generation, seed, forced_bits=bits, leak=leak, record=True
    )
    features, _ = model.vae.decode_features(generated.summed_BcTHW)
    first = context_frame(observed, head.config.left_context)
    tokens = head.tokens(features[:, :, first - 1 : following])
    return TorchSegment(
        latents_DTHW=latents[0],
        observed_bits=bits,
        generated=generated,
        features_1CFhw=features,
        tokens_FND=tokens,
        logits=head.logits(tokens),
        actions=head.actions(
            tokens, checkpoint.stats.latent_head, observed_frames=observed, next_observed_frames=following
        ),
    )
