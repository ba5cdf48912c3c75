"""The TensorRT engine: real files and the real package up to the device, and a stand-in for the device behind it."""

from pathlib import Path

import numpy as np
import pytest
from fake_gpu import CACHE, FakeEngine, FakeMemory, fake_tensorrt

from worldvln_edge.bundle import Bundle, BundleError
from worldvln_edge.runtime import tensorrt_engine
from worldvln_edge.runtime.engine import EngineError
from worldvln_edge.runtime.tensorrt_engine import EngineShapeError, TensorRTEngine, load_tensorrt, tensor_dtype


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch):
    def make(memory: FakeMemory, *, is_portable: bool = False, **options) -> tuple[TensorRTEngine, FakeEngine]:
        fake = FakeEngine(memory, is_portable)
        monkeypatch.setitem(__import__("sys").modules, "tensorrt", fake_tensorrt(fake))
        tensorrt_engine.tensorrt_log.cache_clear()
        return TensorRTEngine(b"plan", graph="step", package="tensorrt", memory=memory, **options), fake

    yield make
    tensorrt_engine.tensorrt_log.cache_clear()


def call(rows: int, start: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).random((rows, 3)).astype(np.float32)
    return {"x": x, "write_index": np.array([start]), "kv_length": np.array([start + rows])}


def test_results_and_cache_entries_come_back(make_engine) -> None:
    engine, _ = make_engine(FakeMemory())
    cache, inputs = np.zeros(CACHE, np.float32), call(2, start=3)
    outputs = engine.run(inputs, {"key_0": cache})
    assert list(outputs) == ["doubled"]
    np.testing.assert_array_equal(outputs["doubled"], 2 * inputs["x"])
    np.testing.assert_array_equal(cache[0, 1, 3:5], inputs["x"])
    assert not cache[:, :, :3].any()
    assert not cache[:, :, 5:].any()


@pytest.mark.parametrize("is_portable", [False, True])
def test_a_host_cache_sees_what_the_host_changed_between_calls(make_engine, is_portable: bool) -> None:
    engine, _ = make_engine(FakeMemory(), is_portable=is_portable)
    cache, expected = np.zeros(CACHE, np.float32), np.zeros(CACHE, np.float32)
    for seed, (rows, start) in enumerate([(2, 0), (2, 2), (4, 4), (2, 1), (2, 0), (2, 6)]):
        cache[:, :, :start] = expected[:, :, :start] = seed
        inputs = call(rows, start, seed)
        engine.run(inputs, {"key_0": cache})
        expected[:, :, start : start + rows] = inputs["x"]
        np.testing.assert_array_equal(cache, expected)


