"""Observed latents to bit labels: the multi-scale binary quantiser on the host, in numpy.

Legend: D latent channels, T latent frames, H W rows and columns of the last scale, d bits of a scale.
Source: spec/world_model.md 6.2, spec/video_vae.md 6, 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worldvln_edge.config import WorldModelConfig
from worldvln_edge.resize import area_matrix, linear_matrix
from worldvln_edge.scale_schedule import Clip


def resize_channels(x_DTHW: np.ndarray, channels_out: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Separable resize of every frame, given one matrix per axis: [d, D], [h, H], [w, W] -> float32 [d, T, h, w]."""
    x = np.matmul(np.matmul(rows, x_DTHW), cols.T)
    return np.tensordot(channels_out, x, axes=(1, 0))


@dataclass(frozen=True, kw_only=True)
class ObservedClip:
    """Bit labels of one observed clip and what the world model and the decoder need of them."""

    bits: tuple[np.ndarray, ...]  # per step: bool [T, h, w, d]
    inputs: tuple[np.ndarray, ...]  # per step: float32 [T*h*w, D], the latent tokens that enter the world model
    codes: np.ndarray  # float32 [D, T, H, W], sum of the codes


def quantise(latents_DTHW: np.ndarray, clip: Clip, config: WorldModelConfig) -> ObservedClip:
    """Quantise latents coarse to fine. Frames do not see each other here, so any part of a clip may come alone.

    Args:
        latents_DTHW: float32 raw features of some of the clip's frames.
        clip: its steps.
        config: gives the bits of semantic and detail scales.
    """
    channels, _, rows, cols = latents_DTHW.shape
    identity = np.eye(channels, dtype=np.float32)
    total = np.zeros_like(latents_DTHW, dtype=np.float32)
    all_bits, inputs = [], []
    for step in clip.steps:
        _, h, w = step.thw
        bits_per_token = config.semantic_bits if step.is_semantic else config.detail_bits
        area_h, area_w = area_matrix(h, rows), area_matrix(w, cols)
        inputs.append(resize_channels(total, identity, area_h, area_w).transpose(1, 2, 3, 0).reshape(-1, channels))
        residual = resize_channels(latents_DTHW - total, area_matrix(bits_per_token, channels), area_h, area_w)
        bits = residual > 0
        code = np.where(bits, np.float32(1), np.float32(-1)) / np.float32(np.sqrt(bits_per_token))
        up = (linear_matrix(channels, bits_per_token), linear_matrix(rows, h), linear_matrix(cols, w))
        total = total + resize_channels(code, *up)
        all_bits.append(bits.transpose(1, 2, 3, 0))
    return ObservedClip(bits=tuple(all_bits), inputs=tuple(inputs), codes=total)


def join_parts(parts: Sequence[ObservedClip]) -> ObservedClip:
    """Parts of one clip, in the order of their frames, as one."""
    if len(parts) == 1:
        return parts[0]
    return ObservedClip(
        bits=tuple(np.concatenate(bits) for bits in zip(*(part.bits for part in parts), strict=True)),
        inputs=tuple(np.concatenate(inputs) for inputs in zip(*(part.inputs for part in parts), strict=True)),
        codes=np.concatenate([part.codes for part in parts], axis=1),
    )


def encode_clip(latents_DTHW: np.ndarray, clip: Clip, config: WorldModelConfig) -> ObservedClip:
    """Quantise the latents of one whole clip; see `quantise`.

    Raises:
        ValueError: the number of latent frames is not the clip's.
    """
    if latents_DTHW.shape[1] != clip.frames:
        raise ValueError(f"clip {clip.index} has {clip.frames} latent frames, found {latents_DTHW.shape[1]}")
    return quantise(latents_DTHW, clip, config)
