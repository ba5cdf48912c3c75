"""How much rounding of arithmetic moves this model: PyTorch against PyTorch, computed in another way.

The bounds of `verify` are multiples of it, so a model that amplifies noise (random weights, wide layers) has wide
bounds and a trained one narrow ones, and no graph was asked.

| compute | the other way                                                                                      |
|---------|----------------------------------------------------------------------------------------------------|
| fp16    | weights and activations stored in float16 where the bundle stores them so; sums in float32         |
| fp32    | the same numbers, but every matrix product and convolution summed in `_PARTS` parts over its inputs |

Source: export/precision.py (which dtype a weight has); Higham, Accuracy and Stability of Numerical Algorithms, 3.1, 4.2
(what the order of a sum does to its rounding).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from worldvln_edge.export.precision import COMPUTE_DTYPES, Precision
from worldvln_edge.models.worldvln import WorldVLN

_aten = torch.ops.aten
_PARTS = 4


class NoisyModel:
    """A model that computes as a bundle does, in PyTorch.

    Args:
        model: float32; shared in fp32, copied in fp16 (half its memory).
        precision: of the bundle; bf16 and what else does not run here is of no use.
    """

    def __init__(self, model: WorldVLN, precision: Precision):
        self.is_fp32 = precision.compute == "fp32"
        self.model = model if self.is_fp32 else _narrow(model, precision)
        self._computing: TorchDispatchMode = _SumsInParts() if self.is_fp32 else _WideSums(precision.compute)

    @contextmanager
    def computing(self) -> Iterator[WorldVLN]:
        """The model; inside, PyTorch computes the other way."""
        with torch.no_grad(), self._computing:
            yield self.model


def _narrow(model: WorldVLN, precision: Precision) -> WorldVLN:
    memo: dict[int, nn.Parameter] = {}  # what is in the memo is not copied: no float32 weight exists twice
    for key, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(precision.dtype_of(key)), requires_grad=False)
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]


class _WideSums(TorchDispatchMode):
    """Products of narrow tensors in float32, rounded once: what processors without narrow arithmetic do."""

    def __init__(self, compute: str):
        super().__init__()
        self.dtype = COMPUTE_DTYPES[compute]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _PRODUCTS or args[0].dtype != self.dtype:
            return func(*args, **(kwargs or {}))
        wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return func(*wide, **(kwargs or {})).to(self.dtype)


class _SumsInParts(TorchDispatchMode):
    """Products as sums of `_PARTS` products over parts of their inputs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _PRODUCTS or args[0].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        return _PRODUCTS[func](*args, **(kwargs or {}))


def _product(a: Tensor, b: Tensor) -> Tensor:
    parts = zip(a.tensor_split(_PARTS, -1), b.tensor_split(_PARTS, -2), strict=True)
    return _sum(x @ y for x, y in parts if x.shape[-1])


def _bias_and_product(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * _product(a, b)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: list[int] | bool | int
) -> Tensor:  # rest: stride, padding, dilation, transposed, output_padding, groups
    if rest[3] or rest[-1] != 1:
        return _aten.convolution.default(x, weight, bias, *rest)
    parts = zip(x.tensor_split(_PARTS, 1), weight.tensor_split(_PARTS, 1), strict=True)
    summed = _sum(_aten.convolution.default(a, w, None, *rest) for a, w in parts if a.shape[1])
    return summed if bias is None else summed + bias.view(-1, *[1] * (x.ndim - 2))


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


_PRODUCTS: dict[object, Callable[..., Tensor]] = {
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.addmm.default: _bias_and_product,
    _aten.convolution.default: _convolution,
}
