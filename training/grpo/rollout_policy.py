"""The policy that flies rollouts: all networks of a checkpoint on many flights at once, with what the gradient needs.

frames -> VAE encoder (streaming) -> bits of the observed clip -> keys and values; next clip drawn, with the
log-probability of every bit -> VAE decoder -> adapter and TimesFormer windows, the head that serves -> 16 actions.
No guidance and temperature 1: what flies is the distribution that is optimised.

What holds for a flight (one CPU thread): the same seed, prompt, frames and number of rows give bit-identical bits,
log-probabilities and actions, whichever flights share the batch. With more threads, another number of rows, or on a
GPU, they agree up to rounding, and a draw differs only where its number lies within rounding of its probability.

Legend: B rows, F frames, C latent channels, T latent frames, H W sizes. Actions: cm and deg.
Source: spec/training.md 5.2, 5.9 items 1, 2; spec/action_decoder.md 4, 10.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from worldvln_edge.action_windows import LabelStats, segment_actions, window_starts
from worldvln_edge.models.checkpoint_source import IDENTITY_STATS, load_source, open_any
from worldvln_edge.models.worldvln import WorldVLN
from worldvln_edge.prompts import tagged_prompt
from worldvln_edge.runtime.worldvln.tokenizer import PromptTokenizer
from worldvln_edge.training.grpo.clip_generation import ClipGenerator, PromptKV
from worldvln_edge.training.grpo.policy_steps import PolicyScales, Repetitions, check_policy_scales, flight_schedule
from worldvln_edge.training.stages.decoder_features import weights_digest
from worldvln_edge.training.stages.vae import frames_to_video


@dataclass(frozen=True, kw_only=True)
class PlannedSegment:
    """One generated segment of one flight, on the CPU. Bits and log-probabilities as `SegmentTrace` has them."""

    bits: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...]
    actions: np.ndarray
    """float64 [step, 6]."""

    @property
    def is_finite(self) -> bool:
        """Are actions and log-probabilities numbers?"""
        scored = all(bool(torch.isfinite(one).all()) for one in self.log_probs)
        return scored and bool(np.isfinite(self.actions).all())


class RolloutPolicy:
    """The networks of one checkpoint, frozen for one collection.

    Args:
        model: all networks, on one device; must not be trained while this policy lives (prompts are computed once).
        stats: of the latent action head; None: its outputs are rad and m.
        tokenizer: of the checkpoint.
        policy_scales, repetitions: see `policy_steps.py`.
        rows: flights that go through the networks together, always that many: missing ones are blank.

    Raises:
        ConfigError: a segment of this model is not one clip, or it has not so many scales.
        ValueError: `rows` below 1.
    """

    def __init__(
        self,
        model: WorldVLN,
        stats: LabelStats | None,
        tokenizer: PromptTokenizer,
        *,
        policy_scales: PolicyScales = "semantic",
        repetitions: Repetitions = "last",
        rows: int = 8,
    ):
        if rows < 1:
            raise ValueError(f"rows must be >= 1, found {rows}")
        check_policy_scales(model.config, policy_scales)
        self.model, self.config, self.rows = model, model.config, rows
        self.policy_scales: PolicyScales = policy_scales
        self.repetitions: Repetitions = repetitions
        self.schedule = flight_schedule(model.config)
        self._stats, self._tokenizer = stats, tokenizer
        self._prompts: dict[str, PromptKV] = {}
        self.digest = self._digest()
        """SHA-256 of weights, configuration and label statistics: of everything that a flight depends on."""

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        device: torch.device | str = "cpu",
        policy_scales: PolicyScales = "semantic",
        repetitions: Repetitions = "last",
        rows: int = 8,
    ) -> RolloutPolicy:
        """From a checkpoint folder, ours or one with `released.json`; errors as `checkpoint_source.open_any`."""
        source = open_any(checkpoint)
        loaded = load_source(source)
        tokenizer = PromptTokenizer.load(loaded.tokenizer_file, loaded.config.world_model.text_max_tokens)
        return cls(
            loaded.model.to(device),
            loaded.stats.latent_head,
            tokenizer,
            policy_scales=policy_scales,
            repetitions=repetitions,
            rows=rows,
        )

    @property
    def device(self) -> torch.device:
        return self.model.world_model.cfg_uncond.device

    def prompt(self, instruction: str) -> str:
        """The text that is tokenised."""
        return tagged_prompt(instruction, self.config.horizon)

    def begin(self, instructions: Sequence[str], seeds: Sequence[int]) -> FlightBatch:
        """Flights that are flown in step, one segment after the other.

        Args:
            instructions, seeds: one a flight, at most `rows`.

        Raises:
            ValueError: no flight, more than `rows`, or not as many seeds.
        """
        if not 1 <= len(instructions) <= self.rows or len(instructions) != len(seeds):
            raise ValueError(
                f"1..{self.rows} flights go together, each with a seed; found {len(instructions)} instructions and "
                f"{len(seeds)} seeds"
            )
        return FlightBatch(self, [self._text(instruction) for instruction in instructions], list(seeds))

    def actions(self, tokens_BFND: Tensor, segment: int) -> np.ndarray:
        """Actions of a segment of all rows: float64 [B, step, 6].

        Args:
            tokens_BFND: of the context frames and the segment's.
            segment: 0-based.
        """
        rows, frames = tokens_BFND.shape[:2]
        head, points = self.model.latent_head, self.config.horizon.points
        window, left = self.config.action_decoder.latent_head.window, self.config.action_decoder.left_context
        starts = window_starts(frames, window)
        every = [row * frames + start for row in range(rows) for start in starts]
        logits = head.tsformer.forward_frames(tokens_BFND.flatten(0, 1), every).float().cpu().numpy()
        return np.stack(
            [
                segment_actions(
                    own,
                    self._stats,
                    observed_frames=points[segment],
                    next_observed_frames=points[segment + 1],
                    left_context=left,
                    window=window,
                )
                for own in logits.reshape(rows, len(starts), -1)
            ]
        ).astype(np.float64)

    @torch.no_grad()
    def _text(self, instruction: str) -> PromptKV:
        prompt = self.prompt(instruction)
        if prompt not in self._prompts:
            ids = torch.from_numpy(self._tokenizer.encode(prompt)).to(self.device)
            self._prompts[prompt] = PromptKV.build(self.model.world_model, self.model.text_encoder(ids[None])[0])
        return self._prompts[prompt]

    def _digest(self) -> str:
        model, stats = self.model, self._stats
        weights = weights_digest(model.text_encoder, model.world_model, model.vae, model.latent_head)
        described = self.config.to_json() + msgspec.json.encode(IDENTITY_STATS if stats is None else stats)
        return hashlib.sha256(weights.encode() + described).hexdigest()


class FlightBatch:
    """Flights in step: frames in, then a segment out, until the horizon is flown. Made by `RolloutPolicy.begin`."""

    def __init__(self, policy: RolloutPolicy, prompts: list[PromptKV], seeds: list[int]):
        self._policy, self._flights = policy, len(prompts)
        blank = policy.rows - len(prompts)
        self._seeds = seeds + [0] * blank
        self._generator = ClipGenerator(
            policy.model.world_model,
            policy.schedule,
            prompts + prompts[:1] * blank,
            policy_scales=policy.policy_scales,
            repetitions=policy.repetitions,
        )
        self._encoder_state: tuple[Tensor, ...] | None = None
        self._decoder_state: tuple[Tensor, ...] | None = None
        self._context: Tensor | None = None  # [B, F, N, D] tokens of the last observed frames
        self._latents: list[Tensor] = []

    @property
    def segment(self) -> int:
        """Index of the segment that `plan` gives next: one less than the clips that were observed."""
        return len(self._latents) - 1

    def latents(self, flight: int) -> Tensor:
        """Raw features of everything observed so far: float32 [C, T, H, W] on the CPU."""
        return torch.cat([clip[flight] for clip in self._latents], 1).float().cpu()

    @torch.no_grad()
    def observe(self, frames: Mapping[int, np.ndarray]) -> None:
        """Take the frames since the last call: one at first, then those of a segment.

        Args:
            frames: flight -> uint8 RGB [F, H, W, 3] in the model's size; one that is left out has ended, and what
                `plan` says about it from now on means nothing.

        Raises:
            ValueError: frames of another type, number or size.
        """
        policy, index = self._policy, len(self._latents)
        count = 1 if index == 0 else policy.config.horizon.step
        shape = (count, *policy.config.image_hw, 3)
        batch = np.zeros((policy.rows, *shape), np.uint8)
        for flight, own in frames.items():
            if own.dtype != np.uint8 or own.shape != shape or not 0 <= flight < self._flights:
                raise ValueError(
                    f"frames of flight {flight} must be uint8 {list(shape)} (segment {index}), found {own.dtype} "
                    f"{list(own.shape)}"
                )
            batch[flight] = own
        vae = policy.model.vae
        video = frames_to_video(torch.from_numpy(batch).to(policy.device))
        encoded, self._encoder_state = vae.encode(video, self._encoder_state)
        latents = vae.raw_features(encoded)
        codes = self._generator.observe(index, latents)
        left = policy.config.action_decoder.left_context
        features, self._decoder_state = vae.decode_features(codes, self._decoder_state, last_frames=min(left, count))
        self._latents.append(latents)
        tokens = self._tokens(features)
        seen = tokens if self._context is None else torch.cat([self._context, tokens], 1)
        self._context = seen[:, -left:]

    @torch.no_grad()
    def plan(self) -> list[PlannedSegment]:
        """Draw the next clip of every flight and read its actions: one entry a flight.

        Raises:
            ValueError: nothing was observed yet, or the horizon is flown.
        """
        policy, segment = self._policy, self.segment
        if self._context is None or segment >= policy.config.horizon.segments:
            raise ValueError(
                f"no segment {segment} of {policy.config.horizon.segments}: observe the frames in front of it first, "
                "and begin a new flight after the last"
            )
        clips = self._generator.generate(segment + 1, self._seeds)
        features, _ = policy.model.vae.decode_features(clips.codes_BcTHW, self._decoder_state)
        actions = policy.actions(torch.cat([self._context, self._tokens(features)], 1), segment)
        bits = [step.to(torch.uint8).cpu() for step in clips.bits]
        log_probs = [step.float().cpu() for step in clips.log_probs]
        return [
            PlannedSegment(
                bits=tuple(step[row].clone() for step in bits),
                log_probs=tuple(step[row].clone() for step in log_probs),
                actions=actions[row],
            )
            for row in range(self._flights)
        ]

    def _tokens(self, features_BCTHW: Tensor) -> Tensor:
        tokens = self._policy.model.latent_head.tokens(features_BCTHW)
        return tokens.unflatten(0, (self._policy.rows, -1))
