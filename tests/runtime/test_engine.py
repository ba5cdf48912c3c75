"""An engine runs what it is given, whatever its memory layout, and writes caches in place."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeMemory

from worldvln_edge.bundle import Bundle, BundleError
from worldvln_edge.runtime.engines.backends import kv_shape
from worldvln_edge.runtime.engines.device_kv_memory import DeviceKVMemory
from worldvln_edge.runtime.engines.engine import EngineError, OnnxEngine, to_host
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy


def test_layout_of_the_inputs_does_not_matter(tiny_bundle: Path):
    engine = OnnxEngine(Bundle.open(tiny_bundle).graph_path(graphs.LATENT_EMBED), threads=1)
    latents = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    expected = engine.run({"latents": latents})["embeds"]
    turned = np.asfortranarray(latents)
    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(engine.run({"latents": turned})["embeds"], expected)
    np.testing.assert_array_equal(engine.run({"latents": latents[:, ::-1]})["embeds"], expected[:, ::-1])


def test_results_survive_the_next_run(tiny_bundle: Path):
    engine = OnnxEngine(Bundle.open(tiny_bundle).graph_path(graphs.LATENT_EMBED), threads=1)
    first = engine.run({"latents": np.ones((2, 5, 16), np.float32)})["embeds"]
    copy = first.copy()
    engine.run({"latents": np.zeros((2, 5, 16), np.float32)})
    np.testing.assert_array_equal(first, copy)


def test_results_that_are_not_fetched_are_kept_apart_and_read_by_other_engines(tiny_bundle: Path):
    bundle, codes = Bundle.open(tiny_bundle), np.ones((1, 16, 1, 2, 3), np.float32)
    decoder, adapter = (
        OnnxEngine(bundle.graph_path(name), threads=1) for name in ("vae_decoder_first", graphs.ACTION_ADAPTER)
    )
    whole, kept = decoder.run({"codes": codes}), decoder.run({"codes": codes}, fetch=("next_state_0",))
    decoder.run({"codes": 2 * codes}, fetch=())
    assert isinstance(kept["next_state_0"], np.ndarray)
    assert not isinstance(kept["features"], np.ndarray)
    np.testing.assert_array_equal(to_host(kept["features"]), whole["features"])
    found, expected = (adapter.run({"features": results["features"]})["tokens"] for results in (kept, whole))
    np.testing.assert_array_equal(found, expected)


def test_caches_at_an_address_are_written_where_they_are(tiny_bundle: Path):
    policy, device = load_policy(tiny_bundle, threads=1), FakeMemory()
    kv_memory, model = DeviceKVMemory(device, kv_shape(policy.manifest)), policy.config.world_model
    inputs = {
        "embeds": np.random.default_rng(0).normal(size=(2, 3, model.width)).astype(np.float32),
        "rope": np.ones((2, 3, model.head_dim // 2), np.float32),
        "write_index": np.full(2, 4, np.int64),
        "kv_length": np.full(2, 7, np.int64),
    }
    stems, engine = graphs.cache_stems(model.depth), policy.engines[graphs.WORLD_MODEL_CONTEXT]
    for memory in (kv_memory, policy.workspace.memory):
        assert engine.run(inputs, dict(zip(stems, memory.buffers(2), strict=True))) == {}
    for cache, expected in zip(kv_memory.buffers(2), policy.workspace.memory.buffers(2), strict=True):
        found = device.view(cache.address, cache.dtype, cache.shape)
        np.testing.assert_array_equal(found, expected)
        assert found[:, :, 4:7].any()


def test_context_writes_only_its_own_entries(tiny_bundle: Path):
    policy = load_policy(tiny_bundle, threads=1)
    model = policy.config.world_model
    memory = policy.workspace.memory
    memory.array[:] = 7
    stems = graphs.cache_stems(model.depth)
    outputs = policy.engines[graphs.WORLD_MODEL_CONTEXT].run(
        {
            "embeds": np.ones((2, 3, model.width), np.float32),
            "rope": np.ones((2, 3, model.head_dim // 2), np.float32),
            "write_index": np.full(2, 4, np.int64),
            "kv_length": np.full(2, 7, np.int64),
        },
        dict(zip(stems, memory.buffers(2), strict=True)),
    )
    assert outputs == {}
    assert (memory.array[..., :4, :] == 7).all()
    assert (memory.array[..., 7:, :] == 7).all()
    assert not (memory.array[..., 4:7, :] == 7).any()


def test_a_file_that_is_no_graph_is_named(tmp_path: Path):
    (tmp_path / "odd.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"odd\.onnx: ONNX Runtime .* cannot load it .*export the bundle again"):
        OnnxEngine(tmp_path / "odd.onnx")


def test_a_corrupt_bundle_does_not_reach_the_engine(tiny_bundle: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    data = bytearray((folder / "weights.bin").read_bytes())
    data[100] ^= 1
    (folder / "weights.bin").write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin is corrupt"):
        load_policy(folder)
