"""An ONNX graph as a TensorRT network that computes the same, or a refusal that says what to do.

The network is always strongly typed, so precision is what the graph says and nothing else.

TensorRT's ONNX parser (RTX 1.7, checked) drops the input of `Attention` that says how much of the KV cache is valid:
the engine would attend to stale entries and say nothing. `_restore_kv_lengths` puts it back, and an input that the
builder reports as unused fails the build.

Source: design of the graphs in runtime/worldvln/graphs.py; ONNX opset 24 `Attention`, input 7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from worldvln_edge.export.build_job import AHEAD_OF_TIME, BuildJob, EngineBuildError, Target
from worldvln_edge.runtime.engines.tensorrt_library import LogSpan

LEAST_CAPABILITY_RTX = {"fp16": 75, "int8": 75, "fp32": 80, "bf16": 80, "int4": 80, "fp8": 89}
"""Number format -> first compute capability that tensorrt_rtx 1.7 multiplies it for; found by asking it to build.
`tensorrt` knows the GPU that it builds on and refuses by itself."""

_KV_LENGTH_INPUT = 6
_UNUSED_INPUT = re.compile(r"Unused Input: (\S+)")


def parse_network(trt: ModuleType, builder: Any, logger: Any, job: BuildJob, said: LogSpan) -> Any:
    """The network of a job's graph, ready to build.

    Raises:
        EngineBuildError: it does not parse, or attention over the KV cache would not run fused.
    """
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job.bundle / job.file)):
        reason = parser.get_error(0).desc() if parser.num_errors else said.first_error()
        raise EngineBuildError(
            f"{job.where}: {job.target.package} {job.target.version} does not parse it ({reason}); export the bundle "
            "again, with --kv portable for TensorRT 10"
        )
    _prepare_attention(trt, network, job)
    return network


def _network_flags(trt: ModuleType) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows no other network
    return 0 if flag is None else 1 << int(flag)


def _layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _prepare_attention(trt: ModuleType, network: Any, job: BuildJob) -> None:
    """Attention over the cache gets its lengths back and must run fused; any other may fall apart into plain layers.

    A fused kernel for fp32 does not exist. Unfused attention over the cache would also build, and materialise scores
    against the whole capacity at every step; nobody wants to fly that, so it is refused.
    """
    lengths = _kv_lengths(job.bundle / job.file)
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    attentions = {layer.name.removesuffix("_AttentionInput"): layer for layer in _layers(network) if layer.type == kind}
    for node in lengths:
        if node not in attentions:
            raise EngineBuildError(
                f"{job.where}: {job.target.package} {job.target.version} parses {node} into no attention layer; export "
                "the bundle again with --kv portable"
            )
    casts: dict[str, Any] = {}
    for name, layer in attentions.items():
        layer.__class__ = trt.IAttentionInputLayer  # the binding hands out the base class
        attention = layer.attention
        if name not in lengths:
            attention.decomposable = True
        elif layer.get_input(0).dtype == trt.DataType.FLOAT:
            raise EngineBuildError(
                f"{job.where}: attention over the KV cache is fp32 here and TensorRT's kernels for it are fp16 and "
                "bf16; export the bundle with --precision fp16 or bf16"
            )
        elif not hasattr(attention, "key_value_lengths"):
            raise EngineBuildError(
                f"{job.where}: {job.target.package} {job.target.version} attends over the whole cache only; export the "
                "bundle again with --kv portable"
            )
        else:
            attention.key_value_lengths = _restore_kv_lengths(trt, network, lengths[name], casts, job.where)


def _kv_lengths(path: Path) -> dict[str, str]:
    """Attention nodes with a valid length -> name of that tensor."""
    nodes = onnx.load_model(path, load_external_data=False).graph.node
    return {
        node.name: node.input[_KV_LENGTH_INPUT]
        for node in nodes
        if node.op_type == "Attention" and len(node.input) > _KV_LENGTH_INPUT and node.input[_KV_LENGTH_INPUT]
    }


def _restore_kv_lengths(trt: ModuleType, network: Any, name: str, casts: dict[str, Any], where: str) -> Any:
    """The int32 lengths that TensorRT wants, of the ONNX tensor `name`."""
    if name not in casts:
        inputs = (network.get_input(index) for index in range(network.num_inputs))
        source = next((tensor for tensor in inputs if tensor.name == name), None)
        if source is None:
            raise EngineBuildError(
                f"{where}: the valid length {name} is no input of the graph; export the bundle again"
            )
        casts[name] = network.add_cast(source, trt.DataType.INT32).get_output(0)
    return casts[name]


def network_formats(trt: ModuleType, network: Any) -> set[str]:
    """Number formats of a parsed network's tensors: fp32 counts where it is multiplied or nothing else is there."""
    names = {
        getattr(trt.DataType, kind): name
        for kind, name in (
            ("FLOAT", "fp32"),
            ("HALF", "fp16"),
            ("BF16", "bf16"),
            ("INT8", "int8"),
            ("INT4", "int4"),
            ("FP8", "fp8"),
        )
        if hasattr(trt.DataType, kind)
    }
    products = {trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION}
    found: set[str] = set()
    multiplied: set[str] = set()
    for layer in _layers(network):
        dtypes = {layer.get_output(index).dtype for index in range(layer.num_outputs)}
        formats = {names[dtype] for dtype in dtypes if dtype in names}
        found |= formats
        if layer.type in products:
            multiplied |= formats
    if "fp32" not in multiplied and found - {"fp32"}:
        found.discard("fp32")
    return found


def check_formats(formats: set[str], target: Target, where: str) -> None:
    """Refuse what the package cannot multiply on the target, with what it can.

    Raises:
        EngineBuildError: see above.
    """
    if target.package != AHEAD_OF_TIME:
        return
    capability = int(target.compute_capability.removeprefix("sm"))
    possible = [name for name, least in LEAST_CAPABILITY_RTX.items() if least <= capability]
    for name in sorted(formats - set(possible)):
        if "fp32" in possible:
            advice = f"export the bundle with --precision {' or '.join(possible)}"
        else:  # heads and guidance are fp32 in every bundle, so no precision helps here
            advice = (
                f"export the bundle with --precision {' or '.join(possible)} and build it on the device with "
                f"`--target local` (package tensorrt), because every bundle also computes in fp32 and {target.package} "
                f"does not for {target.compute_capability}"
            )
        raise EngineBuildError(
            f"{where}: the graph computes in {name}, which {target.package} builds for sm{LEAST_CAPABILITY_RTX[name]} "
            f"or newer; {advice}"
        )


def check_inputs_used(messages: Sequence[tuple[int, str]], where: str) -> None:
    """Refuse an engine that ignores an input.

    Raises:
        EngineBuildError: the builder said so.
    """
    unused = [match.group(1) for _, text in messages if (match := _UNUSED_INPUT.search(text))]
    if unused:
        raise EngineBuildError(
            f"{where}: the builder does not use input {unused[0]}, so the engine would compute something else than the "
            "graph; export the bundle again with --kv portable"
        )
