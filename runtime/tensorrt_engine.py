"""TensorRT engines: one graph of a bundle on an NVIDIA GPU, behind the interface of `runtime/engine.py`.

Written against what `tensorrt` and `tensorrt_rtx` have in common. Buffers stay on the device and keep their addresses;
caches are written where they are read; a shape that comes back is replayed as a CUDA graph. Shapes outside the engine's
optimisation profiles are refused with the ones it has.

Legend: B guidance rows, heads kv heads, M cache capacity, hd head size.
Source: TensorRT Python API (explicit addresses, `execute_async_v3`); design of the KV cache in `runtime/kv_cache.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from worldvln_edge.bundle import Bundle
from worldvln_edge.runtime.device_memory import DeviceBuffer, DeviceGraph, DeviceMemory, DeviceStream
from worldvln_edge.runtime.engine import EngineError

PACKAGES = ("tensorrt", "tensorrt_rtx")
EXTRA_OF_PACKAGE = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
Shape = tuple[int, ...]
_MOST_SHAPES = 64
"""Shapes that keep an execution context; text lengths alone would make hundreds."""
_SCRATCH = "scratch"


class EngineShapeError(ValueError):
    """A shape that the engine was not built for."""


class TensorRTLog:
    """Messages of one package, newest last. TensorRT keeps the first logger of a process, so there is one a package."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, str]] = []
        self.logger: Any = None

    def clear(self) -> None:
        self.messages.clear()

    def first_error(self) -> str:
        """What went wrong, in the package's words, without source locations of its own code."""
        errors = [text for severity, text in self.messages if severity <= 1]
        return " ".join(errors[0].split()) if errors else "it gave no reason"


def load_tensorrt(package: str) -> ModuleType:
    """Import `tensorrt` or `tensorrt_rtx`; their Python API is one.

    Raises:
        EngineError: not installed, or its libraries do not load.
    """
    if package not in PACKAGES:
        raise EngineError(f"unknown TensorRT package {package!r}; choose one of {', '.join(PACKAGES)}")
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{package} does not load here ({error}); install it with: "
            f"pip install 'worldvln-edge[{EXTRA_OF_PACKAGE[package]}]'"
            + (" (on a Jetson it comes with JetPack)" if package == "tensorrt" else "")
        ) from error


@functools.cache
def tensorrt_log(package: str) -> TensorRTLog:
    """The log that everything made with a package writes to."""
    trt, log = load_tensorrt(package), TensorRTLog()

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.INFO):
                log.messages.append((int(severity), message))

    log.logger = Logger()
    return log


def tensor_dtype(trt: ModuleType, dtype: Any) -> np.dtype:
    """numpy's dtype of a tensor; bfloat16, which numpy has not, is the uint16 of its bits.

    Raises:
        EngineError: a type that no graph of a bundle has at its border.
    """
    kinds = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "BF16": np.uint16,
        "INT8": np.int8,
        "UINT8": np.uint8,
        "BOOL": np.bool_,
        "INT32": np.int32,
        "INT64": np.int64,
    }
    for name, kind in kinds.items():
        if dtype == getattr(trt.DataType, name, None):
            return np.dtype(kind)
    raise EngineError(f"a tensor of type {dtype} cannot be passed in or out; export the bundle again")


@dataclass(frozen=True, kw_only=True)
class _Tensor:
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


@dataclass(kw_only=True)
class _Bound:
    """One combination of shapes: its execution context, and its graph once it was captured."""

    context: Any
    outputs: dict[str, Shape]
    runs: int = 0
    graph: DeviceGraph | None = None


