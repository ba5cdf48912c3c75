"""Observed latents to bit labels: the multi-scale binary quantiser on the host, in numpy.

Legend: D latent channels, T latent frames, H W rows and columns of the last scale, d bits of a scale.
Source: spec/world_model.md 6.2, spec/video_vae.md 6, 7.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from worldvln_edge.config import WorldModelConfig
from worldvln_edge.resize import area_matrix, linear_matrix
from worldvln_edge.scale_schedule import Clip, ScaleStep


def resize_channels(
    x_DTHW: np.ndarray, channels_out: np.ndarray | None, rows: np.ndarray, cols: np.ndarray
) -> np.ndarray:
    """Separable resize of every frame, given one matrix per axis: [d, D], [h, H], [w, W] -> float32 [d, T, h, w].

    `channels_out` None keeps the channels. An axis that keeps its size costs nothing.
    """
    x = x_DTHW
    if rows.shape[0] != rows.shape[1]:
        x = np.matmul(rows, x)
    if cols.shape[0] != cols.shape[1]:
        x = np.matmul(x, cols.T)
    if channels_out is not None and channels_out.shape[0] != channels_out.shape[1]:
        x = np.matmul(channels_out, x.reshape(x.shape[0], -1)).reshape(-1, *x.shape[1:])
    return x


@dataclass(frozen=True, kw_only=True)
class ObservedClip:
    """Bit labels of one observed clip and what the world model and the decoder need of them."""

    bits: tuple[np.ndarray, ...]  # per step: bool [T, h, w, d]
    inputs: Mapping[int, np.ndarray]  # step in clip -> float32 [T*h*w, D], the latent tokens that enter the world model
    codes: np.ndarray  # float32 [D, T, H, W], sum of the codes

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All of them."""
        return (*self.bits, *self.inputs.values(), self.codes)


def quantise(
    latents_DTHW: np.ndarray, clip: Clip, config: WorldModelConfig, *, scales: Collection[int] | None = None
) -> ObservedClip:
    """Quantise latents coarse to fine. Frames do not see each other here, so any part of a clip may come alone.

    Args:
        latents_DTHW: float32 raw features of some of the clip's frames.
        clip: its steps.
        config: gives the bits of semantic and detail scales.
        scales: whose last repetition's inputs are wanted; None: those of every step.
    """

    def draw(step: ScaleStep, total: np.ndarray) -> np.ndarray:
        _, h, w = step.thw
        channels, _, rows, cols = latents_DTHW.shape
        down = area_matrix(_bits_per_token(step, config), channels)
        residual = resize_channels(latents_DTHW - total, down, area_matrix(h, rows), area_matrix(w, cols))
        return (residual > 0).transpose(1, 2, 3, 0)

    return _walk(latents_DTHW.shape, clip, config, draw, scales)


def clip_of_bits(
    bits: Sequence[np.ndarray],
    clip: Clip,
    config: WorldModelConfig,
    latent_hw: tuple[int, int],
    *,
    scales: Collection[int] | None = None,
) -> ObservedClip:
    """A clip whose bits are known, such as a generated one, as if it had been observed.

    Args:
        bits: per step of the clip bool [T, h, w, d].
        latent_hw: rows and columns of the last scale.
        clip, config, scales: as for `quantise`.
    """
    shape = (config.latent_channels, clip.frames, *latent_hw)
    return _walk(shape, clip, config, lambda step, total: bits[step.step_in_clip], scales)


def _walk(
    shape: tuple[int, ...],
    clip: Clip,
    config: WorldModelConfig,
    bits_of: Callable[[ScaleStep, np.ndarray], np.ndarray],
    scales: Collection[int] | None,
) -> ObservedClip:
    """All steps of a clip: the sum of the codes grows by what `bits_of(step, sum so far)` says."""
    channels, _, rows, cols = shape
    total = np.zeros(shape, np.float32)
    all_bits, inputs = [], {}
    for step in clip.steps:
        _, h, w = step.thw
        if scales is None or (step.scale in scales and step.is_last_repetition):
            tokens = resize_channels(total, None, area_matrix(h, rows), area_matrix(w, cols))
            inputs[step.step_in_clip] = tokens.transpose(1, 2, 3, 0).reshape(-1, channels)
        bits = bits_of(step, total)
        per_token = _bits_per_token(step, config)
        unit = np.float32(1) / np.float32(np.sqrt(per_token))
        code = np.ascontiguousarray(np.where(bits, unit, -unit).transpose(3, 0, 1, 2))
        up = (linear_matrix(channels, per_token), linear_matrix(rows, h), linear_matrix(cols, w))
        total = total + resize_channels(code, *up)
        all_bits.append(bits)
    return ObservedClip(bits=tuple(all_bits), inputs=inputs, codes=total)


def _bits_per_token(step: ScaleStep, config: WorldModelConfig) -> int:
    return config.semantic_bits if step.is_semantic else config.detail_bits


def join_parts(parts: Sequence[ObservedClip]) -> ObservedClip:
    """Parts of one clip, in the order of their frames, as one."""
    if len(parts) == 1:
        return parts[0]
    return ObservedClip(
        bits=tuple(np.concatenate(bits) for bits in zip(*(part.bits for part in parts), strict=True)),
        inputs={step: np.concatenate([part.inputs[step] for part in parts]) for step in parts[0].inputs},
        codes=np.concatenate([part.codes for part in parts], axis=1),
    )


def encode_clip(
    latents_DTHW: np.ndarray, clip: Clip, config: WorldModelConfig, *, scales: Collection[int] | None = None
) -> ObservedClip:
    """Quantise the latents of one whole clip; see `quantise`.

    Raises:
        ValueError: the number of latent frames is not the clip's.
    """
    if latents_DTHW.shape[1] != clip.frames:
        raise ValueError(f"clip {clip.index} has {clip.frames} latent frames, found {latents_DTHW.shape[1]}")
    return quantise(latents_DTHW, clip, config, scales=scales)
