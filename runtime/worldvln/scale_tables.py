"""Constant inputs of `world_model_step`: resize matrices, masks, temperatures and RoPE of every step of a schedule.

Legend: D latent channels, T latent frames, H W latent rows and columns, h w those of a step.
Source: spec/world_model.md 2.5, 5, 6.
"""

from __future__ import annotations

import numpy as np

from worldvln_edge.config import ModelConfig
from worldvln_edge.resize import area_matrix, linear_matrix
from worldvln_edge.rope import visual_rope
from worldvln_edge.scale_schedule import Clip, ScaleSchedule, ScaleStep


class ScaleTables:
    """Constant inputs of every step of a schedule, made once per policy and shared by its sessions."""

    def __init__(self, config: ModelConfig):
        self.config = config
        latent_frames = 1 + (config.horizon.num_frames - 1) // config.video_vae.temporal_stride
        self.schedule = ScaleSchedule(config.schedule, latent_frames)
        self._constants: dict[int, dict[str, np.ndarray]] = {}
        self._ropes: dict[int, np.ndarray] = {}
        self._no_bits: dict[tuple[int, int, int], np.ndarray] = {}

    def no_bits(self, step: ScaleStep) -> np.ndarray:
        """Zeros of a step's bits, read-only: float32 [T, h, w, joint bits]."""
        if step.thw not in self._no_bits:
            self._no_bits[step.thw] = np.zeros((*step.thw, self.joint_bits), np.float32)
            self._no_bits[step.thw].setflags(write=False)
        return self._no_bits[step.thw]

    def no_codes(self, clip: Clip) -> np.ndarray:
        """Codes before the first step of a clip: float32 [1, D, T, H, W]."""
        channels, latent_hw = self.config.world_model.latent_channels, self.config.schedule.latent_hw
        return np.zeros((1, channels, clip.frames, *latent_hw), np.float32)

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
