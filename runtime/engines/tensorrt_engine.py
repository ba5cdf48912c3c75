"""TensorRT engines: one graph of a bundle on an NVIDIA GPU, behind the interface of `runtime/engines/engine.py`.

Written against what `tensorrt` and `tensorrt_rtx` have in common. Buffers stay on the device and keep their addresses;
caches are written where they are read; a shape that comes back is replayed as a CUDA graph. Shapes outside the engine's
optimisation profiles are refused with the ones it has.

Outputs that are not fetched stay on the device. Small ones are copied there, so that addresses stay what a CUDA graph
holds; large ones (states and features of the VAE) are written and read where they lie, without a graph.

Legend: B guidance rows, heads kv heads, M cache capacity, hd head size.
Source: TensorRT Python API (explicit addresses, `execute_async_v3`); the KV cache: `runtime/worldvln/kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from worldvln_edge.bundle import Bundle
from worldvln_edge.runtime.engines.cache_copies import (
    copy_entries_in,
    copy_entries_out,
    copy_entries_over,
    written_span,
)
from worldvln_edge.runtime.engines.cuda_graph_cache import BoundShape, CudaGraphCache
from worldvln_edge.runtime.engines.device_memory import (
    DeviceBuffer,
    DeviceMemory,
    DeviceSpan,
    DeviceStream,
    copy_whole,
)
from worldvln_edge.runtime.engines.device_tensor import DeviceTensor
from worldvln_edge.runtime.engines.engine import EngineError, Tensor, to_host
from worldvln_edge.runtime.engines.engine_signature import Caches, EngineSignature, Shape, Values
from worldvln_edge.runtime.engines.tensorrt_library import load_tensorrt, tensorrt_log

_SCRATCH = "scratch"
_LARGE_BYTES = 32 << 20
"""From this size on, a copy on the device (0.1 ms or more) costs as much as a CUDA graph saves, and memory besides."""


class TensorRTEngine:
    """One engine on one device. Runs one call at a time."""

    def __init__(
        self, data: bytes, *, graph: str, package: str, memory: DeviceMemory, cuda_graphs: bool = True
    ) -> None:
        """Deserialise an engine.

        Args:
            data: the engine file.
            graph: its name, for messages.
            package: that built it, see `tensorrt_library.PACKAGES`.
            memory: of the device it was built for; it outlives the engine.
            cuda_graphs: replay shapes that come back.

        Raises:
            EngineError: the package is missing, or it refuses the engine.
            DeviceMemoryError: the device refuses.
        """
        self._trt, self._log = load_tensorrt(package), tensorrt_log(package)
        self._graph, self._memory = graph, memory
        with self._log.capture() as said:
            self._runtime: Any = self._trt.Runtime(self._log.logger)
            self._engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise EngineError(
                f"engine of {graph}: {package} {self._trt.__version__} cannot load it on {memory.compute_capability} "
                f"({said.first_error()}); build it again on this device with --target local"
            )
        self._signature = EngineSignature(self._trt, self._engine, graph)
        self._buffers: dict[str, DeviceBuffer] = {}
        # Last: it is the only thing of the device that a failing constructor could leave behind.
        self._stream: DeviceStream = memory.stream()
        self._bound = CudaGraphCache(self._stream, graph=graph, captures=cuda_graphs)

    @classmethod
    def load(
        cls, bundle: Bundle, graph: str, *, package: str, memory: DeviceMemory, cuda_graphs: bool = True
    ) -> TensorRTEngine:
        """The engine of a bundle that fits this package version and this device.

        Raises:
            BundleError: none was built for them, or its file is missing or corrupt.
            EngineError: its parity failed, and see the constructor.
            DeviceMemoryError: the device refuses.
        """
        version = str(load_tensorrt(package).__version__)
        entry = bundle.engine(graph, backend=package, version=version, compute_capability=memory.compute_capability)
        if entry.parity is not None and not entry.parity.within:
            raise EngineError(
                f"engine of {graph}: it does not compute what the graph does ({entry.parity.reason}); build it again "
                f"with `worldvln-edge build {bundle.folder} --target local`, or fly the graph on ONNX Runtime"
            )
        data = bundle.engine_path(entry).read_bytes()
        return cls(data, graph=graph, package=package, memory=memory, cuda_graphs=cuda_graphs)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        in_place: Mapping[str, np.ndarray | DeviceSpan] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Run once; see `runtime/engines/engine.py`.

        Args:
            inputs: input name -> array of the graph's dtype (see `tensor_dtype`), or what another engine kept.
            in_place: stem -> cache [B, heads, M, hd]. One on the device is read and written where it is. A host array
                is mirrored on the device: entries in front of `write_index` go in, the new ones up to `kv_length` come
                back.
            fetch: outputs that are wanted on the host; None: all. The others are a `DeviceTensor`.

        Returns:
            Output name -> array or tensor, without the caches.

        Raises:
            EngineShapeError: a shape that no optimisation profile covers.
            EngineError: closed, unknown or missing inputs, another dtype, or a refusal of TensorRT.
            DeviceMemoryError: the device refuses.
        """
        if self._engine is None:
            raise EngineError(f"engine of {self._graph}: it was closed; load it again")
        caches = dict(in_place or {})
        values = self._signature.checked({name: self._readable(value) for name, value in inputs.items()}, caches)
        kept = {t.name for t in self._signature.results if fetch is not None and t.name not in fetch}
        with self._log.capture() as said:

            def refused(what: str) -> EngineError:
                return EngineError(f"engine of {self._graph}: {what} ({said.first_error()})")

            try:
                bound = self._bind(values, caches, refused)
                places = {
                    name: self._new_tensor(name, shape)
                    for name, shape in bound.outputs.items()
                    if name in kept or name in bound.moving
                }
                moving = {**{n: v for n, v in values.items() if isinstance(v, DeviceTensor)}, **places}
                for name in bound.moving:
                    self._set_address(bound.context, name, moving[name].span.address, refused)
                self._copy_in(values, caches, bound)
                self._bound.run(bound, refused)
                results = self._copy_out(places, kept, bound)
                self._copy_caches_out(values, caches)
            finally:
                self._stream.wait()  # after a failure too: copies that run on must not outlive the host's arrays
        return results

    def close(self) -> None:
        """Give back everything on the device. Once is enough, twice does no harm.

        Raises:
            DeviceMemoryError: the device failed before. What could be freed was.
        """
        if self._engine is None:
            return
        with ExitStack() as frees:  # last in, first out: what runs goes before what it runs in
            frees.callback(self._forget_engine)
            frees.callback(self._stream.free)
            while self._buffers:
                frees.callback(self._buffers.popitem()[1].free)
            frees.callback(self._bound.clear)

    def _forget_engine(self) -> None:
        self._engine = None
        self._runtime = None

    def _readable(self, value: Tensor) -> np.ndarray | DeviceTensor:
        return value if isinstance(value, DeviceTensor) and value.memory is self._memory else to_host(value)

    def _new_tensor(self, name: str, shape: Shape) -> DeviceTensor:
        buffer = self._memory.allocate(self._size_of(name, shape))
        return DeviceTensor(self._memory, buffer, shape, self._signature.tensors[name].dtype)

    def _size_of(self, name: str, shape: Shape) -> int:
        return int(np.prod(shape)) * self._signature.tensors[name].dtype.itemsize

    def _copy_in(self, values: Values, caches: Caches, bound: BoundShape) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self._memory.copy_in(self._buffers[name], value, self._stream)
            elif name not in bound.moving:
                copy_whole(self._memory, self._buffers[name], value.span, value.nbytes, self._stream)
        span = written_span(values)
        for stem, cache in caches.items():
            if isinstance(cache, np.ndarray):
                copy_entries_in(self._memory, self._buffers[f"past_{stem}"], cache, span, self._stream)

    def _copy_out(
        self, places: Mapping[str, DeviceTensor], kept: Collection[str], bound: BoundShape
    ) -> dict[str, np.ndarray | DeviceTensor]:
        """Every output, in memory that is the caller's."""
        results: dict[str, np.ndarray | DeviceTensor] = {}
        for name, shape in bound.outputs.items():
            source = places[name].span if name in bound.moving else self._buffers[name]
            if name not in kept:
                array = results[name] = np.empty(shape, self._signature.tensors[name].dtype)
                self._memory.copy_out(array, source, self._stream)
                continue
            tensor = results[name] = places[name]
            if name not in bound.moving:
                copy_whole(self._memory, tensor.span, source, tensor.nbytes, self._stream)
        return results

    def _copy_caches_out(self, values: Values, caches: Caches) -> None:
        span, shapes = written_span(values), self._signature.cache_shapes(values, caches)
        for stem, cache in caches.items():
            past = f"past_{stem}"
            is_shared = self._signature.is_shared(stem)
            if isinstance(cache, np.ndarray):
                source = self._buffers[past if is_shared else f"present_{stem}"]
                copy_entries_out(self._memory, cache, source, span, self._stream)
            elif not is_shared:
                written, dtype = self._buffers[f"present_{stem}"], self._signature.tensors[past].dtype
                copy_entries_over(self._memory, cache, written, shapes[past], dtype, span, self._stream)

    def _reserve(self, name: str, size_bytes: int) -> bool:
        """Keep a buffer of at least this size under a name; a bigger one moves, so all bindings start over.

        Returns:
            Is it another one than before?
        """
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.size_bytes >= size_bytes:
            return False
        if buffer is not None:
            self._bound.clear()
            del self._buffers[name]
            buffer.free()
        self._buffers[name] = self._memory.allocate(size_bytes)
        return True

    def _bind(self, values: Values, caches: Caches, refused: Callable[[str], EngineError]) -> BoundShape:
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        shapes_key = tuple(sorted(shapes.items()))
        on_device = [(s, c.address) for s, c in sorted(caches.items()) if not isinstance(c, np.ndarray)]
        moving = {n for n, v in values.items() if isinstance(v, DeviceTensor) and v.nbytes >= _LARGE_BYTES}
        key = (shapes_key, tuple(on_device), frozenset(moving))
        bound = self._bound.find(key)
        if bound is None:
            all_shapes = {**shapes, **self._signature.cache_shapes(values, caches)}
            profile = self._signature.profile_for(all_shapes)
            self._reserve_inputs({name: value for name, value in values.items() if name not in moving}, caches)
            context = self._new_context(profile, all_shapes, refused)
            outputs = {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in self._signature.results}
            moving |= {name for name, shape in outputs.items() if self._size_of(name, shape) >= _LARGE_BYTES}
            fixed = {name: shape for name, shape in (shapes | outputs).items() if name not in moving}
            self._place(context, fixed, caches, refused)
            bound = BoundShape(context=context, outputs=outputs, shapes=shapes_key, moving=frozenset(moving))
            self._bound.add(key, bound)
        return bound

    def _reserve_inputs(self, values: Values, caches: Caches) -> None:
        for name, value in values.items():
            self._reserve(name, value.nbytes)
        for stem, cache in caches.items():
            size_bytes = cache.nbytes if isinstance(cache, np.ndarray) else cache.size_bytes
            if isinstance(cache, np.ndarray) and self._reserve(f"past_{stem}", size_bytes):
                # Masked entries take part in attention with weight 0, and 0 * NaN is not 0.
                self._memory.copy_in(self._buffers[f"past_{stem}"], cache, self._stream)
            if not self._signature.is_shared(stem):
                self._reserve(f"present_{stem}", size_bytes)

    def _new_context(self, profile: int, shapes: Mapping[str, Shape], refused: Callable[[str], EngineError]) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise refused("it makes no execution context")
        if self._signature.profiles > 1 and not context.set_optimization_profile_async(profile, self._stream.handle):
            raise refused(f"it does not take profile {profile}")
        for name, shape in shapes.items():
            if self._signature.tensors[name].varies and not context.set_input_shape(name, shape):
                raise refused(f"it does not take {name} {shape}")
        return context

    def _place(
        self, context: Any, fixed: Mapping[str, Shape], caches: Caches, refused: Callable[[str], EngineError]
    ) -> None:
        """Give a context the addresses that stay. Buffers first: a bigger one would move what was set before."""
        for name, shape in fixed.items():
            self._reserve(name, self._size_of(name, shape))
        self._reserve(_SCRATCH, int(context.update_device_memory_size_for_shapes()))
        scratch = self._buffers[_SCRATCH]
        context.set_device_memory(scratch.address, scratch.size_bytes)
        addresses = {name: self._buffers[name].address for name in fixed}
        for stem, cache in caches.items():
            past: DeviceSpan = self._buffers[f"past_{stem}"] if isinstance(cache, np.ndarray) else cache
            present = past if self._signature.is_shared(stem) else self._buffers[f"present_{stem}"]
            addresses |= {f"past_{stem}": past.address, f"present_{stem}": present.address}
        for name, address in addresses.items():
            self._set_address(context, name, address, refused)

    def _set_address(self, context: Any, name: str, address: int, refused: Callable[[str], EngineError]) -> None:
        if not context.set_tensor_address(name, address):
            raise refused(f"it does not take an address for {name}")
