"""Clips of many flights at once, with cached keys and values: observe one, generate the next, and score its bits.

The same walk as `models/generation.py` for rows with texts of their own. Rows never meet: on a CPU a row's numbers are
the same, bit for bit, whatever the other rows hold, as long as their number is the same; with another number they
agree up to rounding.

Legend: B rows, L tokens, c latent channels, T H W latent grid, t h w d frames, rows, columns and bits of a step.
Source: spec/world_model.md 6 (draws), 7 (observed context); spec/training.md 5.4, 5.9 items 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldvln_edge.models.generation import TextCondition
from worldvln_edge.models.key_values import ReferenceKV
from worldvln_edge.models.quantizer import add_codes, encode_bits, step_input, tokens_of_latents
from worldvln_edge.models.world_model import LayerKV, WorldModel
from worldvln_edge.noise import step_uniforms
from worldvln_edge.rope import visual_rope
from worldvln_edge.scale_schedule import ScaleSchedule, ScaleStep
from worldvln_edge.training.grpo.policy_steps import PolicyScales, Repetitions, is_policy_step, rollout_steps


@dataclass(frozen=True, kw_only=True)
class PromptKV:
    """Keys and values of one prompt, filled up to the model's text length."""

    layers: list[LayerKV]
    """Per layer two tensors [1, kv_heads, text_max_tokens, head_dim]."""
    tokens: int
    """How many of them are the prompt's."""

    @classmethod
    @torch.no_grad()
    def build(cls, model: WorldModel, features_Lt: Tensor) -> PromptKV:
        """From text features [L, text_channels] of the tagged instruction; errors as `TextCondition.build`."""
        layers = TextCondition.build(model, features_Lt, guided=False).key_values(model).text
        tokens, length = features_Lt.shape[0], model.config.text_max_tokens
        padding = (0, 0, 0, length - tokens)
        return cls(layers=[(F.pad(keys, padding), F.pad(values, padding)) for keys, values in layers], tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class GeneratedClips:
    """One clip of every row. Tuples have one entry for each of `rollout_steps`."""

    codes_BcTHW: Tensor
    """float32: summed codes, input of the VAE decoder."""
    bits: tuple[Tensor, ...]
    """bool [B, t, h, w, d]."""
    log_probs: tuple[Tensor, ...]
    """float32, as `bits`; [B, 0] where a step is no policy step."""


class ClipGenerator:
    """What the world model knows of the flights of a batch: their texts, and what was observed.

    Args:
        model: the world model.
        schedule: of a whole flight.
        prompts: one a row.
        policy_scales, repetitions: see `policy_steps.py`.
    """

    def __init__(
        self,
        model: WorldModel,
        schedule: ScaleSchedule,
        prompts: Sequence[PromptKV],
        *,
        policy_scales: PolicyScales,
        repetitions: Repetitions,
    ):
        self._model, self._schedule = model, schedule
        self._policy_scales, self._repetitions = policy_scales, repetitions
        layers = zip(*(prompt.layers for prompt in prompts), strict=True)
        self._kv = ReferenceKV([(torch.cat([k for k, _ in each]), torch.cat([v for _, v in each])) for each in layers])
        counts = torch.tensor([prompt.tokens for prompt in prompts])
        self._is_text_BL = (torch.arange(model.config.text_max_tokens) < counts[:, None]).to(model.cfg_uncond.device)

    @torch.no_grad()
    def observe(self, clip_index: int, latents_BcTHW: Tensor) -> Tensor:
        """Take in the next clip as it was seen: keys and values of what later clips refer to.

        Args:
            clip_index: 0, 1, ... in order.
            latents_BcTHW: raw features of the clip.

        Returns:
            Its summed codes, float32 as the latents.
        """
        schedule, clip = self._schedule, self._schedule.clips[clip_index]
        self._kv.drop_unused(schedule, clip_index)
        bits, codes = encode_bits(latents_BcTHW, clip, self._model.config)
        kept = self._kept_scales(clip_index)
        summed = torch.zeros_like(codes)
        for step, step_bits in zip(clip.steps, bits, strict=True):
            if step.is_last_repetition and step.scale in kept:
                _, own = self._run(step, step_input(summed, step))
                self._kv.keep((clip_index, step.scale), own)
            summed = add_codes(summed, step_bits)
        self._kv.drop_unused(schedule, clip_index + 1)
        return codes

    @torch.no_grad()
    def generate(
        self, clip_index: int, seeds: Sequence[int], forced_bits: Sequence[Tensor] | None = None
    ) -> GeneratedClips:
        """Generate the clip behind those that were observed; what is known of the flights stays as it is.

        Args:
            clip_index: the next clip.
            seeds: one a row; a drawn bit depends on (seed, clip, step, position) and on its probability only.
            forced_bits: bool [B, t, h, w, d] for each of `rollout_steps`, scored in the place of draws.
        """
        clip, model = self._schedule.clips[clip_index], self._model
        grid = (len(seeds), model.config.latent_channels, *clip.steps[-1].thw)
        codes = torch.zeros(grid, device=model.cfg_uncond.device)
        used, log_probs = [], []
        for index, step in enumerate(rollout_steps(clip, self._repetitions)):
            hidden, own = self._run(step, step_input(codes, step))
            logits = model.logits(hidden, step.is_semantic)
            margin = (logits[..., 1] - logits[..., 0]).unflatten(1, step.thw)
            is_drawn = is_policy_step(step, self._policy_scales)
            if forced_bits is not None:
                bits = forced_bits[index].to(margin.device)
            elif is_drawn:
                bits = _uniforms(seeds, step, margin.shape[-1]).to(margin.device) < torch.sigmoid(margin)
            else:
                bits = margin > 0
            used.append(bits)
            log_probs.append(F.logsigmoid(torch.where(bits, margin, -margin)) if is_drawn else margin[:, :0, 0, 0, 0])
            codes = add_codes(codes, bits)
            if self._sees_own_scales and step.is_last_repetition:
                self._kv.keep((clip_index, step.scale), own)  # replaced when the clip is observed
        return GeneratedClips(codes_BcTHW=codes, bits=tuple(used), log_probs=tuple(log_probs))

    @property
    def _sees_own_scales(self) -> bool:
        return self._schedule.config.context_from_largest_no <= 0

    def _kept_scales(self, clip_index: int) -> set[int]:
        own = range(self._schedule.config.scales_per_clip) if self._sees_own_scales else ()
        return {*self._schedule.scales_referred_to(clip_index), *own}

    def _run(self, step: ScaleStep, latents_BcThw: Tensor) -> tuple[Tensor, list[LayerKV]]:
        model, config = self._model, self._model.config
        first_frame, grid = self._schedule.clips[step.clip].first_frame, self._schedule.config.latent_hw
        rope = torch.from_numpy(visual_rope(step, first_frame, grid, config.text_max_tokens, config.head_dim))
        past = self._kv.context(self._schedule.references_of_scale(step.clip, step.scale))
        seen_before_text = past[0][0].shape[2] - self._is_text_BL.shape[1]
        mask_BL = F.pad(F.pad(self._is_text_BL, (seen_before_text, 0), value=True), (0, step.tokens), value=True)
        x_BLC = model.embed_latents(tokens_of_latents(latents_BcThw))
        return model.forward_blocks(x_BLC, rope.to(x_BLC.device), past, mask_BL[:, None, None])


def _uniforms(seeds: Sequence[int], step: ScaleStep, bits: int) -> Tensor:
    rows = [step_uniforms(seed, step.clip, step.step_in_clip, step.thw, bits) for seed in seeds]
    return torch.from_numpy(np.stack(rows))
