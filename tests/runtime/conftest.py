"""A GPU for backends: its memory is the host's, and TensorRT engines run the graphs that they were made of.

What is real is everything in front of them.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import zmq
from fake_gpu import FakeMemory

from worldvln_edge.bundle import Bundle, EngineEntry, file_entry, write_manifest
from worldvln_edge.runtime.engines import backends
from worldvln_edge.runtime.engines.engine import PLACEMENTS
from worldvln_edge.runtime.engines.tensorrt_library import tensorrt_log


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeMemory:
    """The GPU that backends open."""
    memory = FakeMemory()
    monkeypatch.setattr(backends, "CudaMemory", lambda: memory)
    return memory


@pytest.fixture
def cuda_in_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's CPU provider stands in for the one of CUDA."""
    monkeypatch.setitem(PLACEMENTS, "cuda", PLACEMENTS["cpu"])


@pytest.fixture
def with_engines(
    tiny_bundle: Path, tmp_path: Path, gpu: FakeMemory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """A copy of the bundle with engines for the fake GPU: files that name their graph."""
    from fake_tensorrt import GraphEngine, fake_tensorrt  # needs onnx, which few of these tests do

    def build(names: Sequence[str], *, is_portable: bool = False, **changes: object) -> Path:
        folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
        (folder / "engines").mkdir()
        bundle, entries = Bundle.open(folder), []
        for name in names:
            path = folder / "engines" / f"{name}.engine"
            path.write_text(name)
            entry = EngineEntry(
                graph=name,
                backend="tensorrt",
                version="1.0",
                compute_capability=gpu.compute_capability,
                file=f"engines/{path.name}",
                content=file_entry(path),
                precision="fp32",
                profiles=1,
                build_seconds=0,
                peak_memory_bytes=0,
                log="",
                sources={},
            )
            entries.append(msgspec.structs.replace(entry, **changes))
        write_manifest(folder, msgspec.structs.replace(bundle.manifest, engines=tuple(entries)))
        monkeypatch.setitem(
            sys.modules,
            "tensorrt",
            fake_tensorrt(lambda data: GraphEngine(gpu, bundle.graph_path(data.decode()), is_portable=is_portable)),
        )
        tensorrt_log.cache_clear()
        return folder

    yield build
    tensorrt_log.cache_clear()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: the name of a unix socket has at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="zmq-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    """Of ZeroMQ; its sockets are closed at the end."""
    context = zmq.Context()
    yield context
    context.destroy(linger=0)
