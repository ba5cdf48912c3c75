"""Teacher-forced prediction in PyTorch: what the world model says about the next clip of recorded flights, in batches.

Serving generates one clip of one flight with cached keys and values (runtime/worldvln/world_model.py). Training needs
the same clip for many flights with different texts at once, so every step runs its references, itself and the text as
one masked sequence. Both draw bits by the same rule.

Legend: B rows, C latent channels, T latent frames of a clip, H W latent grid.
Source: spec/world_model.md 6 (sampling, guidance); spec/training.md 8.6 (head trained on predicted latents).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.guidance import adaptive_projected_guidance
from worldvln_edge.models.quantizer import (
    EncodedScale,
    add_codes,
    bits_per_token,
    encode_bits,
    step_input,
    tokens_of_latents,
)
from worldvln_edge.models.world_model import WorldModel
from worldvln_edge.scale_schedule import Clip, ScaleSchedule
from worldvln_edge.training.stages.backbone import visual_hidden


@torch.no_grad()
def predict_clip(
    model: WorldModel,
    config: ModelConfig,
    schedule: ScaleSchedule,
    clip_index: int,
    observed_BCTHW: Tensor,
    text_BXt: Tensor,
    text_lengths: list[int],
    generator: torch.Generator | Sequence[torch.Generator],
    *,
    is_teacher_forced: bool = False,
) -> Tensor:
    """Sample the summed codes of one clip given the raw features of the clips before it.

    Args:
        model: the world model; the other tensors must be on its device.
        observed_BCTHW: raw features of at least the latent frames before the clip.
        text_BXt, text_lengths: as `TextBatch.features` gives them.
        generator: CPU generator of the draws, one for the batch or one for every row.
        is_teacher_forced: show every scale the true bits of the coarser ones in the place of those that were drawn;
            `observed_BCTHW` holds the clip itself, too.

    Returns:
        float32 [B, C, T, H, W].
    """
    references = reference_closure(schedule, clip_index)
    context = [observed_scale(schedule.clips[c], scale, observed_BCTHW, config) for c, scale in references]
    clip = schedule.clips[clip_index]
    rows, cols = config.schedule.latent_hw
    batch, device = observed_BCTHW.shape[0], observed_BCTHW.device
    codes = torch.zeros(batch, config.world_model.latent_channels, clip.frames, rows, cols, device=device)
    uncond = model.cfg_uncond[: text_BXt.shape[1]].expand_as(text_BXt)
    own: list[EncodedScale] = []
    true_bits = None
    if is_teacher_forced:
        true_bits, _ = encode_bits(observed_BCTHW[:, :, clip.frame_slice], clip, config.world_model)
    shown = codes
    for index, step in enumerate(clip.steps):
        width = bits_per_token(step, config.world_model)
        current = EncodedScale(
            clip=clip_index,
            scale=step.scale,
            real_scale_id_B=torch.full((batch,), step.real_scale_id),
            input_BLC=tokens_of_latents(step_input(shown, step)),
            label_bits_BLd=torch.zeros(batch, step.tokens, width, dtype=torch.bool, device=device),
        )
        scales = [*context, *own, current]
        logits = []
        for text in (text_BXt, uncond) if config.generation.cfg != 1 else (text_BXt,):
            hidden = visual_hidden(model, schedule, scales, text, text_lengths)[:, -step.tokens :]
            tau = config.generation.tau_image if clip_index == 0 else config.generation.tau_video
            logits.append(model.logits(hidden, step.is_semantic) / tau)
        guided = logits[0]
        if len(logits) == 2:
            guidance = config.generation
            guided = adaptive_projected_guidance(
                logits[0], logits[1], guidance.cfg, guidance.apg_norm_threshold, guidance.apg_eta
            )
        draws = _uniform(tuple(guided.shape[:-1]), generator).to(device)
        bits = draws < torch.sigmoid(guided[..., 1] - guided[..., 0])
        codes = add_codes(codes, bits.unflatten(1, step.thw))
        shown = codes if true_bits is None else add_codes(shown, true_bits[index])
        if schedule.config.context_from_largest_no <= 0 and step.is_last_repetition:
            own.append(current)
    return codes


def predict_flight(
    model: WorldModel,
    config: ModelConfig,
    schedule: ScaleSchedule,
    observed_BCTHW: Tensor,
    text_BXt: Tensor,
    text_lengths: list[int],
    generator: torch.Generator | Sequence[torch.Generator],
    *,
    is_teacher_forced: bool = False,
) -> Tensor:
    """Summed codes of every clip but the first, each predicted from the real ones before it: float32 [B, C, T-1, H, W].

    Args as `predict_clip`; `observed_BCTHW` holds all latent frames of the schedule.
    """
    return torch.cat(
        [
            predict_clip(
                model,
                config,
                schedule,
                clip.index,
                observed_BCTHW,
                text_BXt,
                text_lengths,
                generator,
                is_teacher_forced=is_teacher_forced,
            )
            for clip in schedule.clips[1:]
        ],
        2,
    )


def _uniform(shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator)
    return torch.stack([torch.rand(shape[1:], generator=own) for own in generator])


def reference_closure(schedule: ScaleSchedule, clip_index: int) -> list[tuple[int, int]]:
    """References of a clip and, in turn, theirs: without them the keys and values of the first would differ."""
    found: set[tuple[int, int]] = set()
    waiting = list(schedule.references(clip_index))
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting.extend(schedule.references_of_scale(*key))
    return sorted(found)


def observed_scale(clip: Clip, scale: int, observed_BCTHW: Tensor, config: ModelConfig) -> EncodedScale:
    """The last repetition of a scale of an observed clip; `observed_BCTHW` holds at least the clip's latent frames."""
    bits, _ = encode_bits(observed_BCTHW[:, :, clip.frame_slice], clip, config.world_model)
    total = torch.zeros_like(observed_BCTHW[:, :, clip.frame_slice])
    for step, step_bits in zip(clip.steps, bits, strict=True):
        if step.scale == scale and step.is_last_repetition:
            return EncodedScale(
                clip=clip.index,
                scale=scale,
                real_scale_id_B=torch.full((len(total),), step.real_scale_id),
                input_BLC=tokens_of_latents(step_input(total, step)),
                label_bits_BLd=step_bits.flatten(1, 3),
            )
        total = add_codes(total, step_bits)
    raise ValueError(f"clip {clip.index} has no scale {scale}")
