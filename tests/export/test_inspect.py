"""`worldvln-edge inspect`: what a bundle holds and costs, read without its weights, or why it cannot be read."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from small_models import tiny_config

from worldvln_edge.bundle import Bundle, BundleError
from worldvln_edge.cli import main
from worldvln_edge.export.devices import DEVICES, DeviceError, find_device
from worldvln_edge.export.inspect_bundle import count_macs, read_structure
from worldvln_edge.export.inspect_report import InspectReport, inspect_bundle
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.kv_cache import HostKVMemory, KVShape
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> InspectReport:
    return inspect_bundle(tiny_bundle, devices=list(DEVICES.values()), text_tokens=5)


def _run(*arguments: str):
    return CliRunner().invoke(main, ["inspect", *arguments])


def test_every_graph_of_the_bundle_is_listed(report: InspectReport, tiny_bundle: Path):
    manifest = Bundle.open(tiny_bundle).manifest
    assert {graph.name for graph in report.graphs} == set(manifest.graphs)
    for graph in report.graphs:
        model = onnx.load(tiny_bundle / manifest.graphs[graph.name].file)
        assert graph.operators == len(model.graph.node) == sum(graph.operator_types.values())
        assert graph.inputs == manifest.graphs[graph.name].inputs
        assert sum(graph.bytes_by_dtype.values()) > 0
        assert graph.precision == "fp32"


def test_shared_weights_are_counted_once(report: InspectReport, tiny_bundle: Path):
    assert report.memory.weights == sum(report.bytes_by_dtype.values())
    assert report.memory.weights < sum(sum(graph.bytes_by_dtype.values()) for graph in report.graphs)
    # Padding between tensors, and small tensors that stay in the graph files, are the difference to the weight file.
    files = Bundle.open(tiny_bundle).manifest.files
    assert report.memory.weights < sum(entry.size_bytes for entry in files.values())


def test_kv_bytes_are_those_of_the_runtime_cache(report: InspectReport, tiny_bundle: Path):
    manifest, world = Bundle.open(tiny_bundle).manifest, tiny_config().world_model
    memory = HostKVMemory(
        KVShape(
            layers=world.depth,
            rows=manifest.guidance_rows,
            kv_heads=world.kv_heads,
            capacity=manifest.kv_capacity,
            head_dim=world.head_dim,
            dtype=np.dtype(np.float32),
        )
    )
    assert report.memory.kv_buffers == memory.array.nbytes
    assert report.memory.kv_stored % (memory.array.nbytes // manifest.kv_capacity) == 0


def test_state_bytes_are_those_of_the_graph_inputs(report: InspectReport, tiny_bundle: Path):
    model = onnx.load(tiny_bundle / "vae_encoder_next.onnx", load_external_data=False)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    states = sum(4 * int(np.prod(shape)) for name, shape in shapes.items() if name.startswith("state_"))
    assert report.memory.vae_encoder_state == states


def test_bound_of_a_session_is_the_one_that_a_server_plans_with(report: InspectReport, tiny_bundle: Path):
    policy = load_policy(tiny_bundle, threads=1)
    assert report.memory.session_at_most == policy.session_memory
    assert report.memory.session_at_most.total == policy.session_bytes
    assert report.memory.session_at_most.keys_and_values > report.memory.kv_stored  # the longest prompt, changed
    text = _run(str(tiny_bundle)).output
    assert "One session on a server, at most" in text
    assert f"  together            {policy.session_bytes / 1e3:.2f} kB" in text


def test_roofline_is_a_lower_bound_that_grows_with_the_schedule(report: InspectReport):
    assert [line.device for line in report.roofline] == list(DEVICES)
    for line in report.roofline:
        for minimal, full in zip(line.minimal_seconds, line.full_horizon_seconds, strict=True):
            assert 0 < minimal < full
        assert line.fits


def test_weights_are_not_read(tiny_bundle: Path, tmp_path: Path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    weights = next(path for path in folder.iterdir() if path.suffix == ".bin")
    size = weights.stat().st_size
    with weights.open("wb") as stream:
        stream.truncate(size)  # all zeros, of the right size
    assert inspect_bundle(folder, devices=[], text_tokens=5).parameters > 0
    weights.write_bytes(b"short")
    with pytest.raises(BundleError, match="5 bytes found, the manifest says"):
        inspect_bundle(folder, devices=[], text_tokens=5)
    weights.unlink()
    with pytest.raises(BundleError, match="is missing; copy the bundle again"):
        inspect_bundle(folder, devices=[], text_tokens=5)


def test_int4_weights_and_their_scales_are_told_apart():
    weight = helper.make_tensor("w", TensorProto.INT4, [64, 8], bytes(256), raw=True)
    scale = numpy_helper.from_array(np.ones((1, 8), np.float16), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], axis=0, block_size=64),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["tokens", c]) for n, c in (("x", 64), ("y", 8))]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [weight, scale]))
    structure = read_structure("g", model)
    assert (structure.precision, structure.parameters) == ("int4", 512)
    assert structure.bytes_by_dtype == {"int4": 256, "float16": 16}
    assert count_macs(model, {"x": (3, 64)}) == (3 * 64 * 8, 0)


def test_text_and_json_of_a_bundle_agree(tiny_bundle: Path):
    text = _run(str(tiny_bundle), "--device", "agx-orin-64gb")
    assert text.exit_code == 0, text.output
    assert "an estimate, not a measurement" in text.output
    assert "world_model_step" in text.output
    found = json.loads(_run(str(tiny_bundle), "--json").stdout)
    assert msgspec.convert(found, InspectReport).segments
    for segment in found["segments"]:
        assert f"{segment['minimal']['token_steps']:,}" in text.output
    assert [line["device"] for line in found["roofline"]] == list(DEVICES)


def test_the_released_preset_is_reported_without_a_bundle():
    result = _run("--preset", "worldvln-8b", "--precision", "int4", "--json")
    assert result.exit_code == 0, result.output
    found = msgspec.json.decode(result.stdout, type=InspectReport)
    assert [s.minimal.token_steps for s in found.segments] == [31_584, 36_928, 38_800]
    assert (
        found.memory.kv_buffers == found.kv_capacity * 294_912
    )  # spec/world_model.md 6.1: bytes of a token, both rows
    assert found.memory.vae_encoder_state == pytest.approx(1.47e9, rel=0.01)  # spec/video_vae.md 8
    bound = found.memory.session_at_most
    assert bound.vae_states == found.memory.vae_encoder_state + found.memory.vae_decoder_state
    assert bound.keys_and_values % 294_912 == 0
    by_device = {line.device: line for line in found.roofline}
    assert not by_device["orin-nano-8gb"].fits
    assert by_device["h200"].minimal_seconds < by_device["agx-orin-64gb"].minimal_seconds


def test_every_device_names_its_source_and_dense_rates():
    for device in DEVICES.values():
        assert device.source.startswith("https://")
        assert "nvidia.com" in device.source
        assert device.basis
        assert device.rate("fp32") < device.rate("fp16") <= device.rate("int8")
        assert device.rate("int4") == device.rate("bf16") == device.rate("fp16")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "name a bundle folder or a --preset"),
        (("--preset", "nano", "somewhere"), 2, "name a bundle folder or a --preset"),
        (("somewhere", "--precision", "fp16"), 2, "--precision goes with --preset"),
        (("--preset", "nano", "--text-tokens", "33"), 1, "a prompt of 33 tokens was asked for; nano takes 1 to 32"),
        (("--preset", "nano", "--precision", "fp12"), 2, "'fp12' is none of fp32"),
        (("--preset", "nano", "--device", "toaster"), 1, "unknown device 'toaster'; choose one of orin-nano-8gb"),
        (("/nowhere",), 1, "/nowhere is no bundle: manifest.json is missing; make one with `worldvln-edge export`"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: tuple[str, ...], status: int, message: str):
    result = _run(*arguments)
    assert result.exit_code == status
    assert message in " ".join(result.output.split())


def test_another_schema_or_a_broken_graph_is_refused(tiny_bundle: Path, tmp_path: Path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_bytes())
    graph = folder / content["graphs"][graphs.ACTION_HEAD]["file"]
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(BundleError, match="not an ONNX file"):
        inspect_bundle(folder, devices=[], text_tokens=5)
    manifest.write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(BundleError, match="schema 99 found"):
        inspect_bundle(folder, devices=[], text_tokens=5)


def test_an_unknown_device_names_the_known_ones():
    with pytest.raises(DeviceError, match="h200"):
        find_device("abacus")
    with pytest.raises(ValueError, match="no rate for precision 'int3'"):
        find_device("h200").rate("int3")
