"""What lies in the weight file of a bundle: every tensor, read back one at a time.

Each graph file says of its initializers what they were made from (`exporter.WEIGHTS_PROPERTY`): the identity of a
`PlannedTensor`, which is `KEY|DTYPE`, `KEY|DTYPE|transposed`, or `KEY|LABEL.codes`, `.scales` and `.folded` for
quantised weights, with LABEL such as `int4.awq64.fp16`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from worldvln_edge.bundle import Bundle
from worldvln_edge.export.exporter import WEIGHTS_PROPERTY
from worldvln_edge.export.weight_file import WEIGHTS_FILE

_TORCH_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT8: torch.int8,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}


class StoredWeightError(ValueError):
    """An initializer of unknown origin or dtype. The message names graph and initializer."""


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of the weight file. Graphs that share it share its description."""

    file: Path
    offset: int
    length: int
    onnx_dtype: int
    shape: tuple[int, ...]
    key: str
    how: str
    """`FLOAT16`, `FLOAT16|transposed`, `int8.fp16.codes`, ..."""

    @property
    def dtype(self) -> torch.dtype:
        """As stored; 4-bit codes are read as int8."""
        return _TORCH_DTYPES.get(self.onnx_dtype, torch.int8)

    @property
    def label(self) -> str:
        """`int4.awq64.fp16` of codes, scales and folded tensors; else empty."""
        return self.how.rpartition(".")[0]

    @property
    def role(self) -> str:
        """`cast`, `codes`, `scales` or `folded`."""
        return self.how.rpartition(".")[2] if self.label else "cast"

    def read(self) -> Tensor:
        """The tensor as stored; 4-bit codes as int8."""
        data = np.fromfile(self.file, np.uint8, self.length, offset=self.offset)
        if self.onnx_dtype == TensorProto.INT4:
            count = int(np.prod(self.shape))
            halves = np.stack((data << 4, data), axis=-1).view(np.int8) >> 4  # the shift extends the sign
            return torch.from_numpy(halves.reshape(-1)[:count].reshape(self.shape))
        return torch.from_numpy(data).view(_TORCH_DTYPES[self.onnx_dtype]).reshape(self.shape)


def stored_weights(bundle: Bundle) -> Iterator[StoredWeight]:
    """Every tensor of the weight file that a graph reads, each once.

    Raises:
        StoredWeightError: a graph does not say where an initializer comes from, or it has an odd dtype or place.
    """
    seen: set[StoredWeight] = set()
    for name in bundle.manifest.graphs:
        model = onnx.load(bundle.graph_path(name), load_external_data=False)
        found = {entry.key: entry.value for entry in model.metadata_props}.get(WEIGHTS_PROPERTY)
        if found is None:
            raise StoredWeightError(f"graph {name} does not say what its weights were made from; export it again")
        origins = json.loads(found)
        for tensor in model.graph.initializer:
            if not tensor.external_data:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            if tensor.name not in origins or place.get("location") != WEIGHTS_FILE:
                raise StoredWeightError(f"graph {name}: nothing says what {tensor.name} was made from; export it again")
            if tensor.data_type not in _TORCH_DTYPES and tensor.data_type != TensorProto.INT4:
                kind = TensorProto.DataType.Name(tensor.data_type)
                raise StoredWeightError(f"graph {name}: {tensor.name} has dtype {kind}, which no export writes")
            key, _, how = origins[tensor.name].partition("|")
            weight = StoredWeight(
                file=bundle.file_path(WEIGHTS_FILE),
                offset=int(place["offset"]),
                length=int(place["length"]),
                onnx_dtype=tensor.data_type,
                shape=tuple(tensor.dims),
                key=key,
                how=how,
            )
            if weight not in seen:
                seen.add(weight)
                yield weight
