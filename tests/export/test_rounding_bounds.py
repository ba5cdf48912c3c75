"""Codes of our own quantisers are roundings of their weights; a changed code, step or factor is not."""

import pytest
import torch
from torch import Tensor

from worldvln_edge.export.low_bits import int4_blocks, per_channel, rows_of, stored_scales
from worldvln_edge.export.rounding_bounds import CodeFormat, Factors, explain_codes

EPSILON = {torch.float16: 2.0**-10, torch.float32: 2.0**-23}


def quantise(name: str, weight: Tensor, dtype: torch.dtype, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """(codes [K, N], steps [G, N]) as a bundle stores them."""
    shape = tuple(weight.shape)
    if name == "int4":
        importance = None if scales is None else torch.ones(shape[1])
        codes, raw = int4_blocks(rows_of(weight, scales), shape, 32, dtype, importance)
        return codes.t(), stored_scales(raw, dtype).t()
    kind = torch.int8 if name == "int8" else torch.float8_e4m3fn
    codes, raw = per_channel(rows_of(weight), shape, kind, dtype)
    return codes.t(), stored_scales(raw, dtype)[None]


def weight_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 96, generator=generator) * torch.rand(48, 1, generator=generator).add(0.01)
    weight[3, 10] = 40.0  # an outlier
    weight[5] = 0.0
    return weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_roundings_are_explained_and_one_wrong_code_is_not(name: str, dtype: torch.dtype):
    weight = weight_of(0)
    codes, steps = quantise(name, weight, dtype, None)
    code_format = CodeFormat(name, False, EPSILON[dtype])

    def unexplained(codes: Tensor, steps: Tensor) -> int:
        factors, wide = explain_codes(weight, codes, steps, torch.ones(96), code_format, by_column=False)
        return factors.meet(Factors.one(48)).empty + wide

    assert unexplained(codes, steps) == 0
    changed = codes.clone().float()
    changed[7, 20] += 2.0 if name != "fp8" else 64.0
    assert unexplained(changed.to(codes.dtype), steps) == 1
    doubled = steps.clone()
    doubled[0, 9] *= 2
    assert unexplained(codes, doubled) > 0


def test_scaled_columns_are_found_again_within_their_interval():
    weight, scales = weight_of(1), torch.logspace(-1, 1, 96)
    codes, steps = quantise("int4", weight, torch.float16, scales)
    code_format = CodeFormat("int4", True, EPSILON[torch.float16])
    factors, wide = explain_codes(weight, codes, steps, torch.ones(96), code_format, by_column=True)
    assert wide == 0
    assert ((factors.low <= scales) & (scales <= factors.high)).all()
    changed = codes.clone()
    changed[7, 20] = -changed[7, 20] if changed[7, 20].abs() > 1 else 6
    factors, _ = explain_codes(weight, changed, steps, torch.ones(96), code_format, by_column=True)
    assert factors.empty == 1


def test_block_with_a_range_wider_than_its_weights_is_found():
    weight = weight_of(2)
    _, steps = quantise("int8", weight, torch.float32, None)
    halved = (weight.t() / (2 * steps)).round().to(torch.int8)
    code_format = CodeFormat("int8", False, EPSILON[torch.float32])
    factors, wide = explain_codes(weight, halved, steps * 2, torch.ones(96), code_format, by_column=False)
    assert factors.meet(Factors.one(48)).empty == 0
    assert wide == 47  # all rows but the one of zeros
