"""What `worldvln-edge inspect` reports, as one typed tree: from a bundle's files, or from a configuration alone.

Source: spec/world_model.md 6.1, 9.3; spec/video_vae.md 8, 9; spec/action_decoder.md 9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from worldvln_edge.bundle import BundleError, Manifest, TensorSpec
from worldvln_edge.config import ConfigError, ModelConfig
from worldvln_edge.export.cost_model import CostModel
from worldvln_edge.export.devices import Device
from worldvln_edge.export.inspect_bundle import (
    GraphStructure,
    bytes_by_dtype,
    load_structure_only,
    read_manifest,
    read_structure,
    unique_tensors,
)
from worldvln_edge.export.parameter_counts import PRECISIONS, graph_parameters, network_parameters
from worldvln_edge.export.segment_costs import FlightCosts, GraphWeights, SegmentCost, roofline_seconds
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.session_memory import SessionMemory, SessionSizes, session_memory

_PROMPT_TOKENS = 32  # a sentence or two, as in spec/world_model.md 9.3
_STRUCT = {"frozen": True, "kw_only": True}


class GraphReport(msgspec.Struct, **_STRUCT):
    name: str
    precision: str
    operators: int
    operator_types: dict[str, int]
    parameters: int
    bytes_by_dtype: dict[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class MemoryReport(msgspec.Struct, **_STRUCT):
    """Bytes of the weights and of one session beside them."""

    weights: int
    kv_buffers: int
    kv_stored: int
    """Entries of earlier scales, kept beside the buffers; most of a flight."""
    vae_encoder_state: int
    vae_decoder_state: int
    activation_peak: int
    """Estimate: the widest call of the minimal schedule."""
    session_at_most: SessionMemory
    """What one session may come to hold on a server, whatever it is sent; the cache's buffers are shared."""

    @property
    def session(self) -> int:
        return self.kv_buffers + self.kv_stored + self.vae_encoder_state + self.vae_decoder_state

    @property
    def total(self) -> int:
        return self.weights + self.session + self.activation_peak


class ScheduleReport(msgspec.Struct, **_STRUCT):
    token_steps: int
    world_model_calls: int
    flops: int
    flops_by_graph: dict[str, int]


class SegmentReport(msgspec.Struct, **_STRUCT):
    minimal: ScheduleReport
    full_horizon: ScheduleReport


class RooflineReport(msgspec.Struct, **_STRUCT):
    """Estimate for one device; no measurement."""

    device: str
    precision: str
    minimal_seconds: tuple[float, ...]
    full_horizon_seconds: tuple[float, ...]
    bytes_needed: int
    memory_bytes: int
    fits: bool
    source: str
    basis: str


class InspectReport(msgspec.Struct, **_STRUCT):
    name: str
    precision: str
    text_tokens: int
    guidance_rows: int
    kv_capacity: int
    networks: dict[str, int]
    """Parameters of the networks, from the configuration."""
    graphs: tuple[GraphReport, ...]
    parameters: int
    """Stored in the bundle, shared ones once; for a configuration, of all networks."""
    bytes_by_dtype: dict[str, int]
    weight_bytes_by_precision: dict[str, int]
    """For a configuration: bytes of the weights at each precision. Empty for a bundle."""
    memory: MemoryReport
    segments: tuple[SegmentReport, ...]
    roofline: tuple[RooflineReport, ...]


def inspect_bundle(folder: Path, *, devices: Sequence[Device], text_tokens: int | None = None) -> InspectReport:
    """Report on a bundle, without reading its weights.

    Args:
        folder: bundle folder. Files are looked up and their sizes compared; hashes are `verify`'s and the runtime's
            business, since hashing reads every byte.
        devices: to estimate for.
        text_tokens: prompt tokens that the estimates assume; None takes 32, or the longest prompt if that is shorter.

    Raises:
        BundleError: no bundle, another schema version, a missing or truncated file, no ONNX file.
        ConfigError: a longer prompt than the model takes.
    """
    manifest = read_manifest(folder)
    text_tokens = _prompt_length(manifest.model, text_tokens)
    structures = {
        name: read_structure(name, load_structure_only(folder / entry.file)) for name, entry in manifest.graphs.items()
    }
    stored = unique_tensors(list(structures.values()))
    weights = {
        name: GraphWeights(size_bytes=structure.size_bytes, precision=structure.precision, compute=manifest.compute)
        for name, structure in structures.items()
    }
    at_least = 0 if manifest.kv_flavour == "inplace" else manifest.kv_capacity
    model = CostModel(manifest.model, manifest.guidance_rows, visible_at_least=at_least)
    missing = {call.graph for call in _flight(model, text_tokens)[0][0].calls} - structures.keys()
    if missing:
        raise BundleError(f"{folder} has no graph {', '.join(sorted(missing))}; export the bundle again")
    return _report(
        model,
        name=manifest.model.name,
        precision=manifest.precision,
        text_tokens=text_tokens,
        kv_capacity=manifest.kv_capacity,
        graph_reports=tuple(_graph_report(manifest, structures[name]) for name in manifest.graphs),
        parameters=sum(tensor.elements for tensor in stored if tensor.is_parameter),
        dtype_bytes=bytes_by_dtype(stored),
        by_precision={},
        weight_bytes=sum(tensor.size_bytes for tensor in stored),
        weights=weights,
        sizes=SessionSizes.of_bundle(manifest),
        devices=devices,
    )


