"""The world model of a whole flight on TensorRT engines: on the fake GPU always, on a real one where there is one."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeMemory
from fake_tensorrt import GraphEngine, fake_tensorrt
from flight_agreement import agreeing_segments
from small_models import random_frames

from worldvln_edge.bundle import Bundle
from worldvln_edge.images import transform
from worldvln_edge.runtime.engines.cuda_memory import CudaMemory
from worldvln_edge.runtime.engines.device_kv_memory import DeviceKVMemory
from worldvln_edge.runtime.engines.device_memory import DeviceMemoryError
from worldvln_edge.runtime.engines.engine import Engine, EngineError
from worldvln_edge.runtime.engines.tensorrt_engine import TensorRTEngine
from worldvln_edge.runtime.engines.tensorrt_library import PACKAGES, load_tensorrt, tensorrt_log
from worldvln_edge.runtime.worldvln.graphs import WORLD_MODEL_CONTEXT, WORLD_MODEL_STEP
from worldvln_edge.runtime.worldvln.kv_cache import KVCache, KVWorkspace
from worldvln_edge.runtime.worldvln.multiscale import encode_clip
from worldvln_edge.runtime.worldvln.video_stream import FrameEncoder
from worldvln_edge.runtime.worldvln.world_model import WorldModelDriver
from worldvln_edge.runtime.worldvln.worldvln_policy import FLIGHT_GRAPHS, WorldVLNPolicy, load_policy

KV_GRAPHS = (WORLD_MODEL_CONTEXT, WORLD_MODEL_STEP)


def probabilities_of_a_flight(
    policy: WorldVLNPolicy, engines: Mapping[str, Engine], workspace: KVWorkspace | None = None
) -> np.ndarray:
    """Of every bit of every clip, each generated from what was observed before it, with the observed bits forced.

    Args:
        policy: of ONNX Runtime; encodes text and frames.
        engines: take the place of the policy's.
        workspace: for their caches; None: the policy's.
    """
    config, tables = policy.config, policy.tables
    frames = random_frames(config, config.horizon.num_frames)
    encoder = FrameEncoder(policy.engines, config.video_vae.temporal_stride)
    latents = np.stack(encoder.push([transform(frame, config.image_hw) for frame in frames]), 1)
    driver = WorldModelDriver({**policy.engines, **engines}, tables, KVCache(workspace or policy.workspace))
    driver.set_text(policy.encode_text("fly to the red tower", ""))
    found = []
    for clip in tables.schedule.clips:
        observed = encode_clip(latents[:, clip.frame_slice], clip, config.world_model)
        if clip.index > 0:
            generated = driver.generate(clip.index, 0, forced_bits=observed.bits)
            np.testing.assert_allclose(generated.codes, observed.codes, atol=1e-5)
            found += [part.reshape(-1) for part in generated.probabilities]
        if clip.index + 1 < len(tables.schedule.clips):
            driver.observe(observed)
    return np.concatenate(found)


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FakeMemory, Bundle], None]]:
    """A package whose engine files are names of graphs."""

    def install(memory: FakeMemory, bundle: Bundle) -> None:
        package = fake_tensorrt(lambda data: GraphEngine(memory, bundle.graph_path(data.decode())))
        monkeypatch.setitem(sys.modules, "tensorrt", package)
        tensorrt_log.cache_clear()

    yield install
    tensorrt_log.cache_clear()


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_flight_on_engines_gives_what_onnx_runtime_gives(tiny_bundle: Path, fake_package, cuda_graphs: bool) -> None:
    bundle, policy, memory = Bundle.open(tiny_bundle), load_policy(tiny_bundle, threads=1), FakeMemory()
    fake_package(memory, bundle)
    with ExitStack() as closes:
        engines = {
            graph: closes.enter_context(
                closing(
                    TensorRTEngine(
                        graph.encode(), graph=graph, package="tensorrt", memory=memory, cuda_graphs=cuda_graphs
                    )
                )
            )
            for graph in KV_GRAPHS
        }
        found = probabilities_of_a_flight(policy, engines)
    np.testing.assert_allclose(found, probabilities_of_a_flight(policy, {}), atol=1e-6)
    assert (memory.launches > 10) == cuda_graphs
    assert memory.left_behind() == {}


def package_here() -> str:
    """The TensorRT package of this machine, if it also has a GPU."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    try:
        CudaMemory().close()
    except DeviceMemoryError as error:
        pytest.skip(str(error))
    for package in PACKAGES:
        try:
            load_tensorrt(package)
        except EngineError:
            continue
        return package
    pytest.skip("neither tensorrt nor tensorrt_rtx is installed")


