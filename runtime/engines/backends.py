"""Which engines fly a bundle, and where its keys and values live: the one place that chooses.

| backend    | engines                                                                     | keys and values |
|------------|-----------------------------------------------------------------------------|-----------------|
| `cpu`      | ONNX Runtime on the CPU                                                     | host            |
| `cuda`     | ONNX Runtime on the GPU                                                     | GPU             |
| `tensorrt` | the bundle's TensorRT engines that fit; its other graphs on ONNX Runtime    | GPU, or host    |

With `tensorrt`, other graphs run on the GPU where ONNX Runtime has it, else on the CPU. Keys and values live on the
host if one of the two graphs that use them does: engines on the GPU mirror what they need of them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import onnxruntime as ort

from worldvln_edge.bundle import Bundle, BundleError, Manifest
from worldvln_edge.runtime.engines.cuda_memory import CudaMemory
from worldvln_edge.runtime.engines.device_kv_memory import DeviceKVMemory
from worldvln_edge.runtime.engines.device_memory import DeviceMemory, DeviceMemoryError
from worldvln_edge.runtime.engines.device_pool import PooledMemory
from worldvln_edge.runtime.engines.engine import PLACEMENTS, Engine, EngineError, OnnxDevice, OnnxEngine
from worldvln_edge.runtime.engines.tensorrt_engine import TensorRTEngine
from worldvln_edge.runtime.engines.tensorrt_library import PACKAGES
from worldvln_edge.runtime.sessions.available_memory import available_bytes
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.kv_cache import HostKVMemory, KVMemory, KVShape
from worldvln_edge.runtime.worldvln.latency_model import device_name

BackendName = Literal["auto", "cpu", "cuda", "tensorrt"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
_GRAPHS_WITH_CACHES = (graphs.WORLD_MODEL_CONTEXT, graphs.WORLD_MODEL_STEP)

_log = logging.getLogger(__name__)


class BackendError(EngineError):
    """A backend that was asked for and cannot fly the bundle here. The message says why, and what to do."""


@dataclass(kw_only=True)
class Backend:
    """What the engines of a policy run on."""

    runner: str = "onnx"
    """`onnx`, `tensorrt`, `tensorrt_rtx`, or two of them: `tensorrt+onnx`."""
    device: str = "cpu"
    """`cuda` as soon as one graph runs there."""
    machine: str = field(default_factory=device_name)
    """What measured times are kept under."""
    kv_memory: KVMemory
    device_memory: DeviceMemory | None = None
    """Where sessions keep what is not on the host; None: all of it is."""
    why: str = ""
    """How the choice came about, in one line."""
    ends: ExitStack = field(default_factory=ExitStack, repr=False)
    """Closes what lies on a device."""

    def available_bytes(self) -> int | None:
        """Memory that is left for sessions: the smaller of host's and device's, as both hold a part of each."""
        host, device = available_bytes(), self.device_memory
        found = [left for left in (host, None if device is None else device.free_bytes) if left is not None]
        return min(found) if found else None

    def close(self) -> None:
        """Give back what lies on a device; no engine of it may run any more. Twice does no harm."""
        self.ends.close()


def open_engines(
    bundle: Bundle, names: Collection[str], *, backend: BackendName = "auto", threads: int = 0
) -> tuple[dict[str, Engine], Backend]:
    """Load graphs of a bundle.

    Args:
        bundle: checked.
        names: of its graphs.
        backend: see above; `auto` takes TensorRT if an engine of the bundle fits this GPU and package, else CUDA if
            ONNX Runtime has it and a device answers, else the CPU.
        threads: CPU threads per engine call; 0 lets ONNX Runtime choose.

    Returns:
        Graph name -> engine, and what they run on; close that when they are not needed any more.

    Raises:
        BackendError: the backend that was asked for cannot fly the bundle here.
        EngineError: a graph does not load.
        DeviceMemoryError: the GPU has no room.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    opening = _Opening(bundle, names, threads)
    try:
        engines, found = opening.open_best() if backend == "auto" else opening.open(backend)
    except BackendError as error:
        raise BackendError(
            f"backend {backend} cannot fly {bundle.folder} here: {error}; or choose --backend auto"
        ) from error
    _log.info("%s flies on %s (%s): %s", bundle.folder, found.runner, found.device, found.why or "as asked for")
    return engines, found


def host_backend(manifest: Manifest) -> Backend:
    """ONNX Runtime on the CPU, whose engines were made by the caller."""
    return Backend(kv_memory=HostKVMemory(kv_shape(manifest)))


def kv_shape(manifest: Manifest) -> KVShape:
    """Sizes of a bundle's caches."""
    model = manifest.model.world_model
    inputs = manifest.graphs[graphs.WORLD_MODEL_STEP].inputs
    return KVShape(
        layers=model.depth,
        rows=manifest.guidance_rows,
        kv_heads=model.kv_heads,
        capacity=manifest.kv_capacity,
        head_dim=model.head_dim,
        dtype=np.dtype(next(spec.dtype for spec in inputs if spec.name == "past_key_0")),
    )


