"""A TensorRT package that runs on the fake GPU. Stands in behind the real builder and parser, where a GPU would be.

`FakeEngine` has one graph: `doubled = 2 * x`, and a cache into which `x` is written at `write_index`. `GraphEngine`
runs an ONNX graph of a bundle, through ONNX Runtime.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
from fake_gpu import FakeMemory
from onnx import helper

from worldvln_edge.bundle import Bundle
from worldvln_edge.export import engine_checks
from worldvln_edge.runtime.engines.tensorrt_library import tensorrt_log

BATCH, HEADS, CAPACITY, SIZE = 1, 2, 8, 3
CACHE = (BATCH, HEADS, CAPACITY, SIZE)
ENGINES_REALLY_RUN = "really_run"
"""Folder below a bundle: `<graph>.onnx` there is what the fake runs as the engine of that graph."""


@dataclass
class FakeEngine:
    memory: FakeMemory
    is_portable: bool = False
    profiles: tuple = (((2, 3),) * 3, ((1, 3), (4, 3), (5, 3)))
    on_run: Callable[[], bool] = lambda: True
    """Called before a run is enqueued; its result is that of the enqueuing."""
    contexts: list = field(default_factory=list)
    alive_contexts: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    names = ("x", "write_index", "kv_length", "past_key_0", "doubled", "present_key_0")
    num_io_tensors = len(names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name in ("doubled", "present_key_0") else "in"

    def get_tensor_dtype(self, name: str) -> str:
        return "INT64" if name in ("write_index", "kv_length") else "FLOAT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        fixed = {"write_index": (1,), "kv_length": (1,), "past_key_0": CACHE, "present_key_0": CACHE}
        return fixed.get(name, (-1, 3))

    def get_tensor_profile_shape(self, name: str, profile: int):
        return self.profiles[profile] if name == "x" else (self.get_tensor_shape(name),) * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return "past_key_0" if name == "present_key_0" and not self.is_portable else None

    def create_execution_context(self, strategy: str) -> "FakeContext":
        assert strategy == "user managed"
        context = FakeContext(self)
        self.contexts.append(weakref.proxy(context))
        self.alive_contexts.add(context)
        return context


class FakeContext:
    def __init__(self, engine: FakeEngine):
        self.engine, self.memory = engine, engine.memory
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile, self.scratch = 0, 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def update_device_memory_size_for_shapes(self) -> int:
        return 100 * next(iter(self.shapes.values()), (1,))[0]

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        self.memory.view(address, np.uint8, (size_bytes,))
        self.scratch = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not self.engine.on_run():
            return False
        if self.memory.captured is None:
            self.compute()
        else:
            self.memory.captured.append(self.compute)
        return True

    def compute(self) -> None:
        view, at = self.memory.view, self.addresses
        view(self.scratch, np.uint8, (1,))
        x = view(at["x"], np.float32, self.shapes["x"])
        view(at["doubled"], np.float32, self.shapes["x"])[:] = 2 * x
        past, present = (view(at[f"{kind}_key_0"], np.float32, CACHE) for kind in ("past", "present"))
        start = int(view(at["write_index"], np.int64, (1,))[0])
        present[:] = past
        present[:, :, start : start + len(x)] = x[: CAPACITY - start]


_DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}


class GraphEngine(FakeEngine):
    """An ONNX graph as an engine: any shape goes, caches are shared unless it is portable."""

    def __init__(self, memory: FakeMemory, path: Path, *, is_portable: bool = False):
        super().__init__(memory, is_portable)
        graph = onnx.load_model(path, load_external_data=False).graph
        self.inputs, self.outputs = ([value.name for value in values] for values in (graph.input, graph.output))
        self.names = (*self.inputs, *self.outputs)
        self.num_io_tensors = len(self.names)
        types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
        self.shapes = {n: tuple(d.dim_value or -1 for d in t.shape.dim) for n, t in types.items()}
        self.dtypes = {n: helper.tensor_dtype_to_np_dtype(t.elem_type) for n, t in types.items()}
        self.profiles = (None,)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it would say for every cache and call that the write is not made in place
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return _DATA_TYPES[str(self.dtypes[name])]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_profile_shape(self, name: str, profile: int):
        low, high = (tuple(s if s >= 0 else size for s in self.shapes[name]) for size in (1, 1 << 20))
        return low, low, high

    def get_aliased_input_tensor(self, name: str) -> str | None:
        is_shared = name.startswith("present_") and not self.is_portable
        return name.replace("present_", "past_") if is_shared else None

    def create_execution_context(self, strategy: str) -> "GraphContext":
        context = GraphContext(self)
        self.alive_contexts.add(context)
        return context


class GraphContext(FakeContext):
    engine: GraphEngine

    def feeds(self, read: Callable[[str, tuple[int, ...]], np.ndarray]) -> dict[str, np.ndarray]:
        return {n: read(n, self.shapes.get(n, self.engine.shapes[n])) for n in self.engine.inputs}

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        blank = self.feeds(lambda n, shape: np.zeros(shape, self.engine.dtypes[n]))
        if "kv_length" in blank:  # attention over nothing is no number
            blank["kv_length"] += 1
        return self.engine.session.run([name], blank)[0].shape

    def compute(self) -> None:
        view, at = self.memory.view, self.addresses
        feeds = self.feeds(lambda n, shape: view(at[n], self.engine.dtypes[n], shape).copy())
        for name, result in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
            view(at[name], result.dtype, result.shape)[:] = result


def fake_tensorrt(
    load: Callable[[bytes], FakeEngine | None], messages: tuple = (), version: str = "1.0"
) -> SimpleNamespace:
    """Stands for the package.

    Args:
        load: engine file -> engine; None refuses to load.
        messages: (severity, text), said while an engine loads.
        version: of the package.
    """

    class Logger:
        INFO = 3

    class Runtime:
        def __init__(self, logger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            for severity, text in messages:
                self.logger.log(severity, text)
            return load(data)

    return SimpleNamespace(
        __version__=version,
        ILogger=Logger,
        Runtime=Runtime,
        DataType=SimpleNamespace(FLOAT="FLOAT", HALF="HALF", INT64="INT64"),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )


def graph_that_runs(bundle: Bundle, graph: str) -> Path:
    """The ONNX file that the fake runs as the engine of a graph: the graph itself, unless a test put another there."""
    other = bundle.folder / ENGINES_REALLY_RUN / f"{graph}.onnx"
    return other if other.is_file() else bundle.graph_path(graph)


def check_on_fake_gpu(job: engine_checks.CheckJob) -> engine_checks.CheckResult:
    """As `engine_checks._check_safely`, in a process of its own as well, with the fakes where the GPU would be."""
    bundle, memory = Bundle.open(job.bundle), FakeMemory(job.entry.compute_capability)
    path = graph_that_runs(bundle, job.entry.graph)
    package = fake_tensorrt(lambda data: GraphEngine(memory, path), version=job.entry.version)
    sys.modules[job.entry.backend] = package  # type: ignore[assignment]
    tensorrt_log.cache_clear()
    result = engine_checks.check_on(job, memory)  # type: ignore[arg-type]
    assert memory.left_behind() == {}
    return result
