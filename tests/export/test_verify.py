"""`verify`: a faithful bundle of every precision passes, a wrong one does not, and the command says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from broken_bundles import change_graph, copy_one_block_scale, flip_bit, rehash
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from small_models import random_frames, save_random_checkpoint, tiny_config

from worldvln_edge.bundle import Bundle, write_manifest
from worldvln_edge.cli import main
from worldvln_edge.config import ModelConfig
from worldvln_edge.export.calibrate import Flight, collect
from worldvln_edge.export.calibration import Calibration
from worldvln_edge.export.exporter import WEIGHTS_PROPERTY, export_bundle
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.parity_flights import FlightsError, packaged_flights
from worldvln_edge.export.precision import Precision
from worldvln_edge.export.verify import ParityReport, VerifyError, record_parity, verify_bundle
from worldvln_edge.images import transform
from worldvln_edge.models.checkpoint_source import CheckpointSource, open_any

UNRUN_STAGES = ["contents", "structure", "weights", "input_scales"]
STAGES = [
    *UNRUN_STAGES,
    "text_encoder",
    "vae_encoder",
    "quantiser",
    "world_model",
    "vae_decoder",
    "vae_pixels",
    "action_head",
    "rgb_head",
    "actions",
    "flight",
    "precision_cost",
]


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path) -> CheckpointSource:
    return open_any(tiny_checkpoint)


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def failed_stages(
    bundle: Path, source: CheckpointSource, *, run: bool = True, calibration: Calibration | None = None
) -> list[str]:
    report = verify_bundle(bundle, source, count=1, run=run, calibration=calibration)
    assert (report.result == "failed") == any(row.failures for row in report.rows)
    return [row.stage for row in report.rows if row.failures]


def test_faithful_bundle_passes_every_stage(tiny_bundle: Path, source: CheckpointSource):
    report = verify_bundle(tiny_bundle, source, count=2, seed=5)
    assert [row.stage for row in report.rows] == STAGES
    assert [row.failures for row in report.rows] == [[]] * len(STAGES)
    assert report.result == "passed"
    assert report.engine.startswith("onnxruntime ")
    by_stage = {row.stage: row.values for row in report.rows}
    assert by_stage["actions"]["action_cm"] < 1e-2
    assert by_stage["quantiser"]["bits_equal"] == 1.0
    assert by_stage["weights"]["tensors"] > 100


def test_one_wrong_weight_is_found_by_its_stage_and_by_name(own_bundle: Path, source: CheckpointSource):
    flip_bit(own_bundle, "action_head", "", byte=3, mask=0x40)  # exponent of a float32
    report = verify_bundle(own_bundle, source, count=1)
    failed = {row.stage: row.failures for row in report.rows if row.failures}
    assert set(failed) >= {"weights", "action_head", "actions"}
    assert "1 of " in failed["weights"][0]


def test_weight_that_activations_hide_is_found(own_bundle: Path, source: CheckpointSource):
    flip_bit(own_bundle, "action_head", "", byte=0, mask=0x01)  # last bit of a float32
    assert failed_stages(own_bundle, source) == ["weights"]


def test_swapped_cache_is_found(own_bundle: Path, source: CheckpointSource):
    def swap(model: onnx.ModelProto) -> None:
        names = {"past_key_0": "past_value_0", "past_value_0": "past_key_0"}
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = names.get(name, name)

    change_graph(own_bundle, "world_model_step", swap)
    assert "world_model" in failed_stages(own_bundle, source)


def test_transposed_binding_is_found(own_bundle: Path, source: CheckpointSource):
    def turn(model: onnx.ModelProto) -> None:
        origins = json.loads({e.key: e.value for e in model.metadata_props}[WEIGHTS_PROPERTY])
        name = next(name for name, origin in origins.items() if "attn.q_proj.weight" in origin)
        index, node = next((i, n) for i, n in enumerate(model.graph.node) if name in n.input)
        node.input[list(node.input).index(name)] = "turned"
        model.graph.node.insert(index, helper.make_node("Transpose", [name], ["turned"], perm=[1, 0]))

    change_graph(own_bundle, "world_model_step", turn)
    failed = failed_stages(own_bundle, source)
    assert "world_model" in failed
    assert "weights" not in failed


def test_wrong_tokenizer_is_found(own_bundle: Path, source: CheckpointSource):
    path = own_bundle / "tokenizer.json"
    path.write_text(path.read_text().replace('"red"', '"rod"'))
    rehash(own_bundle, "tokenizer.json")
    assert "contents" in failed_stages(own_bundle, source)


@pytest.mark.parametrize("head", ["latent_head_stats", "rgb_head_stats"])
def test_wrong_label_statistics_are_found(own_bundle: Path, source: CheckpointSource, head: str):
    manifest = Bundle.open(own_bundle).manifest
    stats = msgspec.structs.replace(getattr(manifest, head), std_t=(9.0, 9.0, 9.0))
    write_manifest(own_bundle, msgspec.structs.replace(manifest, **{head: stats}))
    failed = failed_stages(own_bundle, source)
    assert failed[0] == "contents"
    assert ("actions" in failed) == (head == "latent_head_stats")


@pytest.mark.parametrize(
    ("field", "value"), [("guidance_rows", 1), ("kv_capacity", 7), ("model", tiny_config(name="x"))]
)
def test_other_configuration_is_found_and_not_flown(
    own_bundle: Path, source: CheckpointSource, field: str, value: object
):
    manifest = Bundle.open(own_bundle).manifest
    write_manifest(own_bundle, msgspec.structs.replace(manifest, **{field: value}))
    report = verify_bundle(own_bundle, source)
    assert [row.stage for row in report.rows] == UNRUN_STAGES
    assert report.rows[0].failures
    assert report.result == "failed"


def test_graph_that_is_not_onnx_is_found_and_not_flown(own_bundle: Path, source: CheckpointSource):
    def break_type(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "NoSuchOperator"

    change_graph(own_bundle, "latent_embed", break_type)
    report = verify_bundle(own_bundle, source)
    assert report.rows[1].failures[0].startswith("graph latent_embed: not valid ONNX")
    assert report.flights == 0


def test_graph_of_another_interface_than_the_manifest_says_is_found(own_bundle: Path, source: CheckpointSource):
    def retype(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32

    change_graph(own_bundle, "text_encoder", retype)
    assert "structure" in failed_stages(own_bundle, source, run=False)


def test_graph_that_does_not_name_its_weights_is_refused(own_bundle: Path, source: CheckpointSource):
    change_graph(own_bundle, "rgb_head", lambda model: model.metadata_props.clear())
    assert failed_stages(own_bundle, source, run=False) == ["weights"]


def test_another_checkpoint_is_refused(tiny_bundle: Path, tmp_path: Path):
    save_random_checkpoint(tmp_path / "other", tiny_config(), seed=99)
    with pytest.raises(VerifyError, match="made from a checkpoint with sha256"):
        verify_bundle(tiny_bundle, open_any(tmp_path / "other"))


def test_flight_that_treats_its_frames_differently_is_found(
    tiny_bundle: Path, source: CheckpointSource, monkeypatch: pytest.MonkeyPatch
):
    from worldvln_edge.runtime.worldvln import observed_frames

    monkeypatch.setattr(observed_frames, "transform", lambda frame, hw: -transform(frame, hw)[:, :, ::-1])
    assert failed_stages(tiny_bundle, source) == ["flight"]


# Precisions. int4 blocks hold at least 32 weights, so this model is a little wider than the tiny one.


def wide_config() -> ModelConfig:
    config = tiny_config()
    world = msgspec.structs.replace(config.world_model, width=64, intermediate=96)
    return msgspec.structs.replace(config, name="wide", world_model=world)


@pytest.fixture(scope="module")
def wide_source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    save_random_checkpoint(folder, wide_config())
    return open_any(folder)


@pytest.fixture(scope="module")
def calibration(wide_source: CheckpointSource) -> Calibration:
    config = wide_source.config
    flights: list[Flight] = [
        (np.stack(random_frames(config, config.horizon.num_frames, seed=seed)), "fly to the red tower")
        for seed in (1, 2)
    ]
    return collect(wide_source, flights, frames_from="test")


@pytest.fixture(scope="module")
def export_wide(
    wide_source: CheckpointSource,
    calibration: Calibration,
    tracer: GraphTracer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def export(name: str, kv: str = "inplace", **options: str) -> Path:
        if name in ("int8", "int4", "fp8"):  # quantised graphs of one compute dtype share a trace
            options = {"compute": "fp32", **options}
        label = f"{name}-{kv}-{'-'.join(options.values())}"
        if label not in made:
            made[label] = tmp_path_factory.mktemp("precisions") / label
            precision = Precision(name=name, block=32, **options)
            export_bundle(wide_source, made[label], precision=precision, kv=kv, calibration=calibration, tracer=tracer)
        return made[label]

    return export


@pytest.mark.parametrize(
    ("name", "kv", "options"),
    [
        ("fp16", "inplace", {}),
        ("int8", "inplace", {"compute": "fp16"}),
        ("int4", "inplace", {"compute": "fp16"}),
        ("fp16", "portable", {}),
        ("int8", "portable", {}),
        ("int4", "portable", {"compute": "fp16", "int4_method": "rtn"}),
    ],
)
@pytest.mark.slow
def test_every_precision_passes_in_both_flavours(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, name: str, kv: str, options: dict[str, str]
):
    report = verify_bundle(export_wide(name, kv, **options), wide_source, count=2)
    assert [row.stage for row in report.rows] == STAGES
    assert {row.stage: row.failures for row in report.rows if row.failures} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_precision_that_does_not_run_here_is_checked_and_says_so(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, name: str
):
    report = verify_bundle(export_wide(name), wide_source)
    assert [row.stage for row in report.rows] == UNRUN_STAGES
    assert [row.failures for row in report.rows] == [[]] * 4
    assert (report.result, report.engine, report.flights) == ("built, not run", "", 0)


@pytest.mark.parametrize(
    ("name", "tensor", "mask"),
    [
        pytest.param("fp16", "norm", 0x01, marks=pytest.mark.slow),
        ("int8", "down_proj", 0x04),
        ("int4", "down_proj", 0x04),
        ("int4", "up_proj", 0x04),
        ("int4", "o_proj", 0x04),
        ("int4", "q_proj", 0x04),
        ("int4", "input_layernorm", 0x40),
    ],
)
def test_one_wrong_value_of_a_low_precision_is_found(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, tmp_path: Path, name: str, tensor: str, mask: int
):
    bundle = Path(shutil.copytree(export_wide(name), tmp_path / "bundle"))
    flip_bit(bundle, "world_model_step", tensor, byte=3, mask=mask)
    assert failed_stages(bundle, wide_source, run=False) == ["weights"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_block_with_the_scale_of_another_is_found(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, tmp_path: Path, name: str
):
    bundle = Path(shutil.copytree(export_wide(name), tmp_path / "bundle"))
    copy_one_block_scale(bundle)
    assert failed_stages(bundle, wide_source, run=False) == ["weights"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_product_that_reads_the_scales_of_another_is_found_by_its_stage(
    export_wide: Callable[..., Path],
    wide_source: CheckpointSource,
    calibration: Calibration,
    tmp_path: Path,
    name: str,
):
    """Every stored weight is right, so only the comparison of activations can find it."""
    bundle = Path(shutil.copytree(export_wide(name), tmp_path / "bundle"))

    def swap(model: onnx.ModelProto) -> None:
        gate, up = (
            next(
                n
                for n in model.graph.node
                if n.op_type == "DequantizeLinear" and f"block_1.block.mlp.{part}_proj" in n.input[1]
            )
            for part in ("gate", "up")
        )
        gate.input[1], up.input[1] = up.input[1], gate.input[1]

    change_graph(bundle, "world_model_step", swap)
    failed = failed_stages(bundle, wide_source, calibration=calibration)
    assert "world_model" in failed
    assert "weights" not in failed


def scale_inputs(model: onnx.ModelProto, factor: float, *, every: bool) -> None:
    """Multiply the scale of one input; with `every` also of whatever else reads it."""
    scale = next(t for t in model.graph.initializer if t.name.endswith("0.mlp.down_proj.input_scale"))
    array = numpy_helper.to_array(scale)
    wrong = numpy_helper.from_array((array * factor).astype(array.dtype), scale.name if every else "wrong_scale")
    if every:
        scale.CopyFrom(wrong)
        return
    model.graph.initializer.append(wrong)
    next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and scale.name in n.input).input[1] = wrong.name


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_wrong_scale_of_one_input_is_found_with_the_calibration(
    export_wide: Callable[..., Path],
    wide_source: CheckpointSource,
    calibration: Calibration,
    tmp_path: Path,
    name: str,
):
    folder = export_wide(name)
    assert failed_stages(folder, wide_source, run=False, calibration=calibration) == []
    bundle = Path(shutil.copytree(folder, tmp_path / "bundle"))
    for graph in ("world_model_step", "world_model_context"):
        change_graph(bundle, graph, lambda model: scale_inputs(model, 1.002, every=True))
    assert failed_stages(bundle, wide_source, run=False) == []
    assert failed_stages(bundle, wide_source, run=False, calibration=calibration) == ["input_scales"]


def test_wrong_scale_of_one_input_is_found_without_the_calibration(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, calibration: Calibration, tmp_path: Path
):
    flights = [
        (np.stack(random_frames(wide_source.config, wide_source.config.horizon.num_frames, seed=3)), "climb to the red")
    ]
    faithful = verify_bundle(export_wide("int8"), wide_source, flights=flights, count=1)
    assert {row.stage: row.failures for row in faithful.rows if row.failures} == {}
    assert next(row for row in faithful.rows if row.stage == "input_scales").note == "with the flights"

    two = Path(shutil.copytree(export_wide("int8"), tmp_path / "two"))
    change_graph(two, "world_model_step", lambda model: scale_inputs(model, 1.002, every=False))
    assert failed_stages(two, wide_source, run=False) == ["input_scales"]

    far = Path(shutil.copytree(export_wide("int8"), tmp_path / "far"))
    for graph in ("world_model_step", "world_model_context"):
        change_graph(far, graph, lambda model: scale_inputs(model, 5.0, every=True))
    report = verify_bundle(far, wide_source, flights=flights, count=1)
    assert "input_scales" in [row.stage for row in report.rows if row.failures]


def test_input_that_is_not_rounded_is_found(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, calibration: Calibration, tmp_path: Path
):
    bundle = Path(shutil.copytree(export_wide("int8"), tmp_path / "bundle"))

    def skip(model: onnx.ModelProto) -> None:
        codes = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
        rounded = next(n for n in model.graph.node if codes.output[0] in n.input)
        product = next(n for n in model.graph.node if rounded.output[0] in n.input)
        product.input[0] = codes.input[0]

    change_graph(bundle, "world_model_step", skip)
    assert failed_stages(bundle, wide_source, run=False, calibration=calibration) == ["input_scales"]


def test_other_calibration_is_refused(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, calibration: Calibration
):
    config = wide_source.config
    frames = np.stack(random_frames(config, config.horizon.num_frames, seed=9))
    other = collect(wide_source, [(frames, "climb")], frames_from="other")
    with pytest.raises(VerifyError, match="made with the calibration with sha256"):
        verify_bundle(export_wide("int8"), wide_source, calibration=other, run=False)
    with pytest.raises(VerifyError, match="made without a calibration"):
        verify_bundle(export_wide("fp32"), wide_source, calibration=calibration, run=False)


# Frames and the command.


def test_packaged_flights_are_pictures_of_a_flight_each_with_its_instruction():
    flights = packaged_flights()
    assert len(flights) >= 8
    assert len({text for _, text in flights}) == len(flights)
    for frames, _ in flights:
        assert frames.shape == (49, 64, 64, 3)
        assert frames.dtype == np.uint8
        assert 0.1 < np.abs(np.diff(frames.astype(int), axis=0)).mean() < 40


def test_flight_that_is_too_short_is_refused(tiny_bundle: Path, source: CheckpointSource):
    with pytest.raises(FlightsError, match="5 frames given"):
        verify_bundle(tiny_bundle, source, flights=[(np.zeros((5, 32, 32, 3), np.uint8), "climb")])


def run_verify(bundle: Path, checkpoint: Path, *options: str):
    return CliRunner().invoke(main, ["verify", str(bundle), "--checkpoint", str(checkpoint), "--flights=1", *options])


def test_command_writes_table_and_result_into_the_manifest(own_bundle: Path, tiny_checkpoint: Path, tmp_path: Path):
    frames = np.stack(random_frames(tiny_config(), 20, hw=(40, 56)))
    np.save(tmp_path / "frames.npy", frames)
    result = run_verify(own_bundle, tiny_checkpoint, "--frames", str(tmp_path / "frames.npy"))
    assert result.exit_code == 0, result.output
    assert all(stage in result.stdout for stage in STAGES)
    manifest = Bundle.open(own_bundle).manifest
    assert list(manifest.parity) == STAGES
    assert manifest.parity["actions"]["action_cm"] < 1e-2
    assert manifest.parity_result is not None
    assert manifest.parity_result.result == "passed"
    assert "CPUExecutionProvider" in manifest.parity_result.engine
    assert "frames.npy" in manifest.parity_result.frames


def test_command_compares_input_scales_with_the_calibration_file(
    export_wide: Callable[..., Path], wide_source: CheckpointSource, calibration: Calibration, tmp_path: Path
):
    bundle = Path(shutil.copytree(export_wide("int8"), tmp_path / "bundle"))
    calibration.save(tmp_path / "calibration.safetensors")
    options = ("--no-run", "--calibration", str(tmp_path / "calibration.safetensors"))
    checkpoint = wide_source.tokenizer_file.parent
    result = run_verify(bundle, checkpoint, *options)
    assert result.exit_code == 0, result.output
    assert "with the calibration" in result.stdout
    change_graph(bundle, "world_model_step", lambda model: scale_inputs(model, 1.002, every=True))
    assert run_verify(bundle, checkpoint, *options).exit_code == 1


def test_command_flies_on_shards(own_bundle: Path, tiny_checkpoint: Path, tmp_path: Path):
    frames = np.stack(random_frames(tiny_config(), 13))
    np.savez(tmp_path / "flights-0000000-0001.npz", frames=frames[None], instructions=np.array(["climb"]))
    result = run_verify(own_bundle, tiny_checkpoint, "--shards", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["result"] == "passed"


def test_command_exits_with_1_when_out_of_bounds(own_bundle: Path, tiny_checkpoint: Path):
    manifest = Bundle.open(own_bundle).manifest
    stats = msgspec.structs.replace(manifest.latent_head_stats, std_t=(9.0, 9.0, 9.0))
    write_manifest(own_bundle, msgspec.structs.replace(manifest, latent_head_stats=stats))
    result = run_verify(own_bundle, tiny_checkpoint, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["result"] == "failed"
    assert found["stages"]["actions"]["failures"]
    assert not found["stages"]["action_head"]["failures"]
    recorded = Bundle.open(own_bundle).manifest.parity_result
    assert recorded is not None
    assert any(failure.startswith("contents: label statistics") for failure in recorded.failures)


def test_bundle_that_is_only_built_is_recorded_as_such(own_bundle: Path):
    record_parity(own_bundle, ParityReport(rows=[], engine="", flights=0, seed=0, frames=""))
    recorded = Bundle.open(own_bundle).manifest.parity_result
    assert recorded is not None
    assert recorded.result == "built, not run"


def test_frames_that_are_no_array_are_refused(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "frames.npy").write_bytes(b"not an array")
    result = run_verify(tiny_bundle, tiny_checkpoint, "--frames", str(tmp_path / "frames.npy"))
    assert result.exit_code == 1
    assert "no .npy array" in result.output
