"""Random weights of any size in little memory: a tensor is drawn in pieces from a generator keyed by seed and name.

The numbers are bit patterns, not samples of a formula: sign and mantissa are random, the exponent is one of eight, so
magnitudes run over eight octaves and end at 3.2 standard deviations. A piece costs one random word per 8 bytes.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

_PIECE_BYTES = 32 << 20
_OCTAVES = 8
_STD_OF_TOP_OCTAVE = 0.622
"""Standard deviation of the numbers above when the largest octave is [1, 2)."""


class Fill(Enum):
    """How a tensor is filled."""

    RANDOM = "random"
    ONES = "ones"
    ZEROS = "zeros"
    POWERS = "powers"
    """Powers of two, largest first: the quantiser's mask buffers."""


@dataclass(frozen=True, kw_only=True)
class RandomTensor:
    """A tensor to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Fill
    std: float = 0.0

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> RandomTensor:
    """Fill by name, so that activations stay finite: scales 1, `sos_token` 0, weights with deviation 1/sqrt(inputs)."""
    last = key.rpartition(".")[2]
    if dtype == torch.int64:
        return RandomTensor(key=key, shape=shape, dtype=dtype, fill=Fill.POWERS)
    if last == "sos_token":
        return RandomTensor(key=key, shape=shape, dtype=dtype, fill=Fill.ZEROS)
    if last in ("gamma", "scale_learnable_parameters") or (last == "weight" and len(shape) == 1):
        return RandomTensor(key=key, shape=shape, dtype=dtype, fill=Fill.ONES)
    if last == "bias":
        std = 0.02
    elif last == "weight":
        std = math.prod(shape[1:]) ** -0.5
    else:  # tokens and position tables
        std = shape[-1] ** -0.5
    return RandomTensor(key=key, shape=shape, dtype=dtype, fill=Fill.RANDOM, std=std)


def pieces(seed: int, name: str, tensor: RandomTensor) -> Iterator[np.ndarray]:
    """The tensor's bytes in order, as uint8 arrays of at most 32 MiB; always the same for one seed and name.

    Args:
        seed: of the whole checkpoint.
        name: unique in the checkpoint.
        tensor: bfloat16 or float32; int64 for `Fill.POWERS`.
    """
    count = math.prod(tensor.shape)
    if tensor.fill is not Fill.RANDOM:
        yield _constant(tensor).reshape(-1).view(torch.uint8).numpy()
        return
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
    mantissa_bits, word = (7, np.uint16) if tensor.dtype == torch.bfloat16 else (23, np.uint32)
    sign = 1 << (tensor.dtype.itemsize * 8 - 1)
    keep = word(sign | (_OCTAVES << mantissa_bits) - 1)
    lowest = round(math.log2(tensor.std / _STD_OF_TOP_OCTAVE)) + 127 - (_OCTAVES - 1)
    offset = word(lowest << mantissa_bits)
    left_bytes = count * tensor.dtype.itemsize
    while left_bytes:
        size = min(left_bytes, _PIECE_BYTES)
        bits = generator.integers(0, 1 << 64, size=-(-size // 8), dtype=np.uint64).view(word)
        bits &= keep
        bits += offset  # never carries into the sign: exponents stay below 127
        yield bits.view(np.uint8)[:size]
        left_bytes -= size


def draw(seed: int, name: str, tensor: RandomTensor) -> Tensor:
    """The whole tensor in memory."""
    flat = np.concatenate(list(pieces(seed, name, tensor)))
    return torch.from_numpy(flat).view(tensor.dtype).reshape(tensor.shape)


def _constant(tensor: RandomTensor) -> Tensor:
    if tensor.fill is Fill.ONES:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    if tensor.fill is Fill.ZEROS:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    # 2**63 wraps in int64, as it does in the reference; the buffers are ignored on load.
    return torch.from_numpy((np.uint64(1) << np.arange(tensor.shape[0], dtype=np.uint64)[::-1]).astype(np.int64))