class _Opening:
    """One attempt to load graphs, backend after backend."""

    def __init__(self, bundle: Bundle, names: Collection[str], threads: int):
        self._bundle, self._names, self._threads = bundle, names, threads

    def open_best(self) -> tuple[dict[str, Engine], Backend]:
        tried: list[str] = []
        choices: tuple[BackendName, ...] = ("tensorrt", "cuda")
        for choice in choices:
            try:
                engines, found = self.open(choice)
                break
            except BackendError as error:
                tried.append(f"not {choice}: {error}")
        else:
            engines, found = self.open("cpu")
        found.why = "; ".join([*([found.why] if found.why else []), *tried])
        return engines, found

    def open(self, backend: BackendName) -> tuple[dict[str, Engine], Backend]:
        if backend == "cpu":
            return dict(self._onnx_engines(self._names, "cpu")), host_backend(self._bundle.manifest)
        compute = self._bundle.manifest.compute
        if compute not in ("fp32", "fp16"):
            raise BackendError(f"numpy, which feeds the engines, has no {compute}; export with --compute fp16")
        with ExitStack() as ends:  # what was opened before a failure is closed
            open_on_device = self._open_cuda if backend == "cuda" else self._open_tensorrt
            engines, found = open_on_device(ends)
            found.ends = ends.pop_all()
        return engines, found

    def _open_cuda(self, ends: ExitStack) -> tuple[dict[str, Engine], Backend]:
        provider = PLACEMENTS["cuda"].provider
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"ONNX Runtime {ort.__version__} here has no {provider}; install the extra gpu in the place of cpu"
            )
        memory = self._open_memory(ends)
        try:
            engines = self._onnx_engines(self._names, "cuda")
        except EngineError as error:
            raise BackendError(str(error)) from error
        return dict(engines), self._on_device(memory, "onnx", self._names, ends)

    def _open_tensorrt(self, ends: ExitStack) -> tuple[dict[str, Engine], Backend]:
        entries = [entry for entry in self._bundle.manifest.engines if entry.graph in self._names]
        if not entries:
            raise BackendError(
                f"the bundle has no TensorRT engines; run `worldvln-edge build {self._bundle.folder} --target local`"
            )
        memory = self._open_memory(ends)
        refused: dict[str, str] = {}  # graph that has engines -> why none of them is flown
        for package in PACKAGES:
            graphs_built = {entry.graph for entry in entries if entry.backend == package}
            engines = self._tensorrt_engines(package, graphs_built, memory, refused, ends)
            if engines:
                break
        else:
            raise BackendError(next(iter(refused.values())))
        others = [name for name in self._names if name not in engines]
        if not others:
            return dict(engines), self._on_device(memory, package, engines, ends)
        rest, device = self._onnx_engines_anywhere(others)
        on_device = [*engines, *(others if device == "cuda" else ())]
        found = self._on_device(memory, f"{package}+onnx", on_device, ends)
        reasons = [refused[name] for name in others if name in refused] or ["no engines of them were built"]
        found.why = f"ONNX Runtime ({device}) runs {', '.join(others)}: {'; '.join(reasons)}"
        return {**engines, **rest}, found

    def _open_memory(self, ends: ExitStack) -> DeviceMemory:
        try:
            memory = PooledMemory(CudaMemory())
        except DeviceMemoryError as error:
            raise BackendError(str(error)) from error
        ends.callback(memory.close)
        return memory

    def _on_device(self, memory: DeviceMemory, runner: str, on_device: Collection[str], ends: ExitStack) -> Backend:
        shape, kv_memory = kv_shape(self._bundle.manifest), None
        if all(name in on_device for name in _GRAPHS_WITH_CACHES):
            kv_memory = DeviceKVMemory(memory, shape)
            ends.callback(kv_memory.close)
        return Backend(
            runner=runner,
            device="cuda",
            machine=f"{memory.name}, {runner}",
            kv_memory=kv_memory or HostKVMemory(shape),
            device_memory=memory,
        )

    def _tensorrt_engines(
        self,
        package: str,
        names: Collection[str],
        memory: DeviceMemory,
        refused: dict[str, str],
        ends: ExitStack,
    ) -> dict[str, TensorRTEngine]:
        engines = {}
        for name in sorted(names):
            try:
                engines[name] = TensorRTEngine.load(self._bundle, name, package=package, memory=memory)
            except (BundleError, EngineError) as error:
                refused[name] = str(error)
            else:
                ends.callback(engines[name].close)
        return engines

    def _onnx_engines_anywhere(self, names: Collection[str]) -> tuple[Mapping[str, Engine], OnnxDevice]:
        if PLACEMENTS["cuda"].provider in ort.get_available_providers():
            try:
                return self._onnx_engines(names, "cuda"), "cuda"
            except EngineError as error:
                _log.warning("ONNX Runtime does not run on the GPU, %s run on the CPU: %s", ", ".join(names), error)
        return self._onnx_engines(names, "cpu"), "cpu"

    def _onnx_engines(self, names: Collection[str], device: OnnxDevice) -> Mapping[str, Engine]:
        return {name: OnnxEngine(self._bundle.graph_path(name), threads=self._threads, device=device) for name in names}
