"""World model driver: text and observed clips into the KV cache, then one clip generated scale by scale.

Holds the state of one flight. The engine does all arithmetic on tokens; this file is the schedule.

Legend: B guidance rows, n tokens of a step, C width, D latent channels, T latent frames, H W latent rows and columns.
Source: spec/world_model.md 6, 9.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from worldvln_edge.config import ModelConfig
from worldvln_edge.noise import step_uniforms
from worldvln_edge.resize import area_matrix, linear_matrix
from worldvln_edge.rope import text_rope, visual_rope
from worldvln_edge.runtime.engine import Engine
from worldvln_edge.runtime.graphs import LATENT_EMBED, WORLD_MODEL_CONTEXT, WORLD_MODEL_STEP, cache_stems
from worldvln_edge.runtime.kv_cache import TEXT, Key, KVCache
from worldvln_edge.runtime.multiscale import ObservedClip
from worldvln_edge.scale_schedule import ScaleSchedule, ScaleStep


@dataclass(frozen=True, kw_only=True)
class GeneratedClip:
    """What a generation left behind."""

    codes: np.ndarray  # float32 [D, T, H, W]
    bits: tuple[np.ndarray, ...]  # per step: bool [T, h, w, d]
    probabilities: tuple[np.ndarray, ...]  # per step: float32 [T, h, w, d], of bit = 1


class ScaleTables:
    """Constant inputs of every step of a schedule, made once per policy and shared by its sessions."""

    def __init__(self, config: ModelConfig):
        self.config = config
        latent_frames = 1 + (config.horizon.num_frames - 1) // config.video_vae.temporal_stride
        self.schedule = ScaleSchedule(config.schedule, latent_frames)
        self._constants: dict[int, dict[str, np.ndarray]] = {}
        self._ropes: dict[int, np.ndarray] = {}

    def bit_slice(self, step: ScaleStep) -> slice:
        """Columns of the joint bit axis that this step's head owns."""
        semantic = self.config.world_model.semantic_bits
        return slice(0, semantic) if step.is_semantic else slice(semantic, None)

    @property
    def joint_bits(self) -> int:
        return self.config.world_model.semantic_bits + self.config.world_model.detail_bits

    def constants(self, step: ScaleStep) -> dict[str, np.ndarray]:
        """Resize matrices, masks and guidance of a step, keyed as the step graph's inputs."""
        if step.real_scale_id not in self._constants:
            model, generation = self.config.world_model, self.config.generation
            (rows, cols), (_, h, w), own = self.config.schedule.latent_hw, step.thw, self.bit_slice(step)
            bits = model.semantic_bits if step.is_semantic else model.detail_bits
            up_channels = np.zeros((model.latent_channels, self.joint_bits), np.float32)
            up_channels[:, own] = linear_matrix(model.latent_channels, bits)
            bit_mask = np.zeros(self.joint_bits, np.float32)
            bit_mask[own] = 1
            tau = generation.tau_image if step.clip == 0 else generation.tau_video
            self._constants[step.real_scale_id] = {
                "area_h": area_matrix(h, rows),
                "area_w": area_matrix(w, cols),
                "up_channels": up_channels,
                "up_h": linear_matrix(rows, h),
                "up_w": linear_matrix(cols, w),
                "bit_mask": bit_mask,
                "code_value": np.float32(1 / np.sqrt(bits)).reshape(()),
                "inverse_tau": np.float32(1 / tau).reshape(()),
                "guidance": np.float32(generation.cfg).reshape(()),
            }
        return self._constants[step.real_scale_id]

    def rope(self, step: ScaleStep) -> np.ndarray:
        if step.real_scale_id not in self._ropes:
            self._ropes[step.real_scale_id] = visual_rope(
                step,
                self.schedule.clips[step.clip].first_frame,
                self.config.schedule.latent_hw,
                self.config.world_model.text_max_tokens,
                self.config.world_model.head_dim,
            )
        return self._ropes[step.real_scale_id]


