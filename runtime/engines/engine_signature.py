"""What a TensorRT engine takes and gives: its tensors, its optimisation profiles, which outputs live in an input.

Calls are checked here, before anything reaches the device.

Legend: B guidance rows, heads kv heads, M cache capacity, hd head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from worldvln_edge.runtime.engines.device_memory import DeviceSpan
from worldvln_edge.runtime.engines.device_tensor import DeviceTensor
from worldvln_edge.runtime.engines.engine import EngineError
from worldvln_edge.runtime.engines.tensorrt_library import tensor_dtype

Shape = tuple[int, ...]
Caches = Mapping[str, "np.ndarray | DeviceSpan"]
"""Stem -> cache [B, heads, M, hd], on the host or on the device."""
Values = Mapping[str, "np.ndarray | DeviceTensor"]
"""Input name -> array, on the host or on the device."""


class EngineShapeError(ValueError):
    """A shape that the engine was not built for."""


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    name: str
    dtype: np.dtype
    is_input: bool
    shape: Shape
    """-1 where it varies."""
    profile_shapes: tuple[tuple[Shape, Shape, Shape], ...]
    """Per profile: smallest, best, largest. Inputs only."""

    @property
    def varies(self) -> bool:
        return -1 in self.shape


class EngineSignature:
    """Tensors of an engine by name.

    Args:
        trt: the package.
        engine: its engine.
        graph: name, for messages.
    """

    def __init__(self, trt: ModuleType, engine: Any, graph: str):
        self._graph = graph
        self.profiles = max(1, int(engine.num_optimization_profiles))
        self.tensors = {tensor.name: tensor for tensor in _read_tensors(trt, engine, self.profiles)}
        self._aliases = _read_aliases(engine, self.tensors)

    @property
    def results(self) -> list[EngineTensor]:
        """Outputs other than caches."""
        return [t for t in self.tensors.values() if not t.is_input and not t.name.startswith("present_")]

    def is_shared(self, stem: str) -> bool:
        """Does `present_<stem>` live in the memory of `past_<stem>`?"""
        return self._aliases.get(f"present_{stem}") is not None

    def checked(self, inputs: Values, caches: Caches) -> dict[str, np.ndarray | DeviceTensor]:
        """The inputs, those of the host as contiguous arrays.

        Raises:
            EngineShapeError: a cache of another size.
            EngineError: unknown or missing inputs, another dtype, a cache with gaps.
        """
        given = set(inputs) | {f"past_{stem}" for stem in caches}
        wanted = {tensor.name for tensor in self.tensors.values() if tensor.is_input}
        if given != wanted:
            differing = sorted(given ^ wanted)
            raise EngineError(
                f"engine of {self._graph}: input {differing[0]} is "
                f"{'missing' if differing[0] in wanted else 'unknown'}; it takes {', '.join(sorted(wanted))}"
            )
        values: dict[str, np.ndarray | DeviceTensor] = {}
        for name, value in inputs.items():
            values[name] = value if isinstance(value, DeviceTensor) else np.asarray(value, order="C")
            self._check_dtype(name, values[name])
        for name, shape in self.cache_shapes(values, caches).items():
            self._check_cache(name.removeprefix("past_"), shape, caches[name.removeprefix("past_")])
        return values

    def cache_shapes(self, inputs: Values, caches: Caches) -> dict[str, Shape]:
        """Shapes of the caches in a call: of as many guidance rows as its `write_index` has, where that is open."""
        rows = inputs["write_index"].shape[0] if "write_index" in inputs else 1
        return {
            f"past_{stem}": tuple(rows if size < 0 else size for size in self.tensors[f"past_{stem}"].shape)
            for stem in caches
        }

    def profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """The first profile that covers the shapes; exact ones come first in an engine.

        Raises:
            EngineShapeError: there is none. The message lists those there are.
        """
        for tensor in self.tensors.values():
            shape = shapes.get(tensor.name)
            if shape is not None and not tensor.varies and shape != tensor.shape:
                raise EngineShapeError(f"engine of {self._graph}: {tensor.name} is {shape}, it takes {tensor.shape}")
        varying = [tensor for tensor in self.tensors.values() if tensor.is_input and tensor.varies]
        for profile in range(self.profiles):
            if all(_covers(tensor.profile_shapes[profile], shapes[tensor.name]) for tensor in varying):
                return profile
        name = next(
            (t.name for t in varying if not any(_covers(span, shapes[t.name]) for span in t.profile_shapes)),
            varying[0].name,
        )
        spans = dict.fromkeys((low, high) for low, _, high in self.tensors[name].profile_shapes)
        known = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in spans)
        raise EngineShapeError(
            f"engine of {self._graph}: no profile covers {name} {shapes[name]}; it was built for {known}"
        )

    def _check_cache(self, stem: str, shape: Shape, cache: np.ndarray | DeviceSpan) -> None:
        tensor = self.tensors[f"past_{stem}"]
        size = int(np.prod(shape)) * tensor.dtype.itemsize
        found = cache.nbytes if isinstance(cache, np.ndarray) else cache.size_bytes
        # On the device one buffer serves every number of guidance rows; the first ones are used.
        if found < size or (found > size and (isinstance(cache, np.ndarray) or not tensor.varies)):
            raise EngineShapeError(
                f"engine of {self._graph}: cache {stem} has {found} bytes, {shape} of {tensor.dtype} ({size} bytes) is "
                "expected; make it from this bundle's manifest"
            )
        if isinstance(cache, np.ndarray):
            self._check_dtype(f"past_{stem}", cache)
            if not cache.flags.c_contiguous:
                raise EngineError(f"engine of {self._graph}: cache {stem} has gaps; give a contiguous array")

    def _check_dtype(self, name: str, array: np.ndarray | DeviceTensor) -> None:
        expected = self.tensors[name].dtype
        is_bfloat16 = expected == np.uint16 and array.dtype.name == "bfloat16"
        if array.dtype != expected and not is_bfloat16:
            raise EngineError(f"engine of {self._graph}: {name} is {array.dtype}, {expected} is expected")


def _read_tensors(trt: ModuleType, engine: Any, profiles: int) -> list[EngineTensor]:
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        spans = [engine.get_tensor_profile_shape(name, profile) for profile in range(profiles)] if is_input else []
        tensors.append(
            EngineTensor(
                name=name,
                dtype=tensor_dtype(trt, engine.get_tensor_dtype(name)),
                is_input=is_input,
                shape=tuple(engine.get_tensor_shape(name)),
                profile_shapes=tuple((tuple(low), tuple(best), tuple(high)) for low, best, high in spans),
            )
        )
    return tensors


def _read_aliases(engine: Any, tensors: Mapping[str, EngineTensor]) -> dict[str, str]:
    """Outputs that live in an input's memory, as the engine says; TensorRT before 10.13 knows none."""
    ask = getattr(engine, "get_aliased_input_tensor", None)
    if ask is None:
        return {}
    found = {tensor.name: ask(tensor.name) for tensor in tensors.values() if not tensor.is_input}
    return {name: source for name, source in found.items() if source}


def _covers(span: tuple[Shape, Shape, Shape], shape: Shape) -> bool:
    low, _, high = span
    return len(low) == len(shape) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
