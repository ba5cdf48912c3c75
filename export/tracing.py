"""A torch module to an ONNX graph that has no weights yet.

The module's parameters may be fake (shapes without data), so a graph of any size is traced in the memory of its
structure. Weights are kept out of the optimiser's reach while it runs: folding them would need their values.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from worldvln_edge.config import ModelConfig
from worldvln_edge.export.graph_sources import BlockStack, GraphSource
from worldvln_edge.export.planned_tensor import PlannedTensor
from worldvln_edge.export.world_model_graphs import BLOCKS_DOMAIN, BLOCKS_OP
from worldvln_edge.models.worldvln import WorldVLN


class ExportError(RuntimeError):
    """A graph that could not be exported. The message names the graph."""


@dataclass
class TracedGraph:
    """An ONNX graph and the tensors that its initializers stand for."""

    name: str
    model: ir.Model
    weights: dict[str, PlannedTensor]


WeightOf = Callable[[str, Tensor, bool], PlannedTensor]
"""(checkpoint key, parameter, transposed) -> what to store for it."""


def fake_model(config: ModelConfig, dtype_of: Callable[[str], torch.dtype]) -> tuple[FakeTensorMode, WorldVLN]:
    """The networks without weights: parameters have shape and dtype only, and exist under the returned mode."""
    with torch.device("meta"):
        model = WorldVLN(config).eval().requires_grad_(False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    dtype = dtype_of(f"{prefix}.{name}")
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), False)
    return mode, model


def trace_graph(
    source: GraphSource, keys: Mapping[int, str], weight_of: WeightOf, *, opset: int, mode: FakeTensorMode | None = None
) -> TracedGraph:
    """Trace one graph.

    Args:
        source: module, example and names.
        keys: `id(parameter)` -> checkpoint key, of every parameter of the module.
        weight_of: what to store for a parameter. A linear's weight is asked for transposed, as `MatMul` reads it.
        opset: of the ONNX file.
        mode: of the parameters and the example, if they are fake.

    Raises:
        ExportError: the module does not trace, or the result is not what `source` says.
    """
    model, uses = _trace(source, opset, mode)
    graph = model.graph
    parameters = dict(source.module.named_parameters(remove_duplicate=False))
    weights = {}
    for name, (parameter, transposed) in uses.items():
        tensor = parameters[parameter]
        weights[name] = weight_of(keys[id(tensor)], tensor, transposed)
        _fill(graph.initializers[name], weights[name])
    traced = TracedGraph(source.name, model, weights)
    if source.stack is not None:
        _expand(traced, source.stack, keys, weight_of, opset, mode)
    _name_sizes(graph, source)
    for what, values, expected in (("inputs", graph.inputs, source.inputs), ("outputs", graph.outputs, source.outputs)):
        if (found := [value.name for value in values]) != list(expected):
            raise ExportError(f"graph {source.name}: the exporter made the {what} {found}; expected {list(expected)}")
    return traced


def _sizes_of(own: Sequence[ir.Value], given: Sequence[ir.Value | None]) -> dict[str, str]:
    """Names of the block's dimensions -> what they are called where it is put."""
    sizes = {}
    for inner, outer in zip(own, given, strict=True):
        if inner.shape is not None and outer is not None and outer.shape is not None:
            for name, size in zip(inner.shape, outer.shape, strict=True):
                if isinstance(name, ir.SymbolicDim) and name.value is not None:
                    sizes[name.value] = str(size.value if isinstance(size, ir.SymbolicDim) else size)
    return sizes


def _renamed(shape: ir.Shape | None, sizes: Mapping[str, str]) -> ir.Shape | None:
    if shape is None:
        return None

    def renamed(match: re.Match[str]) -> str:
        return f"({sizes[match[0]]})" if match[0] in sizes else match[0]

    return ir.Shape(
        [re.sub(r"[A-Za-z_]\w*", renamed, str(d.value)) if isinstance(d, ir.SymbolicDim) else d for d in shape]
    )


