"""Whatever runs the graphs, and wherever keys and values live, the actions are the same."""

import gc
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeMemory
from flight_agreement import agreeing_segments
from two_flights import fly

from worldvln_edge.runtime.bench.bench_device import why_not_measurable
from worldvln_edge.runtime.engines import tensorrt_engine
from worldvln_edge.runtime.engines.device_kv_memory import DeviceKVMemory
from worldvln_edge.runtime.engines.device_tensor import DeviceTensor
from worldvln_edge.runtime.engines.tensorrt_engine import TensorRTEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.kv_cache import HostKVMemory
from worldvln_edge.runtime.worldvln.worldvln_policy import FLIGHT_GRAPHS, load_policy

ACTION_TOLERANCE = 1e-4  # cm and deg; the arithmetic is that of the same provider
WORLD_MODEL = (graphs.WORLD_MODEL_CONTEXT, graphs.WORLD_MODEL_STEP)
VAE = tuple(name for name in FLIGHT_GRAPHS if name.startswith("vae_"))


@pytest.fixture(scope="module")
def on_cpu(tiny_bundle: Path) -> np.ndarray:
    return fly(load_policy(tiny_bundle, threads=1))


def test_a_flight_with_device_memory_gives_the_actions_of_the_cpu(
    tiny_bundle: Path, on_cpu: np.ndarray, gpu: FakeMemory, cuda_in_onnx_runtime: None
) -> None:
    policy = load_policy(tiny_bundle, backend="cuda", threads=1)
    assert (policy.info.backend, policy.info.device) == ("onnx", "cuda")
    assert isinstance(policy.workspace.memory, DeviceKVMemory)
    np.testing.assert_allclose(fly(policy), on_cpu, atol=ACTION_TOLERANCE)
    kv_in = gpu.bytes_in
    fly(policy)
    assert gpu.bytes_inside > 0
    assert (gpu.bytes_in, gpu.bytes_out) == (kv_in, 0)  # entries were zeroed once, and never leave the device
    policy.close()
    policy.close()
    assert gpu.left_behind() == {}
    assert gpu.is_closed


@pytest.mark.parametrize("large_bytes", [1, 1 << 30])
def test_a_flight_on_tensorrt_gives_the_actions_of_the_cpu(
    with_engines, on_cpu: np.ndarray, gpu: FakeMemory, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    """Values between engines are read where they lie, or copied on the device; both are right."""
    monkeypatch.setattr(tensorrt_engine, "_LARGE_BYTES", large_bytes)
    policy = load_policy(with_engines(FLIGHT_GRAPHS), backend="tensorrt", threads=1)
    assert (policy.info.backend, policy.info.device) == ("tensorrt", "cuda")
    assert isinstance(policy.workspace.memory, DeviceKVMemory)
    assert {type(engine) for engine in policy.engines.values()} == {TensorRTEngine}
    np.testing.assert_allclose(fly(policy), on_cpu, atol=ACTION_TOLERANCE)
    assert (gpu.launches > 0) == (large_bytes > 1)
    policy.close()
    gc.collect()
    assert gpu.left_behind() == {}


@pytest.mark.parametrize("names", [WORLD_MODEL, VAE, (graphs.WORLD_MODEL_STEP,), (graphs.ACTION_ADAPTER,)])
@pytest.mark.parametrize("has_cuda", [True, False])
def test_a_flight_on_engines_of_both_kinds_gives_the_actions_of_the_cpu(
    with_engines, on_cpu: np.ndarray, gpu: FakeMemory, request: pytest.FixtureRequest, names: tuple, has_cuda: bool
) -> None:
    if has_cuda:
        request.getfixturevalue("cuda_in_onnx_runtime")
    policy = load_policy(with_engines(names), backend="tensorrt", threads=1)
    kinds = {name: type(engine) for name, engine in policy.engines.items()}
    assert {name for name, kind in kinds.items() if kind is TensorRTEngine} == set(names)
    assert (policy.info.backend, policy.info.device) == ("tensorrt+onnx", "cuda")
    is_kv_on_device = has_cuda or set(names) >= set(WORLD_MODEL)
    assert type(policy.workspace.memory) is (DeviceKVMemory if is_kv_on_device else HostKVMemory)
    np.testing.assert_allclose(fly(policy), on_cpu, atol=ACTION_TOLERANCE)
    policy.close()
    gc.collect()
    assert gpu.left_behind() == {}


def test_portable_engines_keep_their_caches_on_the_device(with_engines, on_cpu: np.ndarray, gpu: FakeMemory) -> None:
    policy = load_policy(with_engines(FLIGHT_GRAPHS, is_portable=True), backend="tensorrt", threads=1)
    assert isinstance(policy.workspace.memory, DeviceKVMemory)
    np.testing.assert_allclose(fly(policy), on_cpu, atol=ACTION_TOLERANCE)


def test_values_between_engines_never_leave_the_device(with_engines, gpu: FakeMemory) -> None:
    policy = load_policy(with_engines(FLIGHT_GRAPHS), backend="tensorrt", threads=1)
    decoder = policy.engines[graphs.first_or_next(graphs.VAE_DECODER, True)]
    model, (rows, cols) = policy.config.world_model, policy.config.schedule.latent_hw
    codes = np.ones((1, model.latent_channels, 1, rows, cols), np.float32)
    whole, kept = decoder.run({"codes": codes}), decoder.run({"codes": codes}, fetch=())
    assert {type(value) for value in kept.values()} == {DeviceTensor}
    adapter, out_before = policy.engines[graphs.ACTION_ADAPTER], gpu.bytes_out
    found = adapter.run({"features": kept["features"]})["tokens"]
    assert gpu.bytes_out - out_before == found.nbytes
    np.testing.assert_array_equal(found, adapter.run({"features": whole["features"]})["tokens"])
    decoder.run({"codes": 2 * codes}, fetch=())  # does not touch what others hold
    np.testing.assert_array_equal(kept["features"].numpy(), whole["features"])


def test_memory_of_a_flight_does_not_grow_from_flight_to_flight(with_engines, gpu: FakeMemory) -> None:
    policy = load_policy(with_engines(FLIGHT_GRAPHS), backend="tensorrt", threads=1)
    fly(policy)
    fly(policy)
    before = sum(space.size for space in gpu.spaces.values())
    fly(policy)
    assert sum(space.size for space in gpu.spaces.values()) == before


@pytest.fixture(scope="session")
def real_cuda() -> None:
    """Skips where ONNX Runtime has no GPU."""
    reason = why_not_measurable("cuda")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
def test_a_flight_on_this_gpu_gives_the_actions_of_the_cpu(real_cuda: None, tiny_bundle: Path) -> None:
    on_host, on_gpu = (load_policy(tiny_bundle, backend=backend) for backend in ("cpu", "cuda"))
    assert isinstance(on_gpu.workspace.memory, DeviceKVMemory)
    bounds = {"border": 1e-4, "tolerance": 1e-2}
    segments = [agreeing_segments(on_host, on_gpu, seed=seed, **bounds) for seed in range(5)]
    assert sum(segments) > 0.6 * 5 * on_host.config.horizon.segments  # few bits lie on the border
    on_gpu.close()
