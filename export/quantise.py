"""Quantisation of a traced graph, in place: `DequantizeLinear` in front of the matrix products of the blocks.

Weights are quantised while they stream from the checkpoint into the bundle. ModelOpt and ONNX Runtime's quantisers load
the whole ONNX model with its weights before they start; an export of 8.7 billion parameters has to stay below 6 GiB.

| precision | graph in front of MatMul                                                                    |
|-----------|---------------------------------------------------------------------------------------------|
| int4      | weight: int4 [K, N], scales [K / block, N] -> DequantizeLinear(axis 0, block_size)           |
| int8, fp8 | input: QuantizeLinear, DequantizeLinear with one scale; weight: codes [K, N], scales [N] ->   |
|           | DequantizeLinear(axis 1)                                                                    |

Scales have the compute dtype, which is what a strongly typed TensorRT network asks for. ONNX Runtime's CPU provider
fuses int4 into `MatMulNBits` in either dtype, and int8 into `MatMulIntegerToFloat` where the scales are float32; with
float16 scales, and with fp8, it computes the operators one by one (right, not fast): compute int8 in fp32 there.

On x64 without VNNI its default int8 kernels saturate (`session.x64quantprecision` = 1 makes them exact); it fuses the
products that share an input only with its optimiser CommonSubexpressionElimination switched off.

Legend: N outputs, K inputs of a linear.
Source: ONNX QuantizeLinear and DequantizeLinear (opset 19 to 24); spec/world_model.md 2.6.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from worldvln_edge.export.calibration import Calibration, input_key
from worldvln_edge.export.channel_scales import ChannelScales
from worldvln_edge.export.low_bits import (
    E4M3_LARGEST,
    INT8_LARGEST,
    block_size,
    int4_blocks,
    pack_int4,
    per_channel,
    rows_of,
    stored_scales,
)
from worldvln_edge.export.planned_tensor import CastReports, PlannedTensor, TensorReader, as_array
from worldvln_edge.export.precision import COMPUTE_DTYPES, Precision, PrecisionError
from worldvln_edge.export.tracing import TracedGraph, add_weight, constant

_SCALE_TYPES = {
    torch.float32: (ir.DataType.FLOAT, np.dtype(np.float32)),
    torch.float16: (ir.DataType.FLOAT16, np.dtype(np.float16)),
    torch.bfloat16: (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
_CODE_TYPES = {
    "int8": (ir.DataType.INT8, torch.int8, np.dtype(np.int8)),
    "fp8": (ir.DataType.FLOAT8E4M3FN, torch.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn)),
}


def quantise_graph(
    traced: TracedGraph, precision: Precision, calibration: Calibration | None, reports: CastReports
) -> None:
    """Replace the weights that `precision` quantises by codes and scales, and fold channel scales into the rest.

    Args:
        traced: changed in place. A graph without quantised weights stays as it is.
        precision: what to do.
        calibration: of the same checkpoint, where `precision.needs_calibration`.
        reports: takes block scales that do not fit the compute dtype.

    Raises:
        PrecisionError: no calibration where one is needed, one of another model, or a weight that no block divides.
    """
    if not precision.quantises:
        return
    if precision.needs_calibration and calibration is None:
        raise PrecisionError(
            f"precision {precision.name} needs the ranges of activations; measure them with `worldvln-edge calibrate`"
        )
    _GraphQuantiser(traced, precision, calibration, reports).run()


class _GraphQuantiser:
    def __init__(
        self, traced: TracedGraph, precision: Precision, calibration: Calibration | None, reports: CastReports
    ):
        self.traced, self.graph = traced, traced.model.graph
        self.precision, self.calibration, self.reports = precision, calibration, reports
        self.scale_dtype = COMPUTE_DTYPES[precision.compute]
        self.scale_type, self.scale_numpy = _SCALE_TYPES[self.scale_dtype]
        self.scales: ChannelScales | None = None
        if precision.name == "int4" and precision.int4_method == "awq":
            assert calibration is not None  # `quantise_graph` asks for it
            self.scales = ChannelScales(calibration, precision.block, self.scale_dtype)
        method = f".{precision.int4_method}{precision.block}" if precision.name == "int4" else ""
        self.label = f"{precision.name}{method}.{precision.compute}"
        self.added: set[str] = set()
        self.input_scales: dict[str, tuple[ir.Value, ir.Value]] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type != "MatMul" or node.inputs[1] is None:
                continue
            name = str(node.inputs[1].name)
            stored = self.traced.weights.get(name)
            if stored is None or stored.key is None or not self.precision.quantised(stored.key):
                continue
            self._quantise_weight(node, name, stored)
            if self.precision.name in _CODE_TYPES:
                node.replace_input_with(0, self._round_input(node, stored.key, stored.shape[0]))
        for name, stored in list(self.traced.weights.items()):
            if stored.key is None or name in self.added:
                continue
            if self.precision.quantised(stored.key):
                raise PrecisionError(
                    f"graph {self.traced.name} reads {stored.key} other than as the right side of MatMul, which "
                    f"{self.precision.name} cannot quantise; export in another precision"
                )
            self._fold(name, stored)

    def _quantise_weight(self, node: ir.Node, name: str, stored: PlannedTensor) -> None:
        """Put codes, scales and DequantizeLinear in the place of one weight."""
        key = str(stored.key)
        inputs, outputs = stored.shape
        weight = self.graph.initializers[name]
        attributes = {"axis": 1}
        if self.precision.name == "int4":
            block = block_size(key, inputs, self.precision.block)
            attributes = {"axis": 0, "block_size": block}
            planned = self._plan(key, stored, (inputs // block, outputs), ir.DataType.INT4, block)
        else:
            planned = self._plan(key, stored, (outputs,), _CODE_TYPES[self.precision.name][0], 0)
        values = [add_weight(self.traced, f"{name}.{part}", tensor) for part, tensor in planned.items()]
        self.added.update(f"{name}.{part}" for part in planned)
        if self.precision.name == "int8":
            values.append(self._zero_points(name, outputs))
        restored = self._insert(node, "DequantizeLinear", values, f"{name}.restored", self.scale_type, attributes)
        restored.shape = ir.Shape(stored.shape)
        ir.convenience.replace_all_uses_with(weight, restored)
        self.graph.initializers.pop(name)
        del self.traced.weights[name]

    def _plan(
        self, key: str, stored: PlannedTensor, scales_shape: tuple[int, ...], kind: ir.DataType, block: int
    ) -> dict[str, PlannedTensor]:
        """Codes and scales of one weight; `block` is 0 where each output has one scale."""
        inputs, outputs = stored.shape
        made: dict[str, Tensor] = {}  # scales of the codes that were made last

        def quantise(read: TensorReader) -> Tensor:
            weight = read(key)
            if tuple(weight.shape) != (outputs, inputs):
                raise PrecisionError(f"{key} has shape {list(weight.shape)}, the graph reads {[outputs, inputs]}")
            columns = self.scales.of_inputs(key, read) if self.scales else None
            divided = self.scales.of_outputs(key, read) if self.scales else None
            importance = self.scales.importance(key, read) if self.scales else None
            rows = rows_of(weight, columns, divided)
            if block:
                codes, scales = int4_blocks(rows, (outputs, inputs), block, self.scale_dtype, importance)
                scales = scales.t()
            else:
                dtype = _CODE_TYPES[self.precision.name][1]
                codes, scales = per_channel(rows, (outputs, inputs), dtype, self.scale_dtype)
            made["scales"] = scales
            return codes

        def make_codes(read: TensorReader) -> np.ndarray:
            codes = quantise(read).t()
            return pack_int4(codes).numpy() if block else _code_array(codes)

        def make_scales(read: TensorReader) -> np.ndarray:
            if not made:  # the codes were written by a run that was stopped
                quantise(read)
            scales = made.pop("scales")
            self.reports.cast(key, scales, self.scale_dtype)
            return as_array(stored_scales(scales, self.scale_dtype))

        return {
            "codes": PlannedTensor(
                f"{key}|{self.label}.codes", kind, stored.shape, make_codes, key=key, is_transposed=True
            ),
            "scales": PlannedTensor(f"{key}|{self.label}.scales", self.scale_type, scales_shape, make_scales, key=key),
        }

    def _zero_points(self, name: str, outputs: int) -> ir.Value:
        """Zero per output channel. ONNX takes it for granted, but ONNX Runtime's exact kernels for processors without
        8-bit dot products (session.x64quantprecision) need it spelt out, and for every weight anew."""
        value = constant(f"{name}.zero_points", np.zeros(outputs, np.int8))
        self.graph.register_initializer(value)
        return value

    def _round_input(self, node: ir.Node, key: str, channels: int) -> ir.Value:
        """QuantizeLinear and DequantizeLinear in front of one product.

        Each product has a pair of its own, with the scale of the shared input: ONNX Runtime fuses no pair that several
        products read (and merges these pairs unless its CommonSubexpressionElimination is switched off).
        """
        value = node.inputs[0]
        assert value is not None
        step, zero = self._input_scale(key, channels)
        kind, stem = _CODE_TYPES[self.precision.name][0], key.removesuffix(".weight")
        codes = self._insert(node, "QuantizeLinear", [value, step, zero], f"{stem}.input_codes", kind, {})
        restored = f"{stem}.rounded_input"
        rounded = self._insert(node, "DequantizeLinear", [codes, step, zero], restored, self.scale_type, {})
        codes.shape = rounded.shape = value.shape
        return rounded

    def _input_scale(self, key: str, channels: int) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of an input, once for all products that read it."""
        first = input_key(key)
        if first not in self.input_scales:
            assert self.calibration is not None  # `quantise_graph` asks for it
            found = self.calibration.of(key, channels)
            is_int8 = self.precision.name == "int8"
            # int8 has even steps, so a rare value must not widen them; e4m3 has room for it.
            scale = torch.tensor(found.robust / INT8_LARGEST if is_int8 else found.largest / E4M3_LARGEST)
            stem, numpy_type = first.removesuffix(".weight"), _CODE_TYPES[self.precision.name][2]
            step = constant(f"{stem}.input_scale", as_array(stored_scales(scale, self.scale_dtype)))
            zero = constant(f"{stem}.input_zero", np.zeros((), numpy_type))
            for value in (step, zero):
                self.graph.register_initializer(value)
            self.input_scales[first] = (step, zero)
        return self.input_scales[first]

    def _insert(
        self, before: ir.Node, operator: str, inputs: list[ir.Value], name: str, kind: ir.DataType, attributes: dict
    ) -> ir.Value:
        output = ir.Value(name=name, type=ir.TensorType(kind))
        node = ir.node(operator, inputs, attributes=attributes, outputs=[output], name=name)
        self.graph.insert_before(before, node)
        return output

    def _fold(self, name: str, stored: PlannedTensor) -> None:
        """Divide the tensors in front of a linear by its channel scales, where nothing else carries the division."""
        key, scales = str(stored.key), self.scales
        linear = ChannelScales.linear_behind(key)
        is_value_bias = key.startswith("world_model.block") and key.endswith(".v_proj.bias")
        if scales is None or (linear is None and not is_value_bias):
            return
        dtype = next(dtype for dtype, (kind, _) in _SCALE_TYPES.items() if kind == stored.dtype)

        def make(read: TensorReader) -> np.ndarray:
            divisor = scales.of_outputs(key, read) if linear is None else scales.of_inputs(linear, read)
            assert divisor is not None
            return as_array(self.reports.cast(key, read(key).float() / divisor, dtype))

        self.traced.weights[name] = PlannedTensor(
            f"{key}|{self.label}.folded", stored.dtype, stored.shape, make, key=key
        )


def _code_array(codes: Tensor) -> np.ndarray:
    if codes.dtype == torch.float8_e4m3fn:
        return codes.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return codes.contiguous().numpy()