class WorldModelDriver:
    """Context and generation of one flight.

    A call that an engine failed in may be made again: engines write behind the visible part of the cache, and what
    such a call kept before it failed is kept anew.
    """

    def __init__(self, engines: Mapping[str, Engine], tables: ScaleTables, cache: KVCache):
        self._engines = engines
        self._tables = tables
        self._cache = cache
        self._stems = cache_stems(cache.buffers.shape[0])
        self._rows = cache.buffers.shape[2]
        self.token_steps = 0  # tokens per guidance row, the measure of spec/world_model.md 9.3
        self.calls = 0

    def set_text(self, text_embeds: np.ndarray) -> None:
        """Start over with another prompt: text keys and values, nothing else.

        Args:
            text_embeds: float32 [B, L, C].
        """
        self._cache.clear()
        length = text_embeds.shape[1]
        self._context_pass(text_embeds, text_rope(length, self._tables.config.world_model.head_dim))
        self._cache.keep(TEXT, length)

    def clear(self) -> None:
        """Forget text and observations."""
        self._cache.clear()

    def observe(self, clip_index: int, observed: ObservedClip) -> None:
        """Keys and values of the scales of an observed clip that later clips refer to.

        Once it succeeded it may not be repeated: what no later clip refers to is dropped at its end.
        """
        schedule = self._tables.schedule
        wanted = set(schedule.scales_referred_to(clip_index))
        for step, latents in zip(schedule.clips[clip_index].steps, observed.inputs, strict=True):
            if not step.is_last_repetition or step.scale not in wanted:
                continue
            self._show_references(step)
            tokens = np.repeat(latents[None], self._rows, axis=0)
            self._context_pass(self._engines[LATENT_EMBED].run({"latents": tokens})["embeds"], self._tables.rope(step))
            self._cache.keep((clip_index, step.scale), step.tokens)
        self._drop_unreachable(clip_index)

    def generate(
        self,
        clip_index: int,
        seed: int,
        *,
        forced_bits: Sequence[np.ndarray] | None = None,
        more_follow: bool = False,
    ) -> GeneratedClip:
        """Generate one clip from what was observed before it.

        Args:
            clip_index: the clip; all clips before it were observed, or generated with `more_follow`.
            seed: of the draws.
            forced_bits: per step bool [T, h, w, d] that replace the draws (tests and parity).
            more_follow: another clip of the same segment comes next and may refer to this one.
        """
        clip, config = self._tables.schedule.clips[clip_index], self._tables.config
        kept = set(self._tables.schedule.scales_referred_to(clip_index)) if more_follow else set()
        if config.schedule.context_from_largest_no <= 0:
            kept = set(range(config.schedule.scales_per_clip))  # later scales of this clip see the earlier ones
        rows, cols = config.schedule.latent_hw
        codes = np.zeros((1, config.world_model.latent_channels, clip.frames, rows, cols), np.float32)
        all_bits, all_probabilities = [], []
        for step in clip.steps:
            self._show_references(step)
            own = self._tables.bit_slice(step)
            uniforms = np.zeros((*step.thw, self._tables.joint_bits), np.float32)
            forced = np.zeros_like(uniforms)
            if forced_bits is None:
                width = uniforms[..., own].shape[-1]
                uniforms[..., own] = step_uniforms(seed, clip_index, step.step_in_clip, step.thw, width)
            else:
                forced[..., own] = forced_bits[step.step_in_clip]
            outputs = self._run(
                WORLD_MODEL_STEP,
                step.tokens,
                {
                    **self._tables.constants(step),
                    "codes": codes,
                    "uniforms": uniforms,
                    "forced_bits": forced,
                    "force": np.float32(forced_bits is not None).reshape(()),
                    "rope": self._tables.rope(step).reshape(2, *step.thw, -1),
                },
            )
            codes = outputs["next_codes"]
            if step.is_last_repetition and step.scale in kept:
                self._cache.keep((clip_index, step.scale), step.tokens)
            all_bits.append(outputs["bits"][..., own] > 0)
            all_probabilities.append(outputs["probabilities"][..., own])
        return GeneratedClip(codes=codes[0], bits=tuple(all_bits), probabilities=tuple(all_probabilities))

    def _show_references(self, step: ScaleStep) -> None:
        references = self._tables.schedule.references_of_scale(step.clip, step.scale)
        self._cache.show([TEXT, *references])

    def _drop_unreachable(self, observed_clip: int) -> None:
        schedule = self._tables.schedule
        later = range(observed_clip + 1, len(schedule.clips))
        keys: list[Key] = [TEXT, *{reference for clip in later for reference in schedule.references(clip)}]
        self._cache.drop_except(keys)

    def _context_pass(self, embeds_BLC: np.ndarray, rope: np.ndarray) -> None:
        self._run(WORLD_MODEL_CONTEXT, embeds_BLC.shape[1], {"embeds": embeds_BLC, "rope": rope})

    def _run(self, graph: str, tokens: int, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        start, end = self._cache.length, self._cache.length + tokens
        self._cache.check_room(end)
        inputs["write_index"] = np.full(self._rows, start, np.int64)
        inputs["kv_length"] = np.full(self._rows, end, np.int64)
        buffers = self._cache.buffers.reshape(-1, *self._cache.buffers.shape[2:])
        outputs = self._engines[graph].run(inputs, dict(zip(self._stems, buffers, strict=True)))
        self.token_steps += tokens
        self.calls += 1
        return outputs
