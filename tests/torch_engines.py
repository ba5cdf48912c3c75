"""The graphs of a bundle in eager PyTorch, behind `runtime/engines/engine.py`'s interface: a second opinion for tests.

The modules are those that the exporter traces. What it writes as ONNX operators (the blocks, the cache, attention) is
computed here in PyTorch, so nothing of ONNX is left. Values that are not fetched are PyTorch tensors.
"""

from collections.abc import Collection, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worldvln_edge.export import world_model_graphs
from worldvln_edge.export.graph_sources import BlockStack, GraphSource, graph_sources
from worldvln_edge.models.worldvln import WorldVLN


def torch_engines(model: WorldVLN) -> dict[str, "TorchEngine"]:
    """Graph name -> engine, of every graph of a model."""
    return {source.name: TorchEngine(source) for source in graph_sources(model)}


class TorchEngine:
    """One module that the exporter would trace."""

    def __init__(self, source: GraphSource):
        self._source = source

    def run(
        self,
        inputs: Mapping[str, Any],
        in_place: Mapping[str, np.ndarray] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """See `Engine.run`; caches are host arrays, which PyTorch writes where they are."""
        caches = {f"past_{stem}": torch.from_numpy(cache) for stem, cache in (in_place or {}).items()}
        values = {**{name: _tensor(value) for name, value in inputs.items()}, **caches}
        assert set(values) == set(self._source.inputs)
        run_blocks = _Blocks(self._source.stack) if self._source.stack else None
        with torch.no_grad(), mock.patch.object(world_model_graphs, "_blocks", run_blocks):
            outputs = self._source.module(*(values[name] for name in self._source.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results = dict(zip(self._source.outputs, outputs, strict=True))
        return {
            name: value.numpy() if fetch is None or name in fetch else value
            for name, value in results.items()
            if not name.startswith("present_")
        }


class _Blocks:
    """What the exporter's `Blocks` node stands for, computed."""

    def __init__(self, stack: BlockStack):
        self._modules = list(stack.modules)
        if stack.last is not None:
            self._modules[-1] = stack.last.module
        for module in self._modules:
            module.scatter, module.attend = _scatter, _attend

    def __call__(
        self,
        x: Tensor,
        rope: Tensor,
        write_index: Tensor,
        kv_length: Tensor,
        caches: tuple[Tensor, ...],
        *,
        only_kv: bool,
    ) -> tuple[Tensor, ...]:
        for module, key, value in zip(self._modules, caches[::2], caches[1::2], strict=True):
            x, *_ = module(x, rope, write_index, kv_length, key, value)
        return caches if only_kv else (x, *caches)


def _scatter(cache_BHMD: Tensor, update_BHnD: Tensor, write_index_B: Tensor) -> Tensor:
    for cache, update, start in zip(cache_BHMD, update_BHnD, write_index_B.tolist(), strict=True):
        cache[:, start : start + update.shape[1]] = update
    return cache_BHMD


def _attend(q_BHnD: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, kv_length_B: Tensor) -> Tensor:
    rows = zip(q_BHnD, key_BHMD, value_BHMD, kv_length_B.tolist(), strict=True)
    attended = [
        scaled_dot_product_attention(q[None], key[None, :, :end], value[None, :, :end], enable_gqa=True)
        for q, key, value, end in rows
    ]
    return torch.cat(attended)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value, order="C")
    return torch.from_numpy(array if array.flags.writeable else array.copy())
