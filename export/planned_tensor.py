"""Tensors of a bundle, described before they exist: which checkpoint tensor each is made of, and how.

A graph is built without weights; what it needs is a list of `PlannedTensor`. Each is made when it is written, one at a
time, so an export needs the memory of one tensor and not of the model. Equal descriptions are stored once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

TensorReader = Callable[[str], Tensor]
"""Checkpoint key -> tensor on the CPU, as stored."""

_ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the weight file.

    `make` gives its bytes as a contiguous array: of the numpy type of `dtype`, or uint8 where two 4-bit values share a
    byte (low half first, as ONNX stores them).
    """

    identity: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    make: Callable[[TensorReader], np.ndarray] = field(compare=False)
    key: str | None = None
    """The checkpoint tensor, where the values are its own and only cast or transposed."""
    is_transposed: bool = False

    @property
    def size_bytes(self) -> int:
        return (int(np.prod(self.shape, dtype=np.int64)) * self.dtype.bitwidth + 7) // 8


@dataclass
class CastReport:
    """What a narrower dtype lost of one tensor."""

    key: str
    dtype: str
    flushed: int = 0  # values other than zero that became zero
    largest: float = 0.0  # absolute value


class CastOverflowError(ValueError):
    """A tensor with values that a narrower dtype cannot hold. `key` names it."""

    def __init__(self, key: str, dtype: str, overflowed: int, largest: float):
        super().__init__(f"{key} does not fit {dtype}: {overflowed} values would become infinite (up to {largest:.6g})")
        self.key, self.overflowed, self.largest = key, overflowed, largest


@dataclass
class CastReports:
    """Losses of all casts of an export; tensors that lost nothing are not listed."""

    losses: dict[str, CastReport] = field(default_factory=dict)

    def cast(self, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast, and note what became zero.

        Raises:
            CastOverflowError: a finite value would become infinite.
        """
        cast = tensor.to(dtype)
        if dtype == torch.float16 and tensor.dtype != torch.float16:
            overflowed = int((torch.isinf(cast) & torch.isfinite(tensor)).sum())
            flushed = int(((cast == 0) & (tensor != 0)).sum())
            largest = float(tensor.abs().max()) if overflowed or flushed else 0.0
            if overflowed:
                raise CastOverflowError(key, "float16", overflowed, largest)
            if flushed:
                self.losses[key] = CastReport(key, "float16", flushed, largest)
        return cast


def checkpoint_tensor(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, reports: CastReports, *, transposed: bool = False
) -> PlannedTensor:
    """A checkpoint tensor in another dtype, its two axes swapped if asked for.

    Args:
        key: of the checkpoint.
        shape: in the checkpoint.
        dtype: to store.
        reports: takes what the cast loses.
        transposed: store [columns, rows].
    """

    def make(read: TensorReader) -> np.ndarray:
        cast = reports.cast(key, read(key), dtype)
        return as_array(cast.t() if transposed else cast)

    stored = tuple(reversed(shape)) if transposed else tuple(shape)
    name = _ONNX_DTYPES[dtype]
    return PlannedTensor(
        identity=f"{key}|{name.name}{'|transposed' if transposed else ''}",
        dtype=name,
        shape=stored,
        make=make,
        key=key,
        is_transposed=transposed,
    )


def as_array(tensor: Tensor) -> np.ndarray:
    """Contiguous numpy array of a CPU tensor; bfloat16 keeps its bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