def inspect_config(
    config: ModelConfig,
    *,
    precision: str,
    rows: int,
    kv_capacity: int,
    devices: Sequence[Device],
    text_tokens: int | None = None,
) -> InspectReport:
    """Report on a configuration, from closed formulas alone.

    Args:
        config: sizes.
        precision: of the world model's blocks, one of `parameter_counts.PRECISIONS`.
        rows, kv_capacity: of the cache that an export would make.
        devices, text_tokens: as in `inspect_bundle`.

    Raises:
        ConfigError: a longer prompt than the model takes.
        ValueError: unknown precision.
    """
    text_tokens = _prompt_length(config, text_tokens)
    networks, read = network_parameters(config), graph_parameters(config)
    itemsize = 4 if precision == "fp32" else 2
    compute = precision if precision in ("fp32", "fp16", "bf16") else "fp16"
    weights = {
        name: GraphWeights(
            size_bytes=count.size_bytes(precision),
            precision=precision if count.matrices else compute,  # only the blocks are quantised
            compute=compute,
        )
        for name, count in read.items()
    }
    model = CostModel(config, rows)
    sizes = {p: sum(count.size_bytes(p) for count in networks.values()) for p in PRECISIONS}
    return _report(
        model,
        name=config.name,
        precision=precision,
        text_tokens=text_tokens,
        kv_capacity=kv_capacity,
        graph_reports=(),
        parameters=sum(count.total for count in networks.values()),
        dtype_bytes={},
        by_precision=sizes,
        weight_bytes=sum(count.size_bytes(precision) for count in networks.values()),
        weights=weights,
        sizes=SessionSizes(
            guidance_rows=rows,
            kv_itemsize=itemsize,
            token_itemsize=itemsize,
            encoder_state_bytes=itemsize * model.state_elements(graphs.VAE_ENCODER),
            decoder_state_bytes=itemsize * model.state_elements(graphs.VAE_DECODER),
        ),
        devices=devices,
    )


def _report(
    model: CostModel,
    *,
    name: str,
    precision: str,
    text_tokens: int,
    kv_capacity: int,
    graph_reports: tuple[GraphReport, ...],
    parameters: int,
    dtype_bytes: dict[str, int],
    by_precision: dict[str, int],
    weight_bytes: int,
    weights: Mapping[str, GraphWeights],
    sizes: SessionSizes,
    devices: Sequence[Device],
) -> InspectReport:
    flight = FlightCosts(model, text_tokens)
    segments = _flight(model, text_tokens)
    per_entry = model.kv_elements_per_entry * sizes.kv_itemsize
    memory = MemoryReport(
        weights=weight_bytes,
        kv_buffers=kv_capacity * per_entry,
        kv_stored=flight.stored_entries() * per_entry,
        vae_encoder_state=sizes.encoder_state_bytes,
        vae_decoder_state=sizes.decoder_state_bytes,
        activation_peak=max(flight.activation_peak(minimal.calls, weights) for minimal, _ in segments),
        session_at_most=session_memory(model.config, sizes),
    )
    return InspectReport(
        name=name,
        precision=precision,
        text_tokens=text_tokens,
        guidance_rows=model.rows,
        kv_capacity=kv_capacity,
        networks={key: count.total for key, count in network_parameters(model.config).items()},
        graphs=graph_reports,
        parameters=parameters,
        bytes_by_dtype=dtype_bytes,
        weight_bytes_by_precision=by_precision,
        memory=memory,
        segments=tuple(SegmentReport(minimal=_schedule(a), full_horizon=_schedule(b)) for a, b in segments),
        roofline=tuple(
            RooflineReport(
                device=device.name,
                precision=weights[graphs.WORLD_MODEL_STEP].precision,
                minimal_seconds=tuple(roofline_seconds(a, device, weights) for a, _ in segments),
                full_horizon_seconds=tuple(roofline_seconds(b, device, weights) for _, b in segments),
                bytes_needed=memory.total,
                memory_bytes=int(device.memory_bytes),
                fits=memory.total <= device.memory_bytes,
                source=device.source,
                basis=device.basis,
            )
            for device in devices
        ),
    )


def _prompt_length(config: ModelConfig, text_tokens: int | None) -> int:
    most = config.world_model.text_max_tokens
    if text_tokens is None:
        return min(_PROMPT_TOKENS, most)
    if not 1 <= text_tokens <= most:
        raise ConfigError(f"a prompt of {text_tokens} tokens was asked for; {config.name} takes 1 to {most}")
    return text_tokens


def _flight(model: CostModel, text_tokens: int) -> list[tuple[SegmentCost, SegmentCost]]:
    flight = FlightCosts(model, text_tokens)
    return [(flight.minimal(i), flight.full_horizon(i)) for i in range(flight.segments)]


def _schedule(cost: SegmentCost) -> ScheduleReport:
    return ScheduleReport(
        token_steps=cost.token_steps,
        world_model_calls=cost.world_model_calls,
        flops=cost.flops,
        flops_by_graph=cost.flops_by_graph,
    )


def _graph_report(manifest: Manifest, structure: GraphStructure) -> GraphReport:
    entry = manifest.graphs[structure.name]
    return GraphReport(
        name=structure.name,
        precision=structure.precision,
        operators=structure.operator_count,
        operator_types=structure.operators,
        parameters=structure.parameters,
        bytes_by_dtype=structure.bytes_by_dtype,
        inputs=entry.inputs,
        outputs=entry.outputs,
    )
