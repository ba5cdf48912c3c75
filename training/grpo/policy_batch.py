"""Flown segments laid out for one teacher-forced pass: masked sequences, with the bits to be scored.

Every scored step of a clip is a document of a sequence: it sees the observed clips before it, as they were encoded in
flight, and the text. Segments of one flight share a sequence where none of them could see what another one generated:
what was observed and the text are then looked at once. Earlier repetitions of a step do not stand in the sequence of
the last one, because other scales see the last one only.

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
from worldvln_edge.models.attention_mask import RowLayout, ScaleKey, SequenceMask, lay_out
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


def flight_by_flight(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of the samples of every flight: they share sequences, so they should go through the network together."""
    found: dict[int, list[int]] = {}
    for index, (trace, _) in enumerate(samples):
        found.setdefault(id(trace), []).append(index)
    return list(found.values())


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
        parts = self._shared([p for index, sample in enumerate(samples) for p in self._sequences(index, *sample)])
        layout = lay_out(
            [[RowLayout(self.schedule, len(p.prompt), tuple(p.parts), p.real_scale_ids)] for p in parts],
            self._config.world_model,
            pad_multiple=1,
        )
        latents = torch.zeros(len(parts), layout.visual, self._config.world_model.latent_channels)
        for row, part in enumerate(parts):
            inputs_VC = torch.cat([one.input_LC for one in part.parts.values()])
            latents[row, : len(inputs_VC)] = inputs_VC
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
        observed = {
            key: _Part(int(one.real_scale_id_B[0]), one.input_BLC[0])
            for key in reference_closure(self.schedule, clip.index)
            for one in [observed_scale(self.schedule.clips[key[0]], key[1], latents, self._config)]
        }
        rows, cols = self._config.schedule.latent_hw
        state = torch.zeros(1, self._config.world_model.latent_channels, clip.frames, rows, cols)
        own, first = [], 0
        for step, bits in zip(steps, flown.bits, strict=True):
            is_scored = is_policy_step(step, trace.policy_scales)
            inputs_LC = tokens_of_latents(step_input(state, step))[0]
            own.append(_Drawn(step.real_scale_id, inputs_LC, sample, step, bits, first if is_scored else None))
            first += bits.numel() if is_scored else 0
            state = add_codes(state, bits[None].bool())
        prompt = tuple(self._tokenizer.encode(trace.prompt).tolist())
        return [
            _Sequence(trace, prompt, observed | {(clip.index, one.step.scale): one for one in members})
            for members in self._split(own)
        ]

    def _shared(self, sequences: Sequence[_Sequence]) -> list[_Sequence]:
        """Sequences of one flight put into one, where each token goes on seeing what it saw."""
        found: dict[int, list[_Sequence]] = {}
        for one in sequences:
            there = found.setdefault(id(one.trace), [])
            for index, other in enumerate(there):
                if self._can_share(one, other):
                    keys = sorted({**one.parts, **other.parts})
                    there[index] = _Sequence(
                        one.trace, one.prompt, {key: other.parts.get(key) or one.parts[key] for key in keys}
                    )
                    break
            else:
                there.append(one)
        return [one for there in found.values() for one in there]

    def _can_share(self, one: _Sequence, other: _Sequence) -> bool:
        """Whether no scale is in both that was drawn, and none would see more than it does."""
        if any(isinstance(s.parts[key], _Drawn) for key in one.parts.keys() & other.parts.keys() for s in (one, other)):
            return False
        return not any(
            reference in second.parts and reference not in first.parts
            for first, second in ((one, other), (other, one))
            for key in first.parts
            for reference in self.schedule.references_of_scale(*key)
        )

    def _split(self, own: list[_Drawn]) -> list[list[_Drawn]]:
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
        for row, sequence in enumerate(parts):
            token = row * visual
            for part in sequence.parts.values():
                tokens = len(part.input_LC)
                if isinstance(part, _Drawn) and part.first_bit is not None and part.step.is_semantic == is_semantic:
                    places.append(torch.arange(token, token + tokens))
                    bits.append(part.bits.reshape(-1, width).long())
                    starts.append(part.sample * longest + part.first_bit + width * torch.arange(tokens))
                token += tokens
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
class _Part:
    """A scale of a sequence, as it was observed."""

    real_scale_id: int
    input_LC: Tensor


@dataclass(frozen=True)
class _Drawn(_Part):
    """A scale of a generated clip."""

    sample: int
    step: ScaleStep
    bits: Tensor
    first_bit: int | None
    """Among the scored bits of the sample; None: it is only looked at."""


@dataclass(frozen=True)
class _Sequence:
    trace: FlightTrace
    prompt: Prompt
    parts: dict[ScaleKey, _Part]
    """In the order of the schedule."""

    @property
    def real_scale_ids(self) -> tuple[int, ...]:
        return tuple(part.real_scale_id for part in self.parts.values())