def _name_sizes(graph: ir.Graph, source: GraphSource) -> None:
    """Call open sizes what `source` calls them: the exporter makes up names, one for every input it sees no link of."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, dim in source.dynamic.get(str(value.name), {}).items():
            size = value.shape[axis] if value.shape is not None else None
            if isinstance(size, ir.SymbolicDim) and re.fullmatch(r"\w+", str(size.value)):
                names[str(size.value)] = str(dim.__name__)
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), str(size.value))
                    if isinstance(size, ir.SymbolicDim) and size.value is not None
                    else size
                    for size in value.shape
                ]
            )


Uses = dict[str, tuple[str, bool]]
"""Initializer name -> (parameter of the module, transposed)."""


def _trace(source: GraphSource, opset: int, mode: FakeTensorMode | None) -> tuple[ir.Model, Uses]:
    """The optimised graph; initializers that stand for parameters are without content."""
    model = _export(source, opset, mode).model
    graph = model.graph
    parameters = dict(source.module.named_parameters(remove_duplicate=False))
    count = len(graph.inputs)
    for name, value in list(graph.initializers.items()):
        if name in parameters:
            graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
    onnxscript.optimizer.optimize_ir(model)
    uses: Uses = {}
    for value in list(graph.inputs)[count:]:
        graph.inputs.remove(value)
        uses.update(_settle(graph, value))
    _strip_debug_data(model)
    return model, uses


def _expand(
    traced: TracedGraph,
    stack: BlockStack,
    keys: Mapping[int, str],
    weight_of: WeightOf,
    opset: int,
    mode: FakeTensorMode | None,
) -> None:
    """Put copies of the traced block in the place of the `Blocks` node, each with the weights of its layer."""
    graph = traced.model.graph
    (place,) = [node for node in graph if node.domain == BLOCKS_DOMAIN and node.op_type == BLOCKS_OP]
    block = _trace(stack.block, opset, mode)
    last = _trace(stack.last, opset, mode) if stack.last else block
    x, *shared = place.inputs[:4]
    present: list[ir.Value] = []
    for layer, module in enumerate(stack.modules):
        model, uses = last if layer == len(stack.modules) - 1 else block
        past = place.inputs[4 + 2 * layer : 6 + 2 * layer]
        outputs = _copy(
            traced, place, model.graph, [x, *shared, *past], f"block_{layer}", uses, module, keys, weight_of
        )
        if len(outputs) == 3:
            x = outputs.pop(0)
        present += outputs
    results = present if stack.last else [x, *present]
    for old, new in zip(place.outputs, results, strict=True):
        name, shape = old.name, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.placeholder", name
        new.shape = shape
    graph.remove(place, safe=True)
    traced.model.opset_imports.pop(BLOCKS_DOMAIN, None)


def _copy(
    traced: TracedGraph,
    place: ir.Node,
    block: ir.Graph,
    inputs: Sequence[ir.Value | None],
    prefix: str,
    uses: Uses,
    module: nn.Module,
    keys: Mapping[int, str],
    weight_of: WeightOf,
) -> list[ir.Value]:
    """Insert a copy of the block's nodes before `place`, and return the values of its outputs."""
    parameters = dict(module.named_parameters())
    values: dict[ir.Value | None, ir.Value | None] = {None: None, **dict(zip(block.inputs, inputs, strict=True))}
    sizes = _sizes_of(block.inputs, inputs)
    for name, value in block.initializers.items():
        if name in uses:
            parameter, transposed = uses[name]
            tensor = parameters[parameter]
            planned = weight_of(keys[id(tensor)], tensor, transposed)
            values[value] = add_weight(traced, f"{prefix}.{name}", planned)
        else:
            values[value] = ir.Value(name=f"{prefix}.{name}", shape=value.shape, type=value.type)
            values[value].const_value = value.const_value  # type: ignore[union-attr]
            traced.model.graph.register_initializer(values[value])  # type: ignore[arg-type]
    for node in block:
        copied = ir.Node(
            node.domain,
            node.op_type,
            [values[value] for value in node.inputs],
            dict(node.attributes),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{prefix}.{node.name}",
        )
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name, new.type, new.shape = f"{prefix}.{old.name}", old.type, _renamed(old.shape, sizes)
            values[old] = new
        traced.model.graph.insert_before(place, copied)
    return [cast(ir.Value, values[value]) for value in block.outputs]


def _export(source: GraphSource, opset: int, mode: FakeTensorMode | None) -> torch.onnx.ONNXProgram:
    shapes = tuple(dict(source.dynamic.get(key, {})) or None for key in source.inputs)
    varargs = len(source.inputs) - _positional(source.module)
    if varargs > 0:
        shapes = (*shapes[: len(shapes) - varargs], tuple(shapes[len(shapes) - varargs :]))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), mode or FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        try:
            traced = torch.export.export(source.module.eval(), source.example, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                traced,
                input_names=list(source.inputs),
                output_names=list(source.outputs),
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except (RuntimeError, torch._dynamo.exc.UserError, torch.onnx.errors.OnnxExporterError) as error:
            raise ExportError(f"graph {source.name} does not export: {error}") from error
    if program is None:
        raise ExportError(f"graph {source.name} does not export: the exporter gave no program")
    return program


def _positional(module: nn.Module) -> int:
    """Parameters of `forward` that are not `*states` or `*caches`."""
    code = type(module).forward.__code__
    return code.co_argcount - 1


def _settle(graph: ir.Graph, value: ir.Value) -> Uses:
    """Make a parameter an initializer again: as it is, and transposed where the graph transposes it."""
    parameter, uses = str(value.name), Uses()
    turned: ir.Value | None = None
    for use in list(value.uses()):
        node = use.node
        if node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != [1, 0]:
            continue
        if turned is None:
            turned = ir.Value(name=f"{parameter}.transposed")
            graph.register_initializer(_without_content(turned))
            uses[str(turned.name)] = (parameter, True)
        ir.convenience.replace_all_uses_with(node.outputs[0], turned)
        graph.remove(node, safe=True)
    if value.uses() or value in graph.outputs:
        graph.register_initializer(_without_content(value))
        uses[parameter] = (parameter, False)
    return uses


def _without_content(value: ir.Value) -> ir.Value:
    shape = ir.Shape(())
    value.const_value = ir.ExternalTensor("", 0, 0, ir.DataType.FLOAT, shape=shape, name=str(value.name))
    return value


def _fill(value: ir.Value, planned: PlannedTensor) -> None:
    """Say what an initializer holds. Its place in the weight file is not known yet."""
    shape = ir.Shape(planned.shape)
    value.shape, value.type = shape, ir.TensorType(planned.dtype)
    value.const_value = ir.ExternalTensor("", 0, planned.size_bytes, planned.dtype, shape=shape, name=str(value.name))


def constant(name: str, array: np.ndarray) -> ir.Value:
    """A small initializer that is stored inside the graph file."""
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.const_value = ir.tensor(array, name=name)
    return value


def add_weight(traced: TracedGraph, name: str, planned: PlannedTensor) -> ir.Value:
    """Give the graph one more initializer of the weight file, and return its value."""
    value = ir.Value(name=name)
    _fill(value, planned)
    traced.model.graph.register_initializer(value)
    traced.weights[name] = planned
    return value


def _strip_debug_data(model: ir.Model) -> None:
    """Remove stack traces and local paths: they would make equal exports differ, and tell of the exporting machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
