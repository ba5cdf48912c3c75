"""Scales with which a graph rounds the inputs of its linears (int8, fp8), against the ranges they were made from.

They lie in the graph files, not among the weights.

| held against                                  | when                       | a scale must be                       |
|-----------------------------------------------|----------------------------|---------------------------------------|
| the calibration file that the manifest names  | it is given                | equal, bit by bit                     |
| the ranges of the flights that are flown      | else, where flights are    | within a factor of 2                  |
| all products that read the same input         | always                     | equal                                 |

Source: export/quantise.py (the graph); ONNX QuantizeLinear.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass

import onnx
import torch
from onnx import numpy_helper

from worldvln_edge.bundle import Bundle
from worldvln_edge.export.calibration import Calibration, CalibrationError, input_key
from worldvln_edge.export.exporter import WEIGHTS_PROPERTY
from worldvln_edge.export.low_bits import E4M3_LARGEST, INT8_LARGEST, stored_scales
from worldvln_edge.export.parity_bounds import ParityRow, VerifyError
from worldvln_edge.export.precision import CALIBRATED, COMPUTE_DTYPES

STAGE = "input_scales"
LARGEST_RATIO = 2.0
"""Between the range of a calibration and that of other flights: at most 1.41 on two, 1.31 on eight (shipped model)."""
_LISTED = 5


@dataclass(frozen=True)
class InputScale:
    """How one product of one graph rounds its input."""

    graph: str
    key: str
    """Of the weight that the input is multiplied with."""
    channels: int
    quantise: float
    """Scale of QuantizeLinear; NaN where the input is not rounded."""
    dequantise: float
    """Scale of DequantizeLinear behind it."""


def input_scales(bundle: Bundle) -> list[InputScale]:
    """Of all products with quantised weights.

    Raises:
        VerifyError: a graph whose quantised weights are not read as `quantise` writes it.
    """
    return [
        scale
        for name in bundle.manifest.graphs
        for scale in _of_graph(name, onnx.load(bundle.graph_path(name), load_external_data=False))
    ]


def _of_graph(name: str, model: onnx.ModelProto) -> list[InputScale]:
    origins = json.loads({entry.key: entry.value for entry in model.metadata_props}.get(WEIGHTS_PROPERTY, "{}"))
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        rounded, weight = (made_by.get(value) for value in node.input)
        origin = origins.get(weight.input[0], "") if weight is not None and weight.op_type == "DequantizeLinear" else ""
        if not origin.endswith(".codes"):
            continue
        codes = made_by.get(rounded.input[0]) if rounded is not None and rounded.op_type == "DequantizeLinear" else None
        values = [float("nan")] * 2
        if rounded is not None and codes is not None and codes.op_type == "QuantizeLinear":
            values = [_number(initializers.get(one.input[1]), name) for one in (codes, rounded)]
            zeros = [_number(initializers.get(one.input[2]), name) for one in (codes, rounded)]
            values = [value if zero == 0 else float("nan") for value, zero in zip(values, zeros, strict=True)]
        channels = initializers[weight.input[0]].dims[0]
        found.append(InputScale(name, origin.partition("|")[0], channels, values[0], values[1]))
    return found


def _number(tensor: onnx.TensorProto | None, graph: str) -> float:
    if tensor is None or tensor.external_data or list(tensor.dims):
        raise VerifyError(f"graph {graph} rounds an input with a scale that is no constant; export the bundle again")
    return float(numpy_helper.to_array(tensor).astype("float32"))


def check_calibration(bundle: Bundle, calibration: Calibration) -> None:
    """Raise VerifyError when the bundle was not made with this calibration."""
    described = bundle.manifest.calibration
    if described is None:
        raise VerifyError(f"{bundle.folder} was made without a calibration; leave --calibration away")
    if described.sha256 != calibration.sha256:
        raise VerifyError(
            f"{bundle.folder} was made with the calibration with sha256 {described.sha256[:12]}, this one has "
            f"{calibration.sha256[:12]}; give the file it was made with, or leave --calibration away"
        )


def compare_input_scales(bundle: Bundle, calibration: Calibration | None, measured: Calibration | None) -> ParityRow:
    """The row `input_scales`.

    Args:
        bundle: of any precision.
        calibration: that the bundle was made with, see `check_calibration`.
        measured: of other flights; used where `calibration` is None.
    """
    if bundle.manifest.precision not in CALIBRATED:
        return ParityRow(STAGE, note="no input is rounded")
    scales = input_scales(bundle)
    failures: list[str] = []
    by_input: dict[str, set[float]] = defaultdict(set)
    worst = 1.0
    for scale in scales:
        by_input[input_key(scale.key)] |= {scale.quantise, scale.dequantise}
    for key, values in by_input.items():
        if len(values) > 1 or not all(value > 0 for value in values):
            failures.append(f"{key}: its input is rounded with scales {', '.join(f'{v:.6g}' for v in sorted(values))}")
    for scale in scales:
        if failures or (calibration is None and measured is None):
            break
        try:
            expected = _expected(bundle, calibration or measured, scale)
        except CalibrationError as error:
            failures.append(str(error))
            continue
        worst = max(worst, scale.quantise / expected, expected / scale.quantise)
        if calibration is not None and scale.quantise != expected:
            failures.append(f"{scale.graph}, {scale.key}: {scale.quantise:.6g}, the calibration gives {expected:.6g}")
        elif max(scale.quantise / expected, expected / scale.quantise) > LARGEST_RATIO:
            failures.append(f"{scale.graph}, {scale.key}: {scale.quantise:.3g}, the flights give {expected:.3g}")
    hidden = len(failures) - _LISTED
    values = {"scales": float(len(scales)), "worst_ratio": worst}
    note = "with the calibration" if calibration else "with the flights" if measured else "with each other only"
    listed = [*failures[:_LISTED], *([f"{hidden} more scales are wrong"] if hidden > 0 else [])]
    return ParityRow(STAGE, values, listed, note)


def _expected(bundle: Bundle, calibration: Calibration | None, scale: InputScale) -> float:
    assert calibration is not None
    found = calibration.of(scale.key, scale.channels)
    is_int8 = bundle.manifest.precision == "int8"
    value = torch.tensor(found.robust / INT8_LARGEST if is_int8 else found.largest / E4M3_LARGEST)
    return float(stored_scales(value, COMPUTE_DTYPES[bundle.manifest.compute]))
