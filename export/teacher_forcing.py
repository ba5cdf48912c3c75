"""Steps of the world model whose inputs are known in advance, because their bits are those of real frames.

Generation feeds each step with the bits that were drawn before it, so every step needs all blocks. With the bits of
real frames (teacher forcing, as in training) no input waits for an output, and a block can be run over all steps
before the next block is read.

Legend: F frames, H W pixels, D latent channels, T latent frames, L tokens.
Source: spec/world_model.md 2.7, 3.3, 6 (loop), 9.1 (work that is left out because nobody reads its result).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.images import transform
from worldvln_edge.models.key_values import Reference
from worldvln_edge.models.quantizer import add_codes, encode_bits, step_input, tokens_of_latents
from worldvln_edge.models.video_vae import VideoVAE
from worldvln_edge.scale_schedule import ScaleSchedule, ScaleStep


@dataclass(frozen=True, kw_only=True)
class ForcedStep:
    """One step of a bundle's flight."""

    step: ScaleStep
    first_frame: int
    """First latent frame of its clip."""
    references: tuple[Reference, ...]
    """Earlier scales that it sees, besides the text and itself."""
    is_kept: bool
    """Later steps see its keys and values."""


def forced_steps(config: ModelConfig) -> list[ForcedStep]:
    """Every step that the segments of one flight run, each once.

    Clips that are generated run whole. Those before the first segment are observed only: of them, the bundle runs the
    scales that later clips see.
    """
    schedule = _schedule(config)
    stride = config.video_vae.temporal_stride
    observed = 1 + (config.horizon.points[0] - 1) // stride
    steps = []
    for clip in schedule.clips:
        seen_later = schedule.scales_referred_to(clip.index)
        seen_inside = {
            s for step in clip.steps for c, s in schedule.references_of_scale(clip.index, step.scale) if c == clip.index
        }
        for step in clip.steps:
            is_kept = step.is_last_repetition and (step.scale in seen_later or step.scale in seen_inside)
            if is_kept or clip.first_frame >= observed:
                steps.append(
                    ForcedStep(
                        step=step,
                        first_frame=clip.first_frame,
                        references=schedule.references_of_scale(clip.index, step.scale),
                        is_kept=is_kept,
                    )
                )
    return steps


@torch.no_grad()
def forced_inputs(vae: VideoVAE, config: ModelConfig, frames_FHW3: np.ndarray) -> Iterator[Tensor]:
    """Latent inputs float32 [1, L, D] of `forced_steps`, in order.

    Args:
        vae: its device is used.
        config: of the model.
        frames_FHW3: uint8 RGB, any size, at least as many as the horizon has.
    """
    latents = _latents(vae, config, frames_FHW3)
    wanted = {step.step.real_scale_id for step in forced_steps(config)}
    for clip in _schedule(config).clips:
        target = latents[:, :, clip.frame_slice]
        bits_of_steps, _ = encode_bits(target, clip, config.world_model)
        summed = torch.zeros_like(target)
        for step, bits in zip(clip.steps, bits_of_steps, strict=True):
            if step.real_scale_id in wanted:
                yield tokens_of_latents(step_input(summed, step))
            summed = add_codes(summed, bits)


def _latents(vae: VideoVAE, config: ModelConfig, frames_FHW3: np.ndarray) -> Tensor:
    """Raw features float32 [1, D, T, H, W] of the horizon, a latent frame at a time: activations of many frames at
    full resolution would be larger than a block of the transformer."""
    stride, device = config.video_vae.temporal_stride, vae.proj_down.weight.device
    parts, state, start = [], None, 0
    while start < config.horizon.num_frames:
        count = 1 if state is None else stride
        group = np.stack([transform(frame, config.image_hw) for frame in frames_FHW3[start : start + count]], 1)
        encoded, state = vae.encode(torch.from_numpy(group)[None].to(device), state)
        parts.append(vae.raw_features(encoded).float())
        start += count
    return torch.cat(parts, 2)


def _schedule(config: ModelConfig) -> ScaleSchedule:
    return ScaleSchedule(config.schedule, 1 + (config.horizon.num_frames - 1) // config.video_vae.temporal_stride)
