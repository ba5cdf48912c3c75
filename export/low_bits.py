"""Weights to few bits: int4 in blocks along the input, int8 and e4m3 per output channel. Plain arithmetic, no graphs.

Weights are handled a few rows at a time, so that a large matrix needs no float32 copy.

Legend: N outputs, K inputs of a linear; G blocks = K / block.
Source: ONNX DequantizeLinear (symmetric: value = code * scale); 4-bit values two in a byte, the low half first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from worldvln_edge.export.precision import PrecisionError

INT4_RANGE = (-8, 7)
INT4_BLOCKS = (128, 64, 32)
INT8_LARGEST, E4M3_LARGEST = 127.0, 448.0
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the largest weight of a block that are tried as its range."""

_SMALLEST_HALF = 2.0**-24
_CHUNK = 1 << 18  # weights handled at a time: stays in the processor's cache

Rows = Callable[[int, int], Tensor]
"""(first, end) -> float32 [end - first, K]: rows of a weight."""


def rows_of(weight_NK: Tensor, inputs_K: Tensor | None = None, outputs_N: Tensor | None = None) -> Rows:
    """Rows of a weight in float32, with scaled columns and rows divided where scales are given."""

    def rows(first: int, end: int) -> Tensor:
        part = weight_NK[first:end].float()
        if inputs_K is not None:
            part = part * inputs_K
        return part if outputs_N is None else part / outputs_N[first:end, None]

    return rows


def block_size(key: str, inputs: int, wanted: int) -> int:
    """Largest allowed block that is not above `wanted` and divides the inputs.

    Raises:
        PrecisionError: there is none.
    """
    for block in INT4_BLOCKS:
        if block <= wanted and inputs % block == 0:
            return block
    raise PrecisionError(
        f"{key} reads {inputs} channels, which no int4 block of {', '.join(map(str, INT4_BLOCKS))} weights (at most "
        f"{wanted}) divides; choose precision int8 or fp16"
    )


def int4_blocks(
    rows: Rows,
    shape: tuple[int, int],
    block: int,
    scale_dtype: torch.dtype,
    importance_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round to nearest.

    Args:
        rows: of the weight.
        shape: (N, K).
        block: weights that share a scale.
        scale_dtype: dtype that scales will be stored in; codes are those of the rounded scales.
        importance_K: what an error of a weight costs, per input. Given, the range of every block is the one of
            `CLIPPING` with the least cost; else the largest weight.

    Returns:
        (codes int8 [N, K] in -8..7, scales float32 [N, G] before rounding to `scale_dtype`, all above zero).
    """
    count, inputs = shape
    codes_NK = torch.empty(count, inputs, dtype=torch.int8)
    scales_NG = torch.empty(count, inputs // block)
    cost_Gb = None if importance_K is None else importance_K.float().reshape(-1, block)
    for first, end in _chunks(count, inputs):
        part = rows(first, end).reshape(end - first, -1, block)
        scale = part.abs().amax(-1, keepdim=True) / INT4_RANGE[1]
        if cost_Gb is not None:
            scale = _cheapest_range(part, scale, scale_dtype, cost_Gb)
        scale = _positive(scale)
        codes = (part / stored_scales(scale, scale_dtype).float()).round_().clamp_(*INT4_RANGE)
        codes_NK[first:end] = codes.reshape(end - first, inputs)
        scales_NG[first:end] = scale[..., 0]
    return codes_NK, scales_NG


def _cheapest_range(part_nGb: Tensor, widest_nG1: Tensor, scale_dtype: torch.dtype, cost_Gb: Tensor) -> Tensor:
    """Per block the scale of `CLIPPING` with the least cost; ties go to the wider one."""
    best, best_cost = widest_nG1, torch.full_like(widest_nG1, float("inf"))
    error = torch.empty_like(part_nGb)
    for share in CLIPPING:
        scale = _positive(widest_nG1 * share)
        stored = stored_scales(scale, scale_dtype).float()
        torch.div(part_nGb, stored, out=error)
        error.round_().clamp_(*INT4_RANGE).mul_(stored).sub_(part_nGb).square_().mul_(cost_Gb)
        cost = error.sum(-1, keepdim=True)
        better = cost < best_cost
        best, best_cost = torch.where(better, scale, best), torch.where(better, cost, best_cost)
    return best


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their dtype; one that would become zero becomes the smallest number (engines refuse zero)."""
    smallest = _SMALLEST_HALF if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    return scales.to(dtype).clamp_min(smallest)


def per_channel(
    rows: Rows, shape: tuple[int, int], dtype: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One scale per output channel.

    Args:
        rows: of the weight.
        shape: (N, K).
        dtype: int8 or float8_e4m3fn.
        scale_dtype: dtype that scales will be stored in.

    Returns:
        (codes [N, K] of `dtype`, scales float32 [N] before rounding, all above zero).
    """
    codes_NK = torch.empty(shape, dtype=dtype)
    scales_N = torch.empty(shape[0])
    largest_code = INT8_LARGEST if dtype == torch.int8 else E4M3_LARGEST
    for first, end in _chunks(*shape):
        part = rows(first, end)
        scale = _positive(part.abs().amax(-1, keepdim=True) / largest_code)
        scaled = part / stored_scales(scale, scale_dtype).float()
        scaled = scaled.round_() if dtype == torch.int8 else scaled
        # A scale that was rounded down leads above the range, where e4m3 has NaN.
        codes_NK[first:end] = scaled.clamp_(-largest_code, largest_code).to(dtype)
        scales_N[first:end] = scale[:, 0]
    return codes_NK, scales_N


def pack_int4(codes: Tensor) -> Tensor:
    """Codes -8..7 of any shape -> uint8 [ceil(count / 2)], the low half first."""
    flat = codes.contiguous().flatten()
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    pairs = flat.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def _chunks(count: int, inputs: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // inputs)
    for first in range(0, count, step):
        yield first, min(count, first + step)


def _positive(scale: Tensor) -> Tensor:
    """Blocks of zeros get scale 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
