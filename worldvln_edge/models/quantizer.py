"""Multi-scale binary quantiser: latents <-> bits, scale by scale, for observed clips and for training.

Legend: B batch, C latent channels, T latent frames, H W latent grid, h w grid of a scale, d bits per token,
L = T*h*w tokens of a scale (frame-major, then row, then column).
Everything here is fp32, also under autocast and with TF32 switched on: a rounded residual is a wrong bit.
Source: spec/world_model.md 5, 6.2; spec/training.md 2.2 (self-correction).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worldvln_edge.config import ConfigError, WorldModelConfig
from worldvln_edge.models.precision import without_autocast
from worldvln_edge.resize import area_matrix, linear_matrix
from worldvln_edge.scale_schedule import Clip, ScaleSchedule, ScaleStep


def bits_per_token(step: ScaleStep, config: WorldModelConfig) -> int:
    """Bits of one token of a step: `semantic_bits` or `detail_bits`."""
    return config.semantic_bits if step.is_semantic else config.detail_bits


def bits_of_vectors(z_BdThw: Tensor) -> Tensor:
    """Bits of latent vectors: bool [B,T,h,w,d], set where a component is > 0 (zero gives bit 0)."""
    return (z_BdThw > 0).movedim(1, -1)


def codes_of_bits(bits_BThwd: Tensor) -> Tensor:
    """Unit vectors of bits: +-1/sqrt(d), float32 [B,d,T,h,w]."""
    signs = bits_BThwd.to(torch.float32) * 2.0 - 1.0
    return (signs / math.sqrt(bits_BThwd.shape[-1])).movedim(-1, 1)


def resize_channels_area(z_BCTHW: Tensor, channels: int, hw: tuple[int, int]) -> Tensor:
    """Average every frame, seen as a (channel, row, column) volume, down to (channels, *hw). Differentiable, fp32."""
    return _resize(z_BCTHW, channels, hw, area_matrix)


def resize_channels_trilinear(z_BCTHW: Tensor, channels: int, hw: tuple[int, int]) -> Tensor:
    """Interpolate every frame, seen as a (channel, row, column) volume, up to (channels, *hw). Differentiable, fp32."""
    return _resize(z_BCTHW, channels, hw, linear_matrix)


def _resize(z_BCTHW: Tensor, channels: int, hw: tuple[int, int], matrix_of: Callable[[int, int], np.ndarray]) -> Tensor:
    # cuBLAS may run fp32 products as TF32 (10 bits of mantissa) when training allows that; it never does so in fp64.
    working = torch.float64 if z_BCTHW.is_cuda else torch.float32
    z = z_BCTHW.to(working)

    def matrix(out_size: int, in_size: int) -> Tensor:
        return torch.tensor(matrix_of(out_size, in_size), dtype=working, device=z.device)

    with without_autocast(z):
        if z.shape[-1] != hw[1]:
            z = torch.matmul(z, matrix(hw[1], z.shape[-1]).T)
        if z.shape[-2] != hw[0]:
            z = torch.matmul(matrix(hw[0], z.shape[-2]), z)
        if z.shape[1] != channels:
            z = torch.einsum("oc,bcthw->bothw", matrix(channels, z.shape[1]), z)
    return z.to(torch.float32)


def step_input(summed_BCTHW: Tensor, step: ScaleStep) -> Tensor:
    """Latent input of a step: the summed codes so far, averaged down to the step's grid, float32 [B,C,T,h,w]."""
    return resize_channels_area(summed_BCTHW, summed_BCTHW.shape[1], step.thw[1:])


def add_codes(summed_BCTHW: Tensor, bits_BThwd: Tensor) -> Tensor:
    """Summed codes after a step: the codes of its bits, interpolated to full size, are added."""
    channels, rows, cols = summed_BCTHW.shape[1], *summed_BCTHW.shape[-2:]
    return summed_BCTHW + resize_channels_trilinear(codes_of_bits(bits_BThwd), channels, (rows, cols))


def tokens_of_latents(z_BCThw: Tensor) -> Tensor:
    """Latents as tokens: [B,C,T,h,w] -> [B,T*h*w,C]."""
    return z_BCThw.flatten(2).transpose(1, 2)