@pytest.fixture(scope="module")
def shipped_bundle(tracer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The shipped model in fp16 with engines of all that a flight needs for this GPU, built here; and their package."""
    from worldvln_edge.export.build_job import EngineBuildError
    from worldvln_edge.export.exporter import export_bundle
    from worldvln_edge.export.precision import Precision
    from worldvln_edge.export.tensorrt_build import build_engines, parse_targets
    from worldvln_edge.models.checkpoint_source import open_any

    package = package_here()
    has_attention = package == "tensorrt_rtx" or int(load_tensorrt(package).__version__.split(".")[0]) >= 11
    with closing(CudaMemory()) as memory:
        target = "local" if package == "tensorrt" else memory.compute_capability
    try:
        targets = parse_targets(target)
    except EngineBuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    source = open_any(Path(__file__).parents[2] / "worldvln_edge" / "checkpoints" / "nano")
    kv = "inplace" if has_attention else "portable"
    export_bundle(source, folder, precision=Precision(name="fp16"), kv=kv, tracer=tracer)
    results = build_engines(folder, targets, graphs=list(FLIGHT_GRAPHS))
    assert {result.error for result in results} == {""}
    return folder, package


@pytest.mark.gpu
def test_engines_of_the_shipped_model_are_within_their_bounds_on_this_gpu(shipped_bundle: tuple[Path, str]) -> None:
    from worldvln_edge.export.engine_checks import check_engines

    results = check_engines(shipped_bundle[0])
    assert {result.entry.graph: result.not_run for result in results} == dict.fromkeys(FLIGHT_GRAPHS, "")
    parities = {result.entry.graph: result.entry.parity for result in results}
    assert {graph: parity and parity.reason for graph, parity in parities.items()} == dict.fromkeys(FLIGHT_GRAPHS, "")


@pytest.mark.gpu
def test_the_shipped_model_flies_on_this_gpu_with_and_without_cuda_graphs(shipped_bundle: tuple[Path, str]) -> None:
    folder, package = shipped_bundle
    bundle, policy = Bundle.open(folder), load_policy(folder)
    expected, found = probabilities_of_a_flight(policy, {}), {}
    for cuda_graphs in (True, False):
        with ExitStack() as closes:
            memory = closes.enter_context(closing(CudaMemory()))
            engines = {
                graph: closes.enter_context(
                    closing(TensorRTEngine.load(bundle, graph, package=package, memory=memory, cuda_graphs=cuda_graphs))
                )
                for graph in KV_GRAPHS
            }
            found[cuda_graphs] = probabilities_of_a_flight(policy, engines)
    np.testing.assert_array_equal(found[True], found[False])  # the same kernels in the same order
    # The mean that fp16 as a whole may cost (export/parity_bounds.py); two fp16 runs lie far closer.
    assert np.abs(found[True] - expected).mean() < 1.2e-3


@pytest.mark.gpu
def test_a_policy_on_this_gpus_engines_draws_what_the_cpu_draws(shipped_bundle: tuple[Path, str]) -> None:
    folder, package = shipped_bundle
    on_host = load_policy(folder)
    with closing(load_policy(folder, backend="tensorrt")) as on_gpu:
        assert (on_gpu.info.backend, on_gpu.info.device) == (package, "cuda")
        assert isinstance(on_gpu.workspace.memory, DeviceKVMemory)
        world_model = {graph: on_gpu.engines[graph] for graph in KV_GRAPHS}
        found = probabilities_of_a_flight(on_host, world_model, on_gpu.workspace)
        assert np.abs(found - probabilities_of_a_flight(on_host, {})).mean() < 1.2e-3
        # Free draws in fp16: two implementations decide bits alike unless they lie on a border that wide.
        for seed in range(3):
            agreeing_segments(on_host, on_gpu, seed=seed, border=0.05, tolerance=5)
