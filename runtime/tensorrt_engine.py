"""TensorRT engines: one graph of a bundle on an NVIDIA GPU, behind the interface of `runtime/engine.py`.

Written against what `tensorrt` and `tensorrt_rtx` have in common. Buffers stay on the device and keep their addresses;
caches are written where they are read; a shape that comes back is replayed as a CUDA graph. Shapes outside the engine's
optimisation profiles are refused with the ones it has.

Legend: B guidance rows, heads kv heads, M cache capacity, hd head size.
Source: TensorRT Python API (explicit addresses, `execute_async_v3`); design of the KV cache in `runtime/kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from worldvln_edge.bundle import Bundle
from worldvln_edge.runtime.cuda_graph_cache import BoundShape, CudaGraphCache
from worldvln_edge.runtime.device_memory import DeviceBuffer, DeviceMemory, DeviceStream
from worldvln_edge.runtime.engine import EngineError, Tensor, to_host
from worldvln_edge.runtime.engine_signature import Caches, EngineSignature, Shape
from worldvln_edge.runtime.tensorrt_library import load_tensorrt, tensorrt_log

_SCRATCH = "scratch"


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
        in_place: Mapping[str, np.ndarray | DeviceBuffer] | None = None,
        *,
        fetch: Collection[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run once; see `runtime/engine.py`.

        Args:
            inputs: input name -> array of the graph's dtype (see `tensor_dtype`), or what another engine kept.
            in_place: stem -> cache [B, heads, M, hd]. A device buffer is read and written where it is. A host array is
                mirrored on the device: entries in front of `write_index` go in, the new ones up to `kv_length` come
                back.
            fetch: this engine brings every output to the host.

        Returns:
            Output name -> array, without the caches.

        Raises:
            EngineShapeError: a shape that no optimisation profile covers.
            EngineError: closed, unknown or missing inputs, another dtype, or a refusal of TensorRT.
            DeviceMemoryError: the device refuses.
        """
        if self._engine is None:
            raise EngineError(f"engine of {self._graph}: it was closed; load it again")
        caches = dict(in_place or {})
        arrays = self._signature.checked({name: to_host(value) for name, value in inputs.items()}, caches)
        host_caches = {stem: cache for stem, cache in caches.items() if isinstance(cache, np.ndarray)}
        with self._log.capture() as said:

            def refused(what: str) -> EngineError:
                return EngineError(f"engine of {self._graph}: {what} ({said.first_error()})")

            try:
                bound = self._bind(arrays, caches, refused)
                for name, array in arrays.items():
                    self._memory.copy_in(self._buffers[name], array, self._stream)
                span = _written_span(arrays)
                for stem, cache in host_caches.items():
                    self._copy_entries_in(stem, cache, span)
                self._bound.run(bound, refused)
                results = {}
                for name, shape in bound.outputs.items():
                    results[name] = np.empty(shape, self._signature.tensors[name].dtype)
                    self._memory.copy_out(results[name], self._buffers[name], self._stream)
                for stem, cache in host_caches.items():
                    self._copy_entries_out(stem, cache, span)
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

    def _reserve(self, name: str, size_bytes: int) -> None:
        """Keep a buffer of at least this size under a name; a bigger one moves, so all bindings start over."""
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.size_bytes >= size_bytes:
            return
        if buffer is not None:
            self._bound.clear()
            del self._buffers[name]
            buffer.free()
        self._buffers[name] = self._memory.allocate(size_bytes)

    def _bind(
        self, arrays: Mapping[str, np.ndarray], caches: Caches, refused: Callable[[str], EngineError]
    ) -> BoundShape:
        shapes = {name: array.shape for name, array in arrays.items()}
        shapes_key = tuple(sorted(shapes.items()))
        on_device = [(s, c.address) for s, c in sorted(caches.items()) if not isinstance(c, np.ndarray)]
        key = (shapes_key, tuple(on_device))
        bound = self._bound.find(key)
        if bound is None:
            all_shapes = {**shapes, **self._signature.cache_shapes(arrays, caches)}
            profile = self._signature.profile_for(all_shapes)
            self._reserve_inputs(arrays, caches)
            context = self._new_context(profile, all_shapes, refused)
            outputs = {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in self._signature.results}
            self._place(context, shapes, outputs, caches, refused)
            bound = BoundShape(context=context, outputs=outputs, shapes=shapes_key)
            self._bound.add(key, bound)
        return bound

    def _reserve_inputs(self, arrays: Mapping[str, np.ndarray], caches: Caches) -> None:
        for name, array in arrays.items():
            self._reserve(name, array.nbytes)
        for stem, cache in caches.items():
            if isinstance(cache, np.ndarray):
                self._reserve(f"past_{stem}", cache.nbytes)
                if not self._signature.is_shared(stem):
                    self._reserve(f"present_{stem}", cache.nbytes)

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
        self,
        context: Any,
        shapes: Mapping[str, Shape],
        outputs: Mapping[str, Shape],
        caches: Caches,
        refused: Callable[[str], EngineError],
    ) -> None:
        """Give a context its addresses. Buffers first: a bigger one would move what was set before."""
        for name, shape in outputs.items():
            self._reserve(name, int(np.prod(shape)) * self._signature.tensors[name].dtype.itemsize)
        self._reserve(_SCRATCH, int(context.update_device_memory_size_for_shapes()))
        scratch = self._buffers[_SCRATCH]
        context.set_device_memory(scratch.address, scratch.size_bytes)
        addresses = {name: self._buffers[name].address for name in (*shapes, *outputs)}
        for stem, cache in caches.items():
            past = self._buffers[f"past_{stem}"] if isinstance(cache, np.ndarray) else cache
            present = past if self._signature.is_shared(stem) else self._buffers[f"present_{stem}"]
            addresses |= {f"past_{stem}": past.address, f"present_{stem}": present.address}
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise refused(f"it does not take an address for {name}")

    def _copy_entries_in(self, stem: str, cache: np.ndarray, span: tuple[int, int] | None) -> None:
        buffer = self._buffers[f"past_{stem}"]
        for strip, offset_bytes in _strips(cache, 0, span[0]) if span else [(cache, 0)]:
            self._memory.copy_in(buffer, strip, self._stream, offset_bytes)

    def _copy_entries_out(self, stem: str, cache: np.ndarray, span: tuple[int, int] | None) -> None:
        buffer = self._buffers[f"past_{stem}" if self._signature.is_shared(stem) else f"present_{stem}"]
        for strip, offset_bytes in _strips(cache, *span) if span else [(cache, 0)]:
            self._memory.copy_out(strip, buffer, self._stream, offset_bytes)


def _written_span(arrays: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Cache entries that the call writes, or None when the graph does not say (then the whole cache travels)."""
    if "write_index" not in arrays or "kv_length" not in arrays:
        return None
    return int(arrays["write_index"].min()), int(arrays["kv_length"].max())


def _strips(cache_BHMD: np.ndarray, start: int, end: int) -> list[tuple[np.ndarray, int]]:
    """Contiguous views of entries start..end, one a row and head, with their offset in bytes."""
    if start >= end:
        return []
    flat_NMD = cache_BHMD.reshape(-1, *cache_BHMD.shape[-2:])
    base, entry = flat_NMD[0].nbytes, flat_NMD[0, 0].nbytes
    return [(strip[start:end], n * base + start * entry) for n, strip in enumerate(flat_NMD)]
