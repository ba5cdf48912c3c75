"""Quantised weights against numpy, folded scales against PyTorch, and quantised graphs on ONNX Runtime."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from small_models import random_frames, save_random_checkpoint, tiny_config

from worldvln_edge.config import ModelConfig
from worldvln_edge.export.calibrate import collect
from worldvln_edge.export.calibration import Calibration, CalibrationError
from worldvln_edge.export.channel_scales import ChannelScales
from worldvln_edge.export.exporter import WEIGHTS_PROPERTY, export_graphs
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.low_bits import block_size, int4_blocks, pack_int4, per_channel, rows_of, stored_scales
from worldvln_edge.export.planned_tensor import CastReports
from worldvln_edge.export.precision import Precision, PrecisionError
from worldvln_edge.export.quantise import quantise_graph
from worldvln_edge.models.checkpoint_source import CheckpointSource, load_source, open_any
from worldvln_edge.models.worldvln import Checkpoint
from worldvln_edge.runtime.engines.engine import OnnxEngine

NANO = Path(__file__).parents[2] / "worldvln_edge" / "checkpoints" / "nano"
STEP = "world_model_step"


def config() -> ModelConfig:
    tiny = tiny_config()
    # Widths that blocks of 32 divide, value heads that are shared, and biases.
    world = msgspec.structs.replace(tiny.world_model, width=64, intermediate=96, qkvo_bias=True)
    return msgspec.structs.replace(tiny, world_model=world)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    save_random_checkpoint(folder, config())
    return open_any(folder)


@pytest.fixture(scope="module")
def checkpoint(source: CheckpointSource) -> Checkpoint:
    return load_source(source)


@pytest.fixture(scope="module")
def calibration(source: CheckpointSource) -> Calibration:
    frames = np.stack(random_frames(source.config, source.config.horizon.num_frames))
    flights = [(frames, "fly forward 5 m")]
    return collect(source, flights, frames_from="smooth frames")


@pytest.fixture(scope="module")
def exported(
    source: CheckpointSource,
    calibration: Calibration,
    tracer: GraphTracer,
    tmp_path_factory: pytest.TempPathFactory,
):
    """Precision -> folder with its step graph, each written once."""
    made: dict[Precision, Path] = {}

    def export(precision: Precision) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("graphs")
            entries = export_graphs(
                source,
                made[precision],
                run="test",
                precision=precision,
                kv="inplace",
                calibration=calibration,
                reports=CastReports(),
                tracer=tracer,
                names=(STEP,),
            )
            assert entries[STEP].precision == precision.name
        return made[precision]

    return export


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int4_blocks_equal_the_oracle(dtype: torch.dtype):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[2, 32:64] = 0
    codes, raw = int4_blocks(rows_of(weight), (6, 96), 32, dtype)
    blocks = weight.numpy().reshape(6, 3, 32)
    largest = np.abs(blocks).max(-1)
    scales = np.where(largest > 0, largest / np.float32(7), 1).astype(np.float32)
    np.testing.assert_array_equal(raw.numpy(), scales)
    rounded = torch.from_numpy(scales).to(dtype).float().numpy()
    expected = np.clip(np.rint(blocks / rounded[..., None]), -8, 7)
    np.testing.assert_array_equal(codes.numpy().reshape(6, 3, 32), expected)
    error = np.abs(expected * rounded[..., None] - blocks)
    assert (error <= rounded[..., None] * 0.51).all()


def test_packing_puts_the_low_half_first():
    packed = pack_int4(torch.tensor([1, -1, 7, -8, 3], dtype=torch.int8))
    assert packed.tolist() == [0xF1, 0x87, 0x03]
    values = np.arange(-8, 8)
    want = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [4, 4], values).raw_data or bytes(
        onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [4, 4], values).int32_data
    )
    assert bytes(pack_int4(torch.from_numpy(values).to(torch.int8)).numpy()) == want


@pytest.mark.parametrize(("dtype", "largest", "share"), [(torch.int8, 127, 0.51), (torch.float8_e4m3fn, 448, 16.1)])
def test_channel_codes_lie_within_half_a_step(dtype: torch.dtype, largest: int, share: float):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    codes, raw = per_channel(rows_of(weight), (5, 40), dtype, torch.float16)
    np.testing.assert_allclose(raw, weight.abs().amax(1) / largest, rtol=1e-6)
    scales = stored_scales(raw, torch.float16).float()[:, None]
    assert ((codes.float() * scales - weight).abs() <= share * scales).all()
    assert torch.isfinite(codes.float()).all()


def test_scales_below_the_smallest_half_stay_above_zero():
    assert float(stored_scales(torch.tensor(1e-12), torch.float16)) > 0


def test_the_largest_block_that_divides_is_taken():
    assert block_size("w", 192, 128) == 64
    assert block_size("w", 4096, 128) == 128
    with pytest.raises(PrecisionError, match="w reads 48 channels"):
        block_size("w", 48, 128)


def test_folded_scales_leave_the_blocks_as_they_are(
    source: CheckpointSource, checkpoint: Checkpoint, calibration: Calibration
):
    scales = ChannelScales(calibration, 32, torch.float32)
    folded = load_source(source).model.world_model
    moved = 0.0
    for name, parameter in folded.named_parameters():
        key = f"world_model.{name}"
        if not name.startswith("block"):
            continue
        linear = ChannelScales.linear_behind(key)
        if linear is not None:
            parameter.data /= scales.of_inputs(linear, source.tensor)
        elif name.endswith("_proj.weight"):
            columns = scales.of_inputs(key, source.tensor)
            moved = max(moved, float((columns - 1).abs().max()))
            parameter.data *= columns
        if name.endswith(("up_proj.weight", "v_proj.weight", "v_proj.bias")):
            rows = scales.of_outputs(key, source.tensor)
            assert rows is not None
            parameter.data /= rows.view(-1, *[1] * (parameter.ndim - 1))
    assert moved > 0.1
    x = torch.randn(2, 7, source.config.world_model.width)
    rope = torch.nn.functional.normalize(torch.randn(2, 7, source.config.world_model.head_dim // 2), dim=0)
    with torch.no_grad():
        expected, _ = checkpoint.model.world_model.forward_blocks(x, rope)
        found, _ = folded.forward_blocks(x, rope)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_awq_is_never_worse_than_rounding_to_nearest_on_the_shipped_model():
    source = open_any(NANO)
    frames = np.stack(random_frames(source.config, source.config.horizon.num_frames))
    calibration = collect(source, [(frames, "fly forward 6 meters")], frames_from="frames")
    scales = ChannelScales(calibration, 64, torch.float16)
    better = total = 0
    for key in [k for k in source.infos if Precision(name="int4").quantised(k)]:
        weight = source.tensor(key).float()
        moments = calibration.of(key, weight.shape[1]).mean_square
        columns = scales.of_inputs(key, source.tensor)
        plain = _cost(weight, None, None, moments)
        scaled = _cost(weight, columns, scales.importance(key, source.tensor), moments)
        better, total = better + (scaled <= plain), total + 1
    assert total == 7 * source.config.world_model.depth
    assert better == total


def _cost(weight: torch.Tensor, columns, importance, moments: torch.Tensor) -> float:
    codes, raw = int4_blocks(rows_of(weight, columns), tuple(weight.shape), 64, torch.float16, importance)
    values = codes.float() * stored_scales(raw, torch.float16).float().repeat_interleave(64, 1)
    values = values if columns is None else values / columns
    return float(((values - weight).square() * moments).sum())


def _step(folder: Path, config: ModelConfig) -> np.ndarray:
    """Probabilities of one step over an empty cache."""
    world, rng = config.world_model, np.random.default_rng(0)
    frames, (h, w) = 2, config.schedule.latent_hw
    bits, tokens = world.semantic_bits + world.detail_bits, frames * h * w
    angles = rng.normal(size=(frames, h, w, world.head_dim // 2))
    graph = onnx.load(folder / f"{STEP}.onnx", load_external_data=False).graph
    caches = {}
    for value in graph.input:
        if value.name.startswith("past_"):
            kind = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            caches[value.name.removeprefix("past_")] = np.zeros([d.dim_value or 2 for d in kind.shape.dim], dtype)
    shape = (frames, h, w, bits)
    inputs = {
        "codes": rng.choice([-0.3, 0.3], size=(1, world.latent_channels, frames, h, w)),
        "area_h": np.eye(h),
        "area_w": np.eye(w),
        "up_channels": rng.normal(size=(world.latent_channels, bits)),
        "up_h": np.eye(h),
        "up_w": np.eye(w),
        "bit_mask": np.ones(bits),
        "code_value": np.array(0.25),
        "inverse_tau": np.array(1.0),
        "guidance": np.array(1.0),
        "uniforms": rng.random(shape),
        "forced_bits": np.zeros(shape),
        "force": np.array(0.0),
        "rope": np.stack((np.cos(angles), np.sin(angles))),
    }
    inputs = {name: array.astype(np.float32) for name, array in inputs.items()}
    inputs |= {"write_index": np.zeros(2, np.int64), "kv_length": np.full(2, tokens)}
    return OnnxEngine(folder / f"{STEP}.onnx", threads=1).run(inputs, caches)["probabilities"]


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        (Precision(name="int4", int4_method="rtn", compute="fp32", block=32), 0.13),
        (Precision(name="int4", compute="fp32", block=32), 0.12),
        (Precision(name="int8", compute="fp32"), 0.03),
        (Precision(name="int8"), 0.03),
    ],
    ids=["int4-rtn", "int4-awq", "int8", "int8-fp16"],
)
def test_quantised_step_runs_and_stays_near_fp32(exported, precision: Precision, bound: float):
    """Bounds on the mean distance of probabilities: random weights with guidance are hard to quantise."""
    expected = _step(exported(Precision(name="fp32")), config())
    found = _step(exported(precision), config())
    assert np.isfinite(found).all()
    assert 0 < np.abs(found - expected).mean() < bound


def test_stored_int4_weights_equal_the_checkpoint_to_half_a_step(exported, source: CheckpointSource):
    folder = exported(Precision(name="int4", int4_method="rtn", compute="fp32", block=32))
    stored = _stored(folder)
    for name in ("attn.v_proj", "mlp.down_proj"):
        key = f"world_model.block_chunks.0.module.0.{name}.weight"
        codes = stored[f"{key}|codes"].astype(np.float32)
        scales = np.repeat(stored[f"{key}|scales"], 32, axis=0)
        weight = source.tensor(key).float().numpy().T
        assert codes.shape == weight.shape
        assert (np.abs(codes * scales - weight) <= 0.501 * scales).all()
    graph = onnx.load(folder / f"{STEP}.onnx", load_external_data=False).graph
    restored = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert len(restored) == 7 * source.config.world_model.depth


def _stored(folder: Path) -> dict[str, np.ndarray]:
    """Weights of an exported graph by checkpoint key, of quantised ones `key|codes` and `key|scales`."""
    model = onnx.load(folder / f"{STEP}.onnx")
    origins = json.loads(next(p.value for p in model.metadata_props if p.key == WEIGHTS_PROPERTY))
    found = {}
    for tensor in model.graph.initializer:
        key, _, kind = origins.get(tensor.name, "").partition("|")
        part = kind.rpartition(".")[2]
        found[f"{key}|{part}" if part in ("codes", "scales") else key] = onnx.numpy_helper.to_array(tensor)
    return found


def test_exported_awq_folds_every_scale_into_the_tensor_in_front(
    exported, source: CheckpointSource, calibration: Calibration
):
    precision = Precision(name="int4", compute="fp32", block=32)
    stored = _stored(exported(precision))
    scales = ChannelScales(calibration, 32, torch.float32)
    prefix = "world_model.block_chunks.0.module.0."

    def found(name: str) -> np.ndarray:
        return stored[prefix + name]

    def inputs(name: str) -> np.ndarray:
        return scales.of_inputs(f"{prefix}{name}.weight", source.tensor).numpy()

    def original(name: str) -> np.ndarray:
        return source.tensor(prefix + name).float().numpy()

    attention, feed = "input_layernorm.weight", "post_attention_layernorm.weight"
    np.testing.assert_allclose(found(attention) * inputs("attn.q_proj"), original(attention), rtol=1e-5)
    np.testing.assert_allclose(found(feed) * inputs("mlp.gate_proj"), original(feed), rtol=1e-5)
    head_dim, kv_heads = source.config.world_model.head_dim, source.config.world_model.kv_heads
    mixed = inputs("attn.o_proj").reshape(kv_heads, -1, head_dim)
    assert np.ptp(mixed, axis=1).max() == 0  # heads that share values share scales
    rows = {"attn.v_proj": mixed[:, 0].reshape(-1), "mlp.up_proj": inputs("mlp.down_proj")}
    np.testing.assert_allclose(
        found("attn.v_proj.bias") * rows["attn.v_proj"], original("attn.v_proj.bias"), atol=1e-6, rtol=1e-5
    )
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        codes = found(f"{name}.weight|codes").astype(np.float32)
        restored = codes * np.repeat(found(f"{name}.weight|scales"), 32, axis=0)
        undone = restored / inputs(name)[:, None] * rows.get(name, np.ones(codes.shape[1]))
        weight = original(f"{name}.weight").T
        assert np.sqrt(np.mean((undone - weight) ** 2)) < 0.15 * weight.std()


def test_missing_or_foreign_calibration_is_refused(exported, calibration: Calibration, source: CheckpointSource):
    def attempt(found: Calibration | None) -> None:
        export_graphs(
            source,
            Path("/nonexistent"),
            run="test",
            precision=Precision(name="int8"),
            kv="inplace",
            calibration=found,
            reports=CastReports(),
            names=(STEP,),
        )

    with pytest.raises(CalibrationError, match="no statistics of world_model"):
        attempt(replace(calibration, inputs={}))
    with pytest.raises(PrecisionError, match="needs the ranges of activations"):
        quantise_graph(None, Precision(name="int8"), None, CastReports())  # type: ignore[arg-type]
