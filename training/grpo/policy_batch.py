"""Flown segments laid out for one teacher-forced pass: a masked sequence per segment, with the bits to be scored.

Every scored step of a clip is a document of the sequence: it sees the observed clips before it, as they were encoded in
flight, and the text. A step that is repeated with a state of its own gets a sequence of its own, because other scales
see the last repetition of it only.

Legend: B samples (a segment of a flight each), N most bits of a sample, R sequences, V most visual tokens of one,
M tokens of one head, d bits of a token, C latent channels.
Source: spec/training.md 5.4, 5.9 items 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.models.attention_mask import RowLayout, SequenceMask, lay_out
from worldvln_edge.models.quantizer import add_codes, bits_per_token, step_input, tokens_of_latents
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.scale_schedule import ScaleSchedule, ScaleStep
from worldvln_edge.training.grpo.policy_steps import clip_of_segment, flight_schedule, is_policy_step, rollout_steps
from worldvln_edge.training.grpo.rewards import flight_name
from worldvln_edge.training.grpo.trace import FlightTrace
from worldvln_edge.training.stages.prediction import observed_scale, reference_closure

Prompt = tuple[int, ...]
Sample = tuple[FlightTrace, int]
"""A flight and one of its segments."""


class ScoringError(ValueError):
    """A trace that cannot be scored with this model, or log-probabilities that are not those of the flight."""


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """Tokens of one head whose bits were drawn in flight."""

    place_M: Tensor
    """int64: token of the flattened [R, V]."""
    bits_Md: Tensor
    """int64 0 or 1."""
    start_M: Tensor
    """int64: where the token's bits begin in the flattened [B, N]."""

    def to(self, device: torch.device) -> ScoredTokens:
        return ScoredTokens(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Samples that go through the network together."""

    latents_RVC: Tensor
    prompts: tuple[Prompt, ...]
    """Of every sequence."""
    mask: SequenceMask
    rope_R2Ln: Tensor
    semantic: ScoredTokens
    detail: ScoredTokens
    is_bit_BN: Tensor
    """bool; False behind the last bit of a shorter sample."""

    def to(self, device: torch.device) -> PolicyBatch:
        """The same batch on a device."""
        return replace(
            self,
            latents_RVC=self.latents_RVC.to(device),
            mask=self.mask.to(device),
            rope_R2Ln=self.rope_R2Ln.to(device),
            is_bit_BN=self.is_bit_BN.to(device),
            semantic=self.semantic.to(device),
            detail=self.detail.to(device),
        )


class PolicyBatchMaker:
    """Lays samples out; holds no network.

    Args:
        config: of the checkpoint that flew.
        tokenizer: of prompts.

    Raises:
        ConfigError: a preset whose segments are not clips.
    """

    def __init__(self, config: ModelConfig, tokenizer: PromptTokenizer):
        self._config, self._tokenizer = config, tokenizer
        self.schedule: ScaleSchedule = flight_schedule(config)

    def make(self, samples: Sequence[Sample]) -> PolicyBatch:
        """Lay samples out as sequences.

        Raises:
            ScoringError: a trace whose bits are not those of the model's schedule.
        """
        parts = [part for index, sample in enumerate(samples) for part in self._sequences(index, *sample)]
        layout = lay_out(
            [[RowLayout(self.schedule, len(p.prompt), p.scales, p.real_scale_ids)] for p in parts],
            self._config.world_model,
            pad_multiple=1,
        )
        latents = torch.zeros(len(parts), layout.visual, self._config.world_model.latent_channels)
        for row, part in enumerate(parts):
            latents[row, : len(part.inputs_VC)] = part.inputs_VC
        counts = [sum(one.numel() for one in trace.segments[segment].log_probs) for trace, segment in samples]
        longest = max(counts)
        tokens = {
            is_semantic: self._tokens(parts, layout.visual, longest, is_semantic=is_semantic)
            for is_semantic in (True, False)
        }
        return PolicyBatch(
            latents_RVC=latents,
            prompts=tuple(part.prompt for part in parts),
            mask=layout.mask,
            rope_R2Ln=layout.rope_B2Ln,
            semantic=tokens[True],
            detail=tokens[False],
            is_bit_BN=torch.arange(longest) < torch.tensor(counts)[:, None],
        )

    def _sequences(self, sample: int, trace: FlightTrace, segment: int) -> list[_Sequence]:
        clip = clip_of_segment(self.schedule, segment)
        steps = rollout_steps(clip, trace.repetitions)
        flown = trace.segments[segment]
        self._check(trace, segment, steps)
        latents = trace.latents[None]
        closure = reference_closure(self.schedule, clip.index)
        context = [observed_scale(self.schedule.clips[c], scale, latents, self._config) for c, scale in closure]
        rows, cols = self._config.schedule.latent_hw
        state = torch.zeros(1, self._config.world_model.latent_channels, clip.frames, rows, cols)
        own, first = [], 0
        for step, bits in zip(steps, flown.bits, strict=True):
            is_scored = is_policy_step(step, trace.policy_scales)
            inputs_LC = tokens_of_latents(step_input(state, step))[0]
            own.append(_OwnStep(step, inputs_LC, bits, first if is_scored else None))
            first += bits.numel() if is_scored else 0
            state = add_codes(state, bits[None].bool())
        prompt = tuple(self._tokenizer.encode(trace.prompt).tolist())
        return [
            _Sequence(
                sample=sample,
                prompt=prompt,
                scales=(*closure, *((clip.index, one.step.scale) for one in members)),
                real_scale_ids=(
                    *(int(one.real_scale_id_B[0]) for one in context),
                    *(one.step.real_scale_id for one in members),
                ),
                inputs_VC=torch.cat([*(one.input_BLC[0] for one in context), *(one.input_LC for one in members)]),
                own=members,
            )
            for members in self._split(own)
        ]

    def _split(self, own: list[_OwnStep]) -> list[list[_OwnStep]]:
        """Steps that share a sequence: the last repetitions; of earlier ones as many as do not see each other."""
        # What nobody scores and nobody sees needs no forward pass.
        last = [one for one in own if one.step.is_last_repetition]
        sees_own = self.schedule.config.context_from_largest_no <= 0
        while last and last[-1].first_bit is None:
            last.pop()
        if not sees_own:
            last = [one for one in last if one.first_bit is not None]
        found = [last] if last else []
        earlier = [one for one in own if not one.step.is_last_repetition and one.first_bit is not None]
        if not sees_own:
            for repetition in sorted({one.step.repetition for one in earlier}):
                found.append([one for one in earlier if one.step.repetition == repetition])
            return found
        for one in earlier:
            seen = [replace(other, first_bit=None) for other in last if other.step.scale < one.step.scale]
            found.append([*seen, one])
        return found

    def _tokens(self, parts: list[_Sequence], visual: int, longest: int, *, is_semantic: bool) -> ScoredTokens:
        model = self._config.world_model
        width = model.semantic_bits if is_semantic else model.detail_bits
        none = torch.zeros(0, dtype=torch.int64)
        places, bits, starts = [none], [torch.zeros(0, width, dtype=torch.int64)], [none]
        for row, part in enumerate(parts):
            token = row * visual + len(part.inputs_VC) - sum(one.step.tokens for one in part.own)
            for one in part.own:
                if one.first_bit is not None and one.step.is_semantic == is_semantic:
                    places.append(torch.arange(token, token + one.step.tokens))
                    bits.append(one.bits.reshape(-1, width).long())
                    starts.append(part.sample * longest + one.first_bit + width * torch.arange(one.step.tokens))
                token += one.step.tokens
        return ScoredTokens(place_M=torch.cat(places), bits_Md=torch.cat(bits), start_M=torch.cat(starts))

    def _check(self, trace: FlightTrace, segment: int, steps: tuple[ScaleStep, ...]) -> None:
        model, flown = self._config.world_model, trace.segments[segment]
        expected = [(*step.thw, bits_per_token(step, model)) for step in steps]
        found = [tuple(bits.shape) for bits in flown.bits]
        grid = (model.latent_channels, *self._config.schedule.latent_hw)
        seen = (trace.latents.shape[0], *trace.latents.shape[2:])
        frames = self.schedule.clips[segment].first_frame + self.schedule.clips[segment].frames
        if expected != found or grid != seen or trace.latents.shape[1] < frames:
            raise ScoringError(
                f"{flight_name(trace)}, segment {segment}: bits {found} and latents {list(trace.latents.shape)} are "
                f"not of {self._config.name}, which has bits {expected} and latents [{grid[0]}, >= {frames}, "
                f"{grid[1]}, {grid[2]}]; score with the checkpoint that flew"
            )
        if not any(one.numel() for one in flown.log_probs):
            raise ScoringError(f"{flight_name(trace)}, segment {segment}: nothing was drawn, so nothing can be scored")


@dataclass(frozen=True)
class _OwnStep:
    """A step of the generated clip."""

    step: ScaleStep
    input_LC: Tensor
    bits: Tensor
    first_bit: int | None
    """Among the scored bits of the sample; None: it is only looked at."""


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    sample: int
    prompt: Prompt
    scales: tuple[tuple[int, int], ...]
    real_scale_ids: tuple[int, ...]
    inputs_VC: Tensor
    own: list[_OwnStep]