class BitFlips(Protocol):
    """Corruption of the running sum while encoding (self-correction)."""

    def flips(self, step: ScaleStep, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Bits to invert at a step: bool `shape` = (B,T,h,w,d), or None for none."""

    def repetition(self, clip: int, scale: int, count: int, batch: int) -> Tensor:
        """Which of `count` repetitions every row trains on: int64 [batch] on the CPU."""


@dataclass(frozen=True, kw_only=True)
class EncodedScale:
    """One scale of a training row batch: what the model is shown and what it must say."""

    clip: int
    scale: int
    real_scale_id_B: Tensor
    """int64 [B], CPU: RoPE position of the chosen repetition."""
    input_BLC: Tensor
    """float32 [B, T*h*w, C]: summed (possibly corrupted) codes before the chosen repetition."""
    label_bits_BLd: Tensor
    """bool [B, T*h*w, d]: bits of the residual, never the flipped ones."""


def encode_bits(target_BCTHW: Tensor, clip: Clip, config: WorldModelConfig) -> tuple[list[Tensor], Tensor]:
    """Bits of one observed clip (6.2).

    Args:
        target_BCTHW: VAE features of the clip's own frames.
        clip: the clip; its steps say grids, repetitions and bits.
        config: channel and bit counts.

    Returns:
        (bool [B,T,h,w,d] per step of the clip, summed codes float32 [B,C,T,H,W]).

    Raises:
        ConfigError: the features have another channel count, frame count or grid than the clip.
    """
    bits_of_steps: list[Tensor] = []
    summed = torch.zeros_like(target_BCTHW, dtype=torch.float32)
    for encoding in _encode(target_BCTHW, clip, config, None):
        bits_of_steps.append(encoding.bits_BThwd)
        summed = encoding.after_BCTHW
    return bits_of_steps, summed


def encode_for_training(
    target_BCTHW: Tensor, clip: Clip, config: WorldModelConfig, corruption: BitFlips
) -> list[EncodedScale]:
    """Inputs and labels of one clip, with bit flips and one repetition a scale (spec/training.md 2.2).

    Args and errors as `encode_bits`; `corruption` says which bits flip and which repetition is emitted.

    Returns:
        One EncodedScale per scale of the clip, coarse to fine.
    """
    batch = target_BCTHW.shape[0]
    scales: list[EncodedScale] = []
    encodings: list[_Encoding] = []
    for encoding in _encode(target_BCTHW, clip, config, corruption):
        encodings.append(encoding)
        step = encoding.step
        if not step.is_last_repetition:
            continue
        chosen_B = corruption.repetition(step.clip, step.scale, len(encodings), batch)
        rows = list(enumerate(chosen_B.tolist()))
        before = torch.stack([encodings[r].before_BCTHW[b] for b, r in rows])
        labels = torch.stack([encodings[r].bits_BThwd[b] for b, r in rows])
        scales.append(
            EncodedScale(
                clip=step.clip,
                scale=step.scale,
                real_scale_id_B=encodings[0].step.real_scale_id + chosen_B,
                input_BLC=tokens_of_latents(step_input(before, step)),
                label_bits_BLd=labels.flatten(1, 3),
            )
        )
        encodings.clear()
    return scales


class SelfCorrection:
    """Published corruption: a flip probability per step and row, and a repetition per scale and row, all random.

    Args:
        schedule: schedule of the rows; its very last scale is never corrupted.
        strength: highest flip probability, one number or one per global scale index; <= 0 means no flips.
        generator: CPU generator of this rank; every draw comes from it.
        last_repetition: True emits the last repetition of every scale (as served) instead of a random one.
    """

    def __init__(
        self,
        schedule: ScaleSchedule,
        strength: float | Sequence[float],
        generator: torch.Generator,
        last_repetition: bool = False,
    ):
        self._scales = schedule.config.scales_per_clip
        total = self._scales * len(schedule.clips)
        self._strengths = [strength] * total if isinstance(strength, (int, float)) else list(strength)
        if len(self._strengths) < total:
            raise ConfigError(f"flip strength needs one number per scale ({total}), found {len(self._strengths)}")
        if max(self._strengths) > 1:
            raise ConfigError(f"flip strength is a probability, found {max(self._strengths)}")
        self._last_scale = total - 1
        self._generator = generator
        self._last_repetition = last_repetition

    def flips(self, step: ScaleStep, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        index = step.clip * self._scales + step.scale
        strength = self._strengths[index]
        if strength <= 0 or index == self._last_scale:
            return None
        # Probabilities are whole per cents; the small number keeps 0.29 * 100 from falling to 28.
        percent = torch.randint(0, int(100 * strength + 1e-9) + 1, (shape[0],), generator=self._generator)
        probability = (percent / 100).reshape(-1, *[1] * (len(shape) - 1))
        return (torch.rand(shape, generator=self._generator) < probability).to(device)

    def repetition(self, clip: int, scale: int, count: int, batch: int) -> Tensor:
        if self._last_repetition:
            return torch.full((batch,), count - 1)
        return torch.randint(0, count, (batch,), generator=self._generator)


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    step: ScaleStep
    before_BCTHW: Tensor
    bits_BThwd: Tensor
    after_BCTHW: Tensor


def _encode(
    target_BCTHW: Tensor, clip: Clip, config: WorldModelConfig, corruption: BitFlips | None
) -> Iterator[_Encoding]:
    grid = clip.steps[-1].thw
    if target_BCTHW.ndim != 5 or tuple(target_BCTHW.shape[1:]) != (config.latent_channels, *grid):
        raise ConfigError(
            f"clip {clip.index} needs features [B, {config.latent_channels}, {', '.join(map(str, grid))}], "
            f"found {list(target_BCTHW.shape)}; cut the features with clip.frame_slice"
        )
    target = target_BCTHW.to(torch.float32)
    summed = torch.zeros_like(target)
    for step in clip.steps:
        residual = resize_channels_area(target - summed, bits_per_token(step, config), step.thw[1:])
        bits = bits_of_vectors(residual)
        flips = corruption.flips(step, tuple(bits.shape), bits.device) if corruption is not None else None
        after = add_codes(summed, bits if flips is None else bits ^ flips)
        yield _Encoding(step=step, before_BCTHW=summed, bits_BThwd=bits, after_BCTHW=after)
        summed = after