class TensorRTEngine:
    """One engine on one device. Runs one call at a time."""

    def __init__(
        self, data: bytes, *, graph: str, package: str, memory: DeviceMemory, cuda_graphs: bool = True
    ) -> None:
        """Deserialise an engine.

        Args:
            data: the engine file.
            graph: its name, for messages.
            package: that built it, see `PACKAGES`.
            memory: of the device it was built for.
            cuda_graphs: replay shapes that come back.

        Raises:
            EngineError: the package is missing, or it refuses the engine.
        """
        self._trt = load_tensorrt(package)
        self._graph, self._memory, self._cuda_graphs = graph, memory, cuda_graphs
        log = tensorrt_log(package)
        log.clear()
        self._runtime = self._trt.Runtime(log.logger)
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineError(
                f"engine of {graph}: {package} {self._trt.__version__} cannot load it on {memory.compute_capability} "
                f"({log.first_error()}); build it again on this device with --target local"
            )
        self._engine = engine
        self._log = log
        self._stream: DeviceStream = memory.stream()
        self._tensors = {tensor.name: tensor for tensor in _read_tensors(self._trt, engine)}
        self._aliases = _read_aliases(engine, self._tensors)
        self._buffers: dict[str, DeviceBuffer] = {}
        self._bound: OrderedDict[tuple, _Bound] = OrderedDict()

    @classmethod
    def load(
        cls, bundle: Bundle, graph: str, *, package: str, memory: DeviceMemory, cuda_graphs: bool = True
    ) -> TensorRTEngine:
        """The engine of a bundle that fits this package version and this device.

        Raises:
            BundleError: none was built for them, or its file is missing or corrupt.
            EngineError: see the constructor.
        """
        version = str(load_tensorrt(package).__version__)
        entry = bundle.engine(graph, backend=package, version=version, compute_capability=memory.compute_capability)
        data = bundle.engine_path(entry).read_bytes()
        return cls(data, graph=graph, package=package, memory=memory, cuda_graphs=cuda_graphs)

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        in_place: Mapping[str, np.ndarray | DeviceBuffer] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run once; see `runtime/engine.py`.

        Args:
            inputs: input name -> array of the graph's dtype (see `tensor_dtype`).
            in_place: stem -> cache [B, heads, M, hd]. A device buffer is read and written where it is. A host array is
                mirrored on the device: entries in front of `write_index` go in, the new ones up to `kv_length` come
                back.

        Returns:
            Output name -> array, without the caches.

        Raises:
            EngineShapeError: a shape that no optimisation profile covers.
            EngineError: unknown or missing inputs, another dtype, or a refusal of the device.
        """
        caches = dict(in_place or {})
        arrays = self._checked(inputs, caches)
        shapes = {name: array.shape for name, array in arrays.items()}
        for name, array in arrays.items():
            self._reserve(name, array.nbytes)
        for stem, cache in caches.items():
            if isinstance(cache, np.ndarray):
                self._reserve(f"past_{stem}", cache.nbytes)
                if self._aliases.get(f"present_{stem}") is None:
                    self._reserve(f"present_{stem}", cache.nbytes)
            elif self._aliases.get(f"present_{stem}") is None:
                raise EngineError(
                    f"engine of {self._graph}: present_{stem} does not share the memory of past_{stem} (a portable "
                    "cache), so a device buffer cannot be updated in place; give a host array, or export with "
                    "--kv inplace"
                )
        bound = self._bind(shapes, caches)
        for name, array in arrays.items():
            self._memory.copy_in(self._buffers[name], array, self._stream)
        span = _written_span(arrays)
        for stem, cache in caches.items():
            if isinstance(cache, np.ndarray):
                self._copy_entries_in(stem, cache, span)
        self._execute(bound)
        results = {}
        for name, shape in bound.outputs.items():
            results[name] = np.empty(shape, self._tensors[name].dtype)
            self._memory.copy_out(results[name], self._buffers[name], self._stream)
        for stem, cache in caches.items():
            if isinstance(cache, np.ndarray):
                self._copy_entries_out(stem, cache, span)
        self._stream.wait()
        return results

    def close(self) -> None:
        """Give all device memory back."""
        self._bound.clear()
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()

    def _checked(
        self, inputs: Mapping[str, np.ndarray], caches: Mapping[str, np.ndarray | DeviceBuffer]
    ) -> dict[str, np.ndarray]:
        given = set(inputs) | {f"past_{stem}" for stem in caches}
        wanted = {tensor.name for tensor in self._tensors.values() if tensor.is_input}
        if given != wanted:
            differing = sorted(given ^ wanted)
            raise EngineError(
                f"engine of {self._graph}: input {differing[0]} is "
                f"{'missing' if differing[0] in wanted else 'unknown'}; it takes {', '.join(sorted(wanted))}"
            )
        arrays = {}
        for name, array in inputs.items():
            arrays[name] = np.asarray(array, order="C")
            self._check_dtype(name, arrays[name])
        for stem, cache in caches.items():
            tensor = self._tensors[f"past_{stem}"]
            size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
            found = cache.nbytes if isinstance(cache, np.ndarray) else cache.size_bytes
            if found != size:
                raise EngineShapeError(
                    f"engine of {self._graph}: cache {stem} has {found} bytes, {tensor.shape} of {tensor.dtype} "
                    f"({size} bytes) is expected; make it from this bundle's manifest"
                )
            if isinstance(cache, np.ndarray):
                self._check_dtype(f"past_{stem}", cache)
                if not cache.flags.c_contiguous:
                    raise EngineError(f"engine of {self._graph}: cache {stem} has gaps; give a contiguous array")
        return arrays

    def _check_dtype(self, name: str, array: np.ndarray) -> None:
        expected = self._tensors[name].dtype
        is_bfloat16 = expected == np.uint16 and array.dtype.name == "bfloat16"
        if array.dtype != expected and not is_bfloat16:
            raise EngineError(f"engine of {self._graph}: {name} is {array.dtype}, {expected} is expected")

    def _reserve(self, name: str, size_bytes: int) -> None:
        """Keep a buffer of at least this size under a name; a bigger one moves, so all bindings start over."""
        buffer = self._buffers.get(name)
        if buffer is not None and buffer.size_bytes >= size_bytes:
            return
        if buffer is not None:
            self._stream.wait()
            self._bound.clear()
            buffer.free()
        self._buffers[name] = self._memory.allocate(size_bytes)

    def _bind(self, shapes: dict[str, Shape], caches: Mapping[str, np.ndarray | DeviceBuffer]) -> _Bound:
        device_caches = {stem: cache for stem, cache in caches.items() if not isinstance(cache, np.ndarray)}
        key = (
            tuple(sorted(shapes.items())),
            tuple((stem, cache.address) for stem, cache in sorted(device_caches.items())),
        )
        if key in self._bound:
            self._bound.move_to_end(key)
            return self._bound[key]
        profile = self._profile_for(shapes)
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._refused("it makes no execution context")
        # With one context a shape, a captured graph is never invalidated by another shape.
        if self._engine.num_optimization_profiles > 1 and not context.set_optimization_profile_async(
            profile, self._stream.handle
        ):
            raise self._refused(f"it does not take profile {profile}")
        for name, shape in shapes.items():
            if self._tensors[name].varies and not context.set_input_shape(name, shape):
                raise self._refused(f"it does not take {name} {shape}")
        outputs = {
            tensor.name: tuple(context.get_tensor_shape(tensor.name))
            for tensor in self._tensors.values()
            if not tensor.is_input and not tensor.name.startswith("present_")
        }
        for name, shape in outputs.items():
            self._reserve(name, int(np.prod(shape)) * self._tensors[name].dtype.itemsize)
        scratch_bytes = int(context.update_device_memory_size_for_shapes())
        self._reserve(_SCRATCH, scratch_bytes)
        context.set_device_memory(self._buffers[_SCRATCH].address, self._buffers[_SCRATCH].size_bytes)
        for name in (*shapes, *outputs):
            self._set_address(context, name, self._buffers[name].address)
        for stem, cache in caches.items():
            past = self._buffers[f"past_{stem}"] if isinstance(cache, np.ndarray) else cache
            is_shared = self._aliases.get(f"present_{stem}") is not None
            self._set_address(context, f"past_{stem}", past.address)
            present = past if is_shared else self._buffers[f"present_{stem}"]
            self._set_address(context, f"present_{stem}", present.address)
        bound = self._bound[key] = _Bound(context=context, outputs=outputs)
        while len(self._bound) > _MOST_SHAPES:
            self._stream.wait()
            self._bound.popitem(last=False)
        return bound

    def _set_address(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise self._refused(f"it does not take an address for {name}")

    def _profile_for(self, shapes: dict[str, Shape]) -> int:
        """The first profile that covers the shapes; exact ones come first in an engine."""
        varying = [tensor for tensor in self._tensors.values() if tensor.is_input and tensor.varies]
        for tensor in self._tensors.values():
            shape = shapes.get(tensor.name)
            if shape is not None and not tensor.varies and shape != tensor.shape:
                raise EngineShapeError(f"engine of {self._graph}: {tensor.name} is {shape}, it takes {tensor.shape}")
        count = max(1, self._engine.num_optimization_profiles)
        for profile in range(count):
            if all(_covers(tensor.profile_shapes[profile], shapes[tensor.name]) for tensor in varying):
                return profile
        name = next(
            (t.name for t in varying if not any(_covers(span, shapes[t.name]) for span in t.profile_shapes)),
            varying[0].name,
        )
        spans = dict.fromkeys((low, high) for low, _, high in self._tensors[name].profile_shapes)
        known = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in spans)
        raise EngineShapeError(
            f"engine of {self._graph}: no profile covers {name} {shapes[name]}; it was built for {known}"
        )

    def _execute(self, bound: _Bound) -> None:
        # The first run of a shape is not captured: TensorRT finishes setting up the shape in it.
        if self._cuda_graphs and self._stream.can_capture and bound.graph is None and bound.runs > 0:
            self._stream.begin_capture()
            is_ok = bound.context.execute_async_v3(self._stream.handle)
            bound.graph = self._stream.end_capture()
            if not is_ok:
                bound.graph = None
                raise self._refused("the run cannot be captured")
        bound.runs += 1
        if bound.graph is not None:
            bound.graph.launch(self._stream)
        elif not bound.context.execute_async_v3(self._stream.handle):
            raise self._refused("the run failed")

    def _copy_entries_in(self, stem: str, cache: np.ndarray, span: tuple[int, int] | None) -> None:
        buffer = self._buffers[f"past_{stem}"]
        if span is None:
            self._memory.copy_in(buffer, cache, self._stream)
            return
        for strip, offset_bytes in _strips(cache, 0, span[0]):
            self._memory.copy_in(buffer, strip, self._stream, offset_bytes)

    def _copy_entries_out(self, stem: str, cache: np.ndarray, span: tuple[int, int] | None) -> None:
        is_shared = self._aliases.get(f"present_{stem}") is not None
        buffer = self._buffers[f"past_{stem}" if is_shared else f"present_{stem}"]
        if span is None:
            self._memory.copy_out(cache, buffer, self._stream)
            return
        for strip, offset_bytes in _strips(cache, *span):
            self._memory.copy_out(strip, buffer, self._stream, offset_bytes)

    def _refused(self, what: str) -> EngineError:
        return EngineError(f"engine of {self._graph}: {what} ({self._log.first_error()})")


def _read_tensors(trt: ModuleType, engine: Any) -> list[_Tensor]:
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        profiles = range(max(1, engine.num_optimization_profiles)) if is_input else ()
        tensors.append(
            _Tensor(
                name=name,
                dtype=tensor_dtype(trt, engine.get_tensor_dtype(name)),
                is_input=is_input,
                shape=tuple(engine.get_tensor_shape(name)),
                profile_shapes=tuple(_three_shapes(engine.get_tensor_profile_shape(name, i)) for i in profiles),
            )
        )
    return tensors


def _three_shapes(shapes: Any) -> tuple[Shape, Shape, Shape]:
    low, best, high = (tuple(shape) for shape in shapes)
    return low, best, high


def _read_aliases(engine: Any, tensors: Mapping[str, _Tensor]) -> dict[str, str]:
    """Outputs that live in an input's memory, as the engine says; TensorRT before 10.13 knows none."""
    ask = getattr(engine, "get_aliased_input_tensor", None)
    if ask is None:
        return {}
    found = {tensor.name: ask(tensor.name) for tensor in tensors.values() if not tensor.is_input}
    return {name: source for name, source in found.items() if source}


def _covers(span: tuple[Shape, Shape, Shape], shape: Shape) -> bool:
    low, _, high = span
    return len(low) == len(shape) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


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