def test_a_host_cache_moves_only_the_entries_that_matter(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    engine.run(call(2, start=1), {"key_0": np.zeros(CACHE, np.float32)})
    entry_bytes = CACHE[1] * CACHE[3] * 4
    assert memory.bytes_in == 2 * 3 * 4 + 16 + 1 * entry_bytes
    assert memory.bytes_out == 2 * 3 * 4 + 2 * entry_bytes


def test_a_device_cache_is_read_and_written_where_it_is(make_engine) -> None:
    memory = FakeMemory()
    engine, fake = make_engine(memory)
    cache = memory.allocate(int(np.prod(CACHE)) * 4)
    inputs = call(2, start=4)
    engine.run(inputs, {"key_0": cache})
    (context,) = fake.contexts
    assert context.addresses["past_key_0"] == context.addresses["present_key_0"] == cache.address
    np.testing.assert_array_equal(memory.view(cache.address, np.float32, CACHE)[0, 0, 4:6], inputs["x"])
    assert memory.bytes_in == 2 * 3 * 4 + 16


def test_a_portable_engine_refuses_a_device_cache(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory, is_portable=True)
    with pytest.raises(EngineError, match=r"does not share the memory of past_key_0.*--kv inplace"):
        engine.run(call(2), {"key_0": memory.allocate(int(np.prod(CACHE)) * 4)})


def test_a_shape_is_captured_once_and_replayed(make_engine) -> None:
    memory = FakeMemory()
    engine, fake = make_engine(memory)
    cache = np.zeros(CACHE, np.float32)
    for seed in range(5):
        for rows in (2, 4):
            inputs = call(rows, seed=seed)
            np.testing.assert_array_equal(engine.run(inputs, {"key_0": cache})["doubled"], 2 * inputs["x"])
    assert len(fake.contexts) == 3  # the shape of 2 rows was bound again when the buffers grew
    assert memory.captures == 2
    assert memory.launches == 3 + 4
    assert {context.profile for context in fake.contexts} == {0, 1}


@pytest.mark.parametrize("options", [{"cuda_graphs": False}, {}])
def test_without_graphs_every_call_runs_directly(make_engine, options: dict) -> None:
    memory = FakeMemory(can_capture=bool(options))
    engine, _ = make_engine(memory, **options)
    for _ in range(3):
        engine.run(call(2), {"key_0": np.zeros(CACHE, np.float32)})
    assert memory.captures == memory.launches == 0


def test_two_sessions_keep_their_own_device_caches(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    caches = [memory.allocate(int(np.prod(CACHE)) * 4) for _ in range(2)]
    for turn in range(3):
        for index, cache in enumerate(caches):
            inputs = call(2, start=2 * turn, seed=10 * turn + index)
            engine.run(inputs, {"key_0": cache})
            found = memory.view(cache.address, np.float32, CACHE)[0, 0, 2 * turn : 2 * turn + 2]
            np.testing.assert_array_equal(found, inputs["x"])


def test_closing_gives_all_memory_back(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    engine.run(call(2), {"key_0": np.zeros(CACHE, np.float32)})
    engine.close()
    assert memory.spaces == {}


def test_a_shape_without_a_profile_is_refused_with_those_there_are(make_engine) -> None:
    engine, _ = make_engine(FakeMemory())
    with pytest.raises(EngineShapeError, match=r"covers x \(6, 3\); it was built for \(2, 3\), \(1, 3\) to \(5, 3\)"):
        engine.run(call(6), {"key_0": np.zeros(CACHE, np.float32)})
    with pytest.raises(EngineShapeError, match=r"write_index is \(2,\), it takes \(1,\)"):
        engine.run(call(2) | {"write_index": np.zeros(2, np.int64)}, {"key_0": np.zeros(CACHE, np.float32)})
    with pytest.raises(EngineShapeError, match=r"cache key_0 has 4 bytes, .* \(192 bytes\) is expected"):
        engine.run(call(2), {"key_0": np.zeros(1, np.float32)})


def test_wrong_inputs_are_refused_by_name(make_engine) -> None:
    engine, _ = make_engine(FakeMemory())
    cache = {"key_0": np.zeros(CACHE, np.float32)}
    with pytest.raises(EngineError, match="input y is unknown; it takes kv_length, past_key_0"):
        engine.run(call(2) | {"y": np.zeros(1)}, cache)
    with pytest.raises(EngineError, match="input past_key_0 is missing"):
        engine.run(call(2))
    with pytest.raises(EngineError, match="x is float64, float32 is expected"):
        engine.run(call(2) | {"x": np.zeros((2, 3))}, cache)
    with pytest.raises(EngineError, match="cache key_0 has gaps"):
        engine.run(call(2), {"key_0": np.zeros((*CACHE[:3], 6), np.float32)[..., ::2]})


def test_an_engine_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    package = fake_tensorrt(None, ((3, "loading"), (1, "The engine plan file is\n not compatible")))
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", package)
    tensorrt_engine.tensorrt_log.cache_clear()
    with pytest.raises(
        EngineError, match=r"cannot load it on sm87 \(The engine plan file is not compatible\); build it"
    ):
        TensorRTEngine(b"plan", graph="step", package="tensorrt", memory=FakeMemory("sm87"))
    tensorrt_engine.tensorrt_log.cache_clear()


def test_unknown_and_missing_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="unknown TensorRT package 'trt'; choose one of tensorrt, tensorrt_rtx"):
        load_tensorrt("trt")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match="tensorrt_rtx does not load here"):
        load_tensorrt("tensorrt_rtx")


def test_a_real_engine_reaches_the_driver(tmp_path: Path) -> None:
    """Checks of version, GPU and hash pass, then the real package loads the file, or names the missing driver."""
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    from engine_bundles import embed_bundle

    from worldvln_edge.export.tensorrt_build import build_engines, parse_targets
    from worldvln_edge.runtime.graphs import ACTION_ADAPTER

    folder = embed_bundle(tmp_path / "bundle")
    build_engines(folder, parse_targets("sm89"), graphs=[ACTION_ADAPTER])
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=f"here is tensorrt_rtx {trt.__version__} on sm120; run `worldvln-edge build"):
        TensorRTEngine.load(bundle, ACTION_ADAPTER, package="tensorrt_rtx", memory=FakeMemory("sm120"))
    with pytest.raises(EngineError, match=r"tensorrt_rtx .* cannot load it on sm89 \(.*CUDA.*\); build it again"):
        TensorRTEngine.load(bundle, ACTION_ADAPTER, package="tensorrt_rtx", memory=FakeMemory("sm89"))
    path = folder / bundle.manifest.engines[0].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="is corrupt"):
        TensorRTEngine.load(bundle, ACTION_ADAPTER, package="tensorrt_rtx", memory=FakeMemory("sm89"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("FLOAT", np.float32), ("HALF", np.float16), ("BF16", np.uint16), ("INT64", np.int64), ("BOOL", np.bool_)],
)
def test_dtypes_at_the_border_of_real_engines(name: str, dtype: type) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    assert tensor_dtype(trt, getattr(trt.DataType, name)) == dtype
    with pytest.raises(EngineError, match="cannot be passed in or out"):
        tensor_dtype(trt, trt.DataType.INT4)
