"""The TensorRT engine: real files and the real package up to the device, and a stand-in for the device behind it."""

import gc
import logging
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_gpu import FakeMemory
from fake_tensorrt import CACHE, FakeEngine, fake_tensorrt

from worldvln_edge.bundle import Bundle, BundleError
from worldvln_edge.parity_record import EngineParity, OutputParity
from worldvln_edge.runtime.engines import tensorrt_engine
from worldvln_edge.runtime.engines.cuda_graph_cache import MOST_SHAPES
from worldvln_edge.runtime.engines.device_memory import DeviceMemoryError
from worldvln_edge.runtime.engines.device_tensor import DeviceTensor
from worldvln_edge.runtime.engines.engine import EngineError, to_host
from worldvln_edge.runtime.engines.engine_signature import EngineShapeError
from worldvln_edge.runtime.engines.tensorrt_engine import TensorRTEngine
from worldvln_edge.runtime.engines.tensorrt_library import TensorRTLog, load_tensorrt, tensor_dtype, tensorrt_log


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Put a fake package in the place of `tensorrt`."""

    def put(package) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", package)
        tensorrt_log.cache_clear()

    yield put
    tensorrt_log.cache_clear()


@pytest.fixture
def make_engine(install):
    def make(memory: FakeMemory, fake: FakeEngine | None = None, **options) -> tuple[TensorRTEngine, FakeEngine]:
        fake = fake or FakeEngine(memory)
        install(fake_tensorrt(lambda data: fake))
        return TensorRTEngine(b"plan", graph="step", package="tensorrt", memory=memory, **options), fake

    return make


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
    memory = FakeMemory()
    engine, _ = make_engine(memory, FakeEngine(memory, is_portable))
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
    cache = {"key_0": np.zeros(CACHE, np.float32)}
    engine.run(call(2), cache)  # brings the whole cache once, so that nothing in it is undefined
    memory.bytes_in = memory.bytes_out = 0
    engine.run(call(2, start=1), cache)
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


def test_a_portable_engine_writes_new_entries_into_a_device_cache(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory, FakeEngine(memory, is_portable=True))
    cache = memory.allocate(int(np.prod(CACHE)) * 4)
    expected = memory.view(cache.address, np.float32, CACHE)
    expected[:] = 7
    expected = expected.copy()
    for seed, (rows, start) in enumerate([(2, 4), (4, 0), (2, 4), (2, 6)]):
        inputs = call(rows, start, seed)
        engine.run(inputs, {"key_0": cache})
        expected[:, :, start : start + rows] = inputs["x"]
        np.testing.assert_array_equal(memory.view(cache.address, np.float32, CACHE), expected)
    assert memory.bytes_out == 10 * 3 * 4  # of the results; no cache entries


def test_results_that_are_not_fetched_stay_on_the_device_until_they_are_dropped(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    cache = {"key_0": memory.allocate(int(np.prod(CACHE)) * 4)}
    engine.run(call(2), cache, fetch=())
    before, memory.bytes_out = memory.alive["buffer"], 0
    first, second = (engine.run(call(2, seed=seed), cache, fetch=()) for seed in (1, 2))
    assert memory.alive["buffer"] == before + 2
    assert memory.bytes_out == 0
    for seed, results in ((1, first), (2, second)):
        np.testing.assert_array_equal(to_host(results["doubled"]), 2 * call(2, seed=seed)["x"])
    first.clear()
    second.clear()
    assert memory.alive["buffer"] == before


@pytest.mark.parametrize("large_bytes", [1, 1 << 30])
def test_an_engine_reads_what_another_one_kept_without_a_way_over_the_host(
    make_engine, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    monkeypatch.setattr(tensorrt_engine, "_LARGE_BYTES", large_bytes)
    memory = FakeMemory()
    engine, fake = make_engine(memory)
    cache = {"key_0": memory.allocate(int(np.prod(CACHE)) * 4)}
    for seed in range(4):
        inputs = call(2, seed=seed)
        kept = engine.run(inputs, cache, fetch=())["doubled"]
        memory.bytes_in = 0
        twice = engine.run(inputs | {"x": kept}, cache)["doubled"]
        assert memory.bytes_in == 16  # write_index and kv_length
        np.testing.assert_array_equal(twice, 4 * inputs["x"])
        np.testing.assert_array_equal(engine.run(inputs, cache)["doubled"], 2 * inputs["x"])
        np.testing.assert_array_equal(kept.numpy(), 2 * inputs["x"])
    # An address that changes from call to call is none for a graph.
    assert (memory.captures > 0) == (large_bytes > 1)
    reads_in_place = any(context.addresses["x"] == kept.span.address for context in fake.alive_contexts)
    assert reads_in_place == (large_bytes == 1)


def test_what_another_device_kept_goes_over_the_host(make_engine) -> None:
    memory, other = FakeMemory(), FakeMemory()
    engine, _ = make_engine(memory)
    buffer = other.allocate(2 * 3 * 4)
    inputs = call(2)
    other.copy_in(buffer, inputs["x"], other.stream())
    foreign = DeviceTensor(other, buffer, (2, 3), np.dtype(np.float32))
    outputs = engine.run(inputs | {"x": foreign}, {"key_0": np.zeros(CACHE, np.float32)})
    np.testing.assert_array_equal(outputs["doubled"], 2 * inputs["x"])
    assert other.bytes_out == foreign.nbytes


def test_a_kept_result_of_another_dtype_is_refused(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    kept = DeviceTensor(memory, memory.allocate(2 * 3 * 2), (2, 3), np.dtype(np.float16))
    with pytest.raises(EngineError, match="x is float16, float32 is expected"):
        engine.run(call(2) | {"x": kept}, {"key_0": np.zeros(CACHE, np.float32)})


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
    assert {context.profile for context in fake.alive_contexts} == {0, 1}


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


def fly_shapes(engine: TensorRTEngine, rows: range) -> None:
    for count in rows:
        for turn in range(3):
            inputs = {"x": np.full((count, 3), turn, np.float32), "write_index": np.array([0])}
            outputs = engine.run(inputs | {"kv_length": np.array([1])}, {"key_0": np.zeros(CACHE, np.float32)})
            assert (outputs["doubled"] == 2 * turn).all()


def wide_engine(memory: FakeMemory) -> FakeEngine:
    return FakeEngine(memory, profiles=(((1, 3), (200, 3), (200, 3)),))


def test_two_hundred_shapes_keep_few_contexts_and_closing_leaves_nothing(make_engine) -> None:
    memory = FakeMemory()
    engine, fake = make_engine(memory, wide_engine(memory))
    fly_shapes(engine, range(200, 0, -1))
    gc.collect()
    assert memory.captures == 200
    assert memory.alive["graph"] == len(fake.alive_contexts) == MOST_SHAPES
    engine.close()
    gc.collect()
    assert memory.left_behind() == {}
    assert len(fake.alive_contexts) == 0


def test_buffers_that_grow_free_the_graphs_that_used_them(make_engine) -> None:
    memory = FakeMemory()
    engine, fake = make_engine(memory, wide_engine(memory))
    fly_shapes(engine, range(1, 201))
    gc.collect()
    assert memory.alive["graph"] == len(fake.alive_contexts) == 1
    engine.close()
    assert memory.left_behind() == {}


def test_closing_twice_does_no_harm_and_a_closed_engine_says_so(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    engine.run(call(2), {"key_0": np.zeros(CACHE, np.float32)})
    engine.close()
    engine.close()
    assert memory.left_behind() == {}
    with pytest.raises(EngineError, match="engine of step: it was closed; load it again"):
        engine.run(call(2), {"key_0": np.zeros(CACHE, np.float32)})


def test_an_engine_whose_constructor_fails_leaves_nothing(make_engine) -> None:
    memory = FakeMemory()
    odd = FakeEngine(memory)
    odd.get_tensor_dtype = lambda name: "FLOAT4"
    with pytest.raises(EngineError, match="cannot be passed in or out"):
        make_engine(memory, odd)
    assert memory.left_behind() == {}


def test_a_device_that_runs_full_leaves_nothing_after_closing(make_engine) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    memory.most_buffers = 3
    with pytest.raises(DeviceMemoryError, match="OUT_OF_MEMORY"):
        engine.run(call(2), {"key_0": np.zeros(CACHE, np.float32)})
    engine.close()
    assert memory.left_behind() == {}


@pytest.mark.parametrize("where", ["begin", "end", "run"])
def test_a_capture_that_fails_is_said_once_and_never_tried_again(make_engine, caplog, where: str) -> None:
    memory = FakeMemory()
    memory.refuses_captures = where
    engine, fake = make_engine(memory, FakeEngine(memory, on_run=lambda: memory.captured is None))
    cache = np.zeros(CACHE, np.float32)
    with caplog.at_level(logging.WARNING):
        for rows in (2, 2, 2, 4, 2, 2, 2):  # bigger buffers: the shape is bound again
            inputs = call(rows)
            np.testing.assert_array_equal(engine.run(inputs, {"key_0": cache})["doubled"], 2 * inputs["x"])
    assert memory.tried_captures == 1
    assert memory.captured is None
    assert memory.launches == memory.alive["graph"] == 0
    (said,) = [record.message for record in caplog.records if "no CUDA graph" in record.message]
    assert said.startswith("engine of step: no CUDA graph for (('kv_length', (1,)),")
    engine.close()
    gc.collect()
    assert memory.left_behind() == {}
    assert len(fake.alive_contexts) == 0


def test_a_capture_that_an_error_ends_leaves_the_stream_usable(make_engine) -> None:
    memory = FakeMemory()
    engine, fake = make_engine(memory)
    cache = {"key_0": np.zeros(CACHE, np.float32)}
    engine.run(call(2), cache)

    def fall_off() -> bool:
        raise DeviceMemoryError("the device fell off")

    fake.on_run = fall_off
    with pytest.raises(DeviceMemoryError, match="the device fell off"):
        engine.run(call(2), cache)
    fake.on_run = lambda: True
    assert memory.captured is None
    assert memory.alive["graph"] == 0
    for seed in range(3):
        inputs = call(2, seed=seed)
        np.testing.assert_array_equal(engine.run(inputs, cache)["doubled"], 2 * inputs["x"])


def test_a_context_that_cannot_be_captured_is_not_captured(make_engine, caplog) -> None:
    memory = FakeMemory()
    engine, _ = make_engine(memory)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("fake_tensorrt.FakeContext.is_stream_capturable", lambda self, stream: False, raising=False)
        for seed in range(3):
            engine.run(call(2, seed=seed), {"key_0": np.zeros(CACHE, np.float32)})
    assert memory.tried_captures == 0
    assert "TensorRT says that it cannot be captured" in caplog.text


def test_an_error_is_that_of_this_call_and_not_of_an_earlier_one(make_engine) -> None:
    memory = FakeMemory()
    engine, fake = make_engine(memory)
    log = tensorrt_log("tensorrt")
    log.logger.log(1, "something else broke long ago")
    fake.on_run = lambda: False
    with pytest.raises(EngineError, match=r"the run failed \(it gave no reason\)"):
        engine.run(call(2), {"key_0": np.zeros(CACHE, np.float32)})

    def complain() -> bool:
        log.logger.log(1, "out of\n resources")
        return False

    fake.on_run = complain
    with pytest.raises(EngineError, match=r"the run failed \(out of resources\)"):
        engine.run(call(2), {"key_0": np.zeros(CACHE, np.float32)})


def test_a_log_keeps_what_is_said_inside_a_capture_only() -> None:
    log = TensorRTLog("tensorrt")
    log.add(1, "before")
    with log.capture() as outer:
        log.add(3, "note")
        with log.capture() as inner:
            log.add(1, "inside")
        log.add(2, "behind")
    log.add(1, "after")
    assert inner.messages == [(1, "inside")]
    assert outer.messages == [(3, "note"), (1, "inside"), (2, "behind")]
    assert outer.first_error() == "inside"


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


def test_an_engine_that_does_not_load_says_why(install) -> None:
    messages = ((3, "loading"), (1, "The engine plan file is\n not compatible"))
    install(fake_tensorrt(lambda data: None, messages))
    memory = FakeMemory("sm87")
    with pytest.raises(
        EngineError, match=r"cannot load it on sm87 \(The engine plan file is not compatible\); build it"
    ):
        TensorRTEngine(b"plan", graph="step", package="tensorrt", memory=memory)
    assert memory.left_behind() == {}


def test_unknown_and_missing_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="unknown TensorRT package 'trt'; choose one of tensorrt, tensorrt_rtx"):
        load_tensorrt("trt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match="tensorrt_rtx does not load here"):
        load_tensorrt("tensorrt_rtx")


def test_a_real_engine_reaches_the_driver(tmp_path: Path) -> None:
    """Checks of version, GPU and hash pass, then the real package loads the file, or names the missing driver."""
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    from engine_bundles import embed_bundle

    from worldvln_edge.export.tensorrt_build import build_engines, parse_targets
    from worldvln_edge.runtime.worldvln.graphs import ACTION_ADAPTER

    folder = embed_bundle(tmp_path / "bundle")
    build_engines(folder, parse_targets("sm89"), graphs=[ACTION_ADAPTER])
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=f"here is tensorrt_rtx {trt.__version__} on sm120; run `worldvln-edge build"):
        TensorRTEngine.load(bundle, ACTION_ADAPTER, package="tensorrt_rtx", memory=FakeMemory("sm120"))
    with pytest.raises(EngineError, match=r"tensorrt_rtx .* cannot load it on sm89 \(.*CUDA.*\); build it again"):
        TensorRTEngine.load(bundle, ACTION_ADAPTER, package="tensorrt_rtx", memory=FakeMemory("sm89"))
    entry = bundle.manifest.engines[0]
    wrong = OutputParity(output="tokens", measure="max_abs", error=0.5, bound=0.01, within=False, shape="its shape")
    parity = EngineParity(within=False, reference="onnxruntime", shapes=1, outputs=(wrong,))
    failed = msgspec.structs.replace(bundle.manifest, engines=(msgspec.structs.replace(entry, parity=parity),))
    with pytest.raises(EngineError, match=r"the graph does \(tokens max_abs 0.5 > 0.01 at its shape\); build it again"):
        TensorRTEngine.load(Bundle(folder, failed), ACTION_ADAPTER, package="tensorrt_rtx", memory=FakeMemory("sm89"))
    path = folder / entry.file
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
