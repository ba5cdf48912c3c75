"""Is a matrix of codes and steps a rounding of a given weight? Decided value by value, from the number format alone.

A code stands for all values that round to it. Where rows or columns were scaled before rounding by a factor that is not
stored, every value allows an interval of that factor, and the codes are right if the intervals have a common point.

Legend: N outputs, K inputs of a linear.
Source: ONNX DequantizeLinear (value = code * step); export/low_bits.py (how codes are made).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from worldvln_edge.export.low_bits import CLIPPING, E4M3_LARGEST, INT4_RANGE, INT8_LARGEST

_CHUNK = 1 << 22  # weights handled at a time
_SLACK = 2e-3  # of a step: float32 arithmetic before rounding, factors that were themselves rounded to float32
_SMALLEST_NORMAL_STEP = 2.0**-14  # float16 steps below are too coarse for codes to reach their range


@dataclass(frozen=True)
class CodeFormat:
    """`int4`, `int8` or `fp8` codes, and the steps that they count."""

    name: str
    is_clipped: bool
    """int4 ranges may be narrower than the largest weight."""
    step_epsilon: float
    """Relative rounding of the stored steps."""

    @property
    def largest(self) -> float:
        return {"int4": float(INT4_RANGE[1]), "int8": INT8_LARGEST, "fp8": E4M3_LARGEST}[self.name]

    def interval(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Values, in steps, that round to the codes."""
        if self.name == "fp8":  # three bits behind the leading one; below 2^-6 the spacing is 2^-9
            half = torch.clamp(codes.abs() * 2.0**-4, min=2.0**-10)
        else:
            half = torch.full_like(codes, 0.5)
        half = half + _SLACK
        beyond = self.largest * (1 / min(CLIPPING) if self.is_clipped else 1.0) * (1 + self.step_epsilon) + _SLACK
        low = torch.where(codes <= -self.largest, torch.clamp(codes - half, max=-beyond), codes - half)
        high = torch.where(codes >= self.largest, torch.clamp(codes + half, min=beyond), codes + half)
        return low, high


@dataclass
class Factors:
    """What one side of a linear may have been multiplied by: an interval per row or column, empty where low > high."""

    low: Tensor
    high: Tensor

    @classmethod
    def unknown(cls, count: int) -> Factors:
        return cls(torch.zeros(count), torch.full((count,), float("inf")))

    @classmethod
    def one(cls, count: int) -> Factors:
        return cls(torch.ones(count), torch.ones(count))

    def meet(self, other: Factors) -> Factors:
        return Factors(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))

    def inverse(self) -> Factors:
        return Factors(1 / self.high, 1 / self.low)

    @property
    def empty(self) -> int:
        """Rows or columns that no factor explains."""
        return int((~(self.low <= self.high * (1 + 1e-5))).sum())


def explain_codes(
    weight_NK: Tensor,
    codes_KN: Tensor,
    steps_GN: Tensor,
    columns_K: Tensor,
    code_format: CodeFormat,
    *,
    by_column: bool,
) -> tuple[Factors, int]:
    """Factors with which the codes are roundings of the weight.

    Args:
        weight_NK: of the checkpoint.
        codes_KN: as stored.
        steps_GN: as stored, one per block of K / G inputs.
        columns_K: known factor of every column.
        code_format: of the codes.
        by_column: the unknown factor belongs to columns (K of them), else to rows (N).

    Returns:
        (unknown factors, blocks whose range is wider than their weights need).
    """
    inputs, outputs = codes_KN.shape
    block = inputs // len(steps_GN)
    found = Factors.unknown(inputs if by_column else outputs)
    wide = 0
    for first, end in _chunks(outputs, inputs):
        codes = codes_KN[:, first:end].t().float()
        steps = steps_GN[:, first:end].t().float()
        weight = weight_NK[first:end].float() * columns_K
        wide += _wide_blocks(weight, codes, steps, block, code_format)
        low, high = code_format.interval(codes)
        steps = steps.repeat_interleave(block, 1)
        part = _factors(weight, low * steps, high * steps, dim=0 if by_column else 1)
        if by_column:
            found = found.meet(part)
        else:
            found.low[first:end], found.high[first:end] = part.low, part.high
    return found, wide


def _wide_blocks(weight: Tensor, codes: Tensor, steps: Tensor, block: int, code_format: CodeFormat) -> int:
    """A range follows the largest weight, whose code is then the largest; else precision was given away."""
    largest_code = codes.abs().reshape(len(codes), -1, block).amax(-1)
    has_weights = weight.abs().reshape(len(codes), -1, block).amax(-1) > 0
    return int((has_weights & (largest_code < code_format.largest) & (steps >= _SMALLEST_NORMAL_STEP)).sum())


def _factors(weight: Tensor, low: Tensor, high: Tensor, *, dim: int) -> Factors:
    """Interval of f with low <= f * weight <= high for all values along `dim`; f is positive."""
    infinity = torch.full((), float("inf"))
    positive, negative = weight > 0, weight < 0
    least = torch.where(positive, low / weight, torch.where(negative, high / weight, -infinity))
    most = torch.where(positive, high / weight, torch.where(negative, low / weight, infinity))
    impossible = (weight == 0) & ((low > 0) | (high < 0))
    most = torch.where(impossible, -infinity, most)
    return Factors(least.amax(dim).clamp_min(0), most.amin(dim))


def _chunks(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // inputs)
    for first in range(0, outputs, step):
        yield first, min(outputs, first + step)
