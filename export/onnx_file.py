"""One torch module to one ONNX file, and the shared weight file of a bundle.

Graphs of a bundle share weights (context and step, first and next, encoder and projection). All of them keep their
large tensors in one file, each content once, so a bundle holds the model once.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, external_data_helper, numpy_helper
from torch import Tensor, nn

from worldvln_edge.bundle import TensorSpec

OPSET = 24
WEIGHTS_FILE = "weights.bin"
_ALIGNMENT = 4096  # lets every engine map the tensors instead of reading them
_INLINE_BYTES = 1024


class ExportError(RuntimeError):
    """A graph that could not be exported. The message names the graph."""


def export_module(
    name: str,
    module: nn.Module,
    example: Sequence[Tensor],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, object]],
) -> onnx.ModelProto:
    """Trace a module to ONNX.

    Args:
        name: of the graph.
        module: in eval mode.
        example: one tensor per input, all distinct objects (the exporter merges identical ones).
        inputs, outputs: names, in order.
        dynamic: input name -> axis -> `torch.export.Dim` (or a derived one).

    Raises:
        ExportError: the module does not trace, or the result is not valid ONNX.
    """
    shapes = tuple(dict(dynamic.get(key, {})) or None for key in inputs)
    varargs = len(inputs) - _positional(module)
    if varargs > 0:
        shapes = (*shapes[: len(shapes) - varargs], tuple(shapes[len(shapes) - varargs :]))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            traced = torch.export.export(module.eval(), tuple(example), dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                traced,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except (RuntimeError, torch._dynamo.exc.UserError, torch.onnx.errors.OnnxExporterError) as error:
            raise ExportError(f"graph {name} does not export: {error}") from error
    if program is None:
        raise ExportError(f"graph {name} does not export: the exporter gave no program")
    model = program.model_proto
    _strip_debug_data(model)
    found = [node.name for node in model.graph.input]
    if found != list(inputs) or [node.name for node in model.graph.output] != list(outputs):
        raise ExportError(f"graph {name}: the exporter changed the inputs to {found}; expected {list(inputs)}")
    return model


def _positional(module: nn.Module) -> int:
    """Parameters of `forward` that are not `*states` or `*caches`."""
    code = type(module).forward.__code__
    return code.co_argcount - 1


def _strip_debug_data(model: onnx.ModelProto) -> None:
    """Remove stack traces and local paths: they would make equal exports differ, and tell of the exporting machine."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


class SharedWeights:
    """Writes large tensors of many graphs to one file, equal contents once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._stream = (folder / WEIGHTS_FILE).open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def store(self, model: onnx.ModelProto, file: str) -> None:
        """Move the model's large tensors to the shared file, check it, and write it as `file`."""
        for tensor in model.graph.initializer:
            data = numpy_helper.to_array(tensor).tobytes() if not tensor.HasField("raw_data") else tensor.raw_data
            if len(data) < _INLINE_BYTES:
                continue
            digest = hashlib.sha256(data).digest()
            if digest not in self._places:
                self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
                self._places[digest] = (self._stream.tell(), len(data))
                self._stream.write(data)
            offset, length = self._places[digest]
            tensor.raw_data = data  # the helper below looks for it
            external_data_helper.set_external_data(tensor, WEIGHTS_FILE, offset=offset, length=length)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        self._stream.flush()
        path = self._folder / file
        onnx.save_model(model, path)
        onnx.checker.check_model(str(path))

    def close(self) -> None:
        self._stream.close()


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of graph inputs or outputs."""
    specs = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(d.dim_param if d.dim_param else int(d.dim_value) for d in kind.shape.dim)
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(specs)
