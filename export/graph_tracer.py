"""Traced graphs of a model, remembered: precisions that differ in their weights only share the tracing.

Tracing takes far longer than writing the weights of a small model, and does not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from worldvln_edge.config import ModelConfig
from worldvln_edge.export.graph_sources import GraphSource, graph_sources
from worldvln_edge.export.planned_tensor import CastReports, PlannedTensor, checkpoint_tensor
from worldvln_edge.export.precision import Precision
from worldvln_edge.export.progress import Progress
from worldvln_edge.export.tracing import TracedGraph, fake_model, trace_graph
from worldvln_edge.export.world_model_graphs import KVFlavour
from worldvln_edge.models.worldvln import WorldVLN

INPLACE_OPSET = 24  # TensorScatter, Attention with nonpad_kv_seqlen
PLAIN_OPSET = 20
INT4_OPSET = 21  # the first with 4-bit tensors
BF16_OPSET = 22  # the first whose convolutions take bfloat16


def opset_of(source: GraphSource, precision: Precision, kv: KVFlavour) -> int:
    """ONNX opset of a graph. Graphs without a KV cache are the same in both flavours."""
    if source.stack is not None and kv == "inplace":
        return INPLACE_OPSET
    if precision.compute == "bf16":
        return BF16_OPSET
    return INT4_OPSET if source.stack is not None and precision.name == "int4" else PLAIN_OPSET


@dataclass
class GraphTracer:
    """Traces every graph once per model, compute dtype, opset and (with a cache) KV flavour. Not for two threads."""

    _known: dict[tuple, TracedGraph] = field(default_factory=dict)

    def graphs(
        self,
        config: ModelConfig,
        precision: Precision,
        kv: KVFlavour,
        reports: CastReports,
        *,
        rgb_head: bool = True,
        names: Collection[str] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[TracedGraph]:
        """The graphs before quantisation; what is yielded may be changed.

        Args:
            config: sizes.
            precision: its compute dtype counts, and whether there are 4-bit tensors.
            kv: flavour of the cache.
            reports: takes what the casts of the planned tensors lose.
            rgb_head: include its graph.
            names: of the graphs; None gives all.
            progress: called before every graph.

        Raises:
            ExportError: a graph that does not trace.
        """
        mode, model = fake_model(config, precision.dtype_of)
        keys = {id(parameter): key for key, parameter in model.named_parameters()}

        def weight_of(key: str, parameter: Tensor, transposed: bool) -> PlannedTensor:
            return checkpoint_tensor(key, tuple(parameter.shape), parameter.dtype, reports, transposed=transposed)

        with mode:
            sources = [
                one for one in graph_sources(model, kv=kv, rgb_head=rgb_head) if names is None or one.name in names
            ]
        for index, source in enumerate(sources):
            if progress is not None:
                progress(f"graph {source.name} ({index + 1} of {len(sources)})", 0, 0)
            opset = opset_of(source, precision, kv)
            known = (config.to_json(), precision.compute, kv if source.stack else "", opset, source.name)
            if known not in self._known:
                self._known[known] = trace_graph(source, keys, weight_of, opset=opset, mode=mode)
            yield _copy(self._known[known], model, reports)


def _copy(traced: TracedGraph, model: WorldVLN, reports: CastReports) -> TracedGraph:
    """A graph of its own, whose tensors report to `reports`."""
    parameters = dict(model.named_parameters())

    def planned(tensor: PlannedTensor) -> PlannedTensor:
        parameter = parameters[str(tensor.key)]
        shape = tuple(parameter.shape)
        return checkpoint_tensor(str(tensor.key), shape, parameter.dtype, reports, transposed=tensor.is_transposed)

    weights = {name: planned(tensor) for name, tensor in traced.weights.items()}
    return TracedGraph(traced.name, traced.model.clone(), weights)
