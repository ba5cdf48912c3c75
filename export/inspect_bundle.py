"""Reads the structure of a bundle's ONNX files without their weights, and counts multiply-adds node by node.

Opening needs the graph files only: weights stay in their external file, whose size is looked up and whose content is
not read (`worldvln-edge verify` and the runtime check hashes). So an 8B bundle is inspected in seconds.
Source: ONNX operator specifications (MatMul, Gemm, Conv, Attention); spec/world_model.md 9.
"""

from __future__ import annotations

import ast
import hashlib
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from worldvln_edge.bundle import MANIFEST_FILE, Bundle, BundleError, Manifest

_BITS = {
    TensorProto.DOUBLE: 64,
    TensorProto.INT64: 64,
    TensorProto.UINT64: 64,
    TensorProto.FLOAT: 32,
    TensorProto.INT32: 32,
    TensorProto.UINT32: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}  # all others: 8
_PRECISIONS = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "uint8": "int8",
    "int4": "int4",
    "uint4": "int4",
    "float8e4m3fn": "fp8",
    "float8e5m2": "fp8",
}
_NOT_PARAMETERS = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING}
_SAME_SHAPE = {"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """An initialiser: how it is stored, not what it holds."""

    key: str  # equal for tensors that are stored once
    dtype: str  # ONNX name in small letters: float, float16, int4, ...
    elements: int
    size_bytes: int
    is_parameter: bool  # not a shape, an index or a quantisation scale


@dataclass(frozen=True, kw_only=True)
class GraphStructure:
    """What one ONNX file is made of."""

    name: str
    operators: dict[str, int]
    tensors: tuple[StoredTensor, ...]  # each stored content once

    @property
    def operator_count(self) -> int:
        return sum(self.operators.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors if tensor.is_parameter)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        return bytes_by_dtype(self.tensors)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def precision(self) -> str:
        """Of most of its parameters: fp32, fp16, bf16, int8, fp8 or int4."""
        elements: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.is_parameter and tensor.dtype in _PRECISIONS:
                elements[_PRECISIONS[tensor.dtype]] += tensor.elements
        return elements.most_common(1)[0][0] if elements else "fp32"


def bytes_by_dtype(tensors: Sequence[StoredTensor]) -> dict[str, int]:
    """Stored bytes by dtype, largest first."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size_bytes
    return dict(sizes.most_common())


def unique_tensors(structures: Sequence[GraphStructure]) -> tuple[StoredTensor, ...]:
    """Tensors of all graphs, shared ones once."""
    return tuple({tensor.key: tensor for structure in structures for tensor in structure.tensors}.values())


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a bundle whose files are all there and have the right size. Their content is not hashed.

    Raises:
        BundleError: no bundle, another schema version, a missing file or one of another size.
    """
    manifest = Bundle.open_manifest(folder)
    for name, entry in manifest.files.items():
        file = Path(folder) / name
        if not file.is_file():
            raise BundleError(f"{folder}: file {name} is missing; copy the bundle again or export it again")
        if file.stat().st_size != entry.size_bytes:
            raise BundleError(
                f"{file} is corrupt: {file.stat().st_size} bytes found, the manifest says {entry.size_bytes}; copy the "
                "bundle again or export it again"
            )
    for graph in manifest.graphs.values():
        if graph.file not in manifest.files:
            raise BundleError(
                f"{Path(folder) / MANIFEST_FILE}: graph file {graph.file} has no hash; export the bundle again"
            )
    return manifest


def load_structure_only(path: Path) -> onnx.ModelProto:
    """Load an ONNX file without its external weights.

    Raises:
        BundleError: not an ONNX file.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise BundleError(f"{path}: not an ONNX file ({error}); copy the bundle again or export it again") from error


def read_structure(name: str, model: onnx.ModelProto) -> GraphStructure:
    """Operators and stored tensors of a loaded graph.

    Args:
        name: of the graph.
        model: from `load_structure_only`.
    """
    quantisation = {
        source
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for source in node.input[1:]
    }
    tensors = {}
    for tensor in model.graph.initializer:
        elements = math.prod(tensor.dims)
        key = _storage_key(tensor)
        tensors[key] = StoredTensor(
            key=key,
            dtype=TensorProto.DataType.Name(tensor.data_type).lower(),
            elements=elements,
            size_bytes=-(-elements * _BITS.get(tensor.data_type, 8) // 8),
            is_parameter=bool(
                tensor.dims and tensor.data_type not in _NOT_PARAMETERS and tensor.name not in quantisation
            ),
        )
    operators = Counter(node.op_type for node in model.graph.node)
    return GraphStructure(name=name, operators=dict(operators.most_common()), tensors=tuple(tensors.values()))


def count_macs(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, visible: int | None = None
) -> tuple[int, int]:
    """Multiply-adds of one call, from the shapes that the file states for every value.

    Args:
        model: a loaded graph.
        shapes: input name -> actual shape, for every input with a named dimension.
        visible: cache entries that are valid, for attention over a fixed cache; None counts all of them.

    Returns:
        (with initialisers or values that come straight from them; between activations).

    Raises:
        ValueError: a dimension that the given shapes do not fix, or a value without a shape.
    """
    resolve = _Shapes(model, shapes)
    weights = attention = 0
    for node in model.graph.node:
        if node.op_type == "MatMul":
            macs = math.prod(resolve(node.output[0])) * resolve(node.input[0])[-1]
            # Resize matrices of the world model are inputs: constant tables, counted with the weights.
            if any(resolve.is_table(name) for name in node.input):
                weights += macs
            else:
                attention += macs
        elif node.op_type == "Gemm":
            trans_a = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            weights += math.prod(resolve(node.output[0])) * resolve(node.input[0])[0 if trans_a else 1]
        elif node.op_type == "Conv":
            weights += math.prod(resolve(node.output[0])) * math.prod(resolve(node.input[1])[1:])
        elif node.op_type == "Attention":
            b, heads, queries, size = resolve(node.input[0])
            keys, values = resolve(node.input[1])[-2], resolve(node.input[2])[-1]
            if visible is not None and len(node.input) > 6 and node.input[6]:
                keys = visible
            attention += b * heads * queries * keys * (size + values)
    return weights, attention


def _storage_key(tensor: onnx.TensorProto) -> str:
    if tensor.data_location == TensorProto.EXTERNAL:
        place = {entry.key: entry.value for entry in tensor.external_data}
        return f"{place.get('location')}@{place.get('offset', '0')}+{place.get('length', '')}"
    unnamed = onnx.TensorProto()
    unnamed.CopyFrom(tensor)
    unnamed.ClearField("name")
    return hashlib.sha256(unnamed.SerializeToString(deterministic=True)).hexdigest()


class _Shapes:
    """Shapes of values, named dimensions filled in from the shapes of the inputs."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]):
        graph = model.graph
        self._stated = {v.name: v.type.tensor_type.shape for v in [*graph.value_info, *graph.input, *graph.output]}
        self._stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._inputs = {value.name for value in graph.input}
        self._producers = {output: node for node in graph.node for output in node.output}
        self._sizes: dict[str, int] = {}
        for name, actual in shapes.items():
            stated = self._stated[name].dim
            if len(stated) != len(actual):
                raise ValueError(f"input {name} has {len(stated)} dimensions, {tuple(actual)} was given")
            for dimension, size in zip(stated, actual, strict=True):
                if dimension.dim_param:
                    self._bind(dimension.dim_param, size)

    def __call__(self, name: str) -> tuple[int, ...]:
        if name in self._stored:
            return self._stored[name]
        if name in self._stated:
            return tuple(
                _evaluate(d.dim_param, self._sizes) if d.dim_param else d.dim_value for d in self._stated[name].dim
            )
        node = self._producers.get(name)
        if node is not None and node.op_type in _SAME_SHAPE:
            return self(node.input[0])
        raise ValueError(f"value {name} has no shape in the file; export the bundle again")

    def is_table(self, name: str) -> bool:
        """True for an initialiser or a graph input, whatever was done to its layout."""
        while name not in self._stored and name not in self._inputs:
            node = self._producers.get(name)
            if node is None or node.op_type not in {*_SAME_SHAPE, "Transpose", "Slice", "Gather"}:
                return False
            name = node.input[0]
        return True

    def _bind(self, expression: str, size: int) -> None:
        names = {node.id for node in ast.walk(ast.parse(expression, mode="eval")) if isinstance(node, ast.Name)}
        free = names - self._sizes.keys()
        if len(free) > 1:
            raise ValueError(f"dimension {expression} = {size} leaves {', '.join(sorted(free))} open")
        for name in free:  # linear in its one unknown: solve from two points
            zero, one = (_evaluate(expression, {**self._sizes, name: value}) for value in (0, 1))
            self._sizes[name] = (size - zero) // (one - zero)
        if _evaluate(expression, self._sizes) != size:
            raise ValueError(f"dimension {expression} cannot be {size}")


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"dimension {expression} is not fixed by the given shapes")

    return value(ast.parse(expression, mode="eval").body)
