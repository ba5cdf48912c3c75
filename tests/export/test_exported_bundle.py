"""What an export leaves in the folder, and what it refuses."""

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_models import STATS, random_model, save_random_checkpoint, tiny_config, tokenizer_json

from worldvln_edge.bundle import Bundle
from worldvln_edge.export import exporter, weight_file
from worldvln_edge.export.exporter import export_bundle
from worldvln_edge.export.graph_sources import GraphSource, graph_sources, kv_capacity
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.planned_tensor import CastReports, checkpoint_tensor
from worldvln_edge.export.precision import Precision
from worldvln_edge.export.tracing import ExportError, trace_graph
from worldvln_edge.models.checkpoint_file import CheckpointError
from worldvln_edge.models.checkpoint_source import CheckpointChangedError, open_any
from worldvln_edge.models.worldvln import save_checkpoint
from worldvln_edge.runtime.engines.engine import OnnxEngine
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.scale_schedule import ScaleSchedule


def test_manifest_names_every_graph_and_every_file(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    sources = {source.name: source for source in graph_sources(random_model(tiny_config()))}
    assert set(bundle.manifest.graphs) == set(sources)
    for name, entry in bundle.manifest.graphs.items():
        assert tuple(spec.name for spec in entry.inputs) == sources[name].inputs
        assert tuple(spec.name for spec in entry.outputs) == sources[name].outputs
    assert {path.name for path in tiny_bundle.iterdir()} == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.model == tiny_config()


def test_cache_is_exactly_as_large_as_the_longest_step_needs():
    config = tiny_config(context_from_largest_no=0, clips_per_segment=2)
    schedule = ScaleSchedule(config.schedule, 1 + (config.horizon.num_frames - 1) // 2)
    tokens = sum(schedule.last_step(c.index, s).tokens for c in schedule.clips for s in range(3))
    assert kv_capacity(config) == config.world_model.text_max_tokens + tokens


def test_graphs_share_one_copy_of_the_weights(tiny_bundle: Path, tiny_checkpoint: Path):
    weights = (tiny_bundle / "weights.bin").stat().st_size
    fp32 = sum(p.numel() * 4 for p in random_model(tiny_config()).parameters())
    padding = 4096 * 200  # tensors are aligned; a second copy of the world model alone would be larger in real models
    assert weights < fp32 + padding
    offsets: dict[str, set[tuple[str, ...]]] = {}
    for file in tiny_bundle.glob("world_model_*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        external = [t for t in graph.initializer if t.external_data]
        offsets[file.name] = {tuple(e.value for e in t.external_data) for t in external}
        assert external
    assert offsets["world_model_context.onnx"] & offsets["world_model_step.onnx"]


def test_graphs_tell_nothing_of_the_exporting_machine(tiny_bundle: Path):
    here = str(Path(exporter.__file__).parent.parent)
    for file in tiny_bundle.glob("*.onnx"):
        data = file.read_bytes()
        assert b"site-packages" not in data
        assert here.encode() not in data
        has_cache = file.name.startswith("world_model")
        assert onnx.load(file, load_external_data=False).opset_import[0].version == (24 if has_cache else 20)


@pytest.mark.parametrize("tokens", [2, 7, 12])
def test_text_graph_takes_every_length(tiny_bundle: Path, tokens: int):
    model = random_model(tiny_config())
    ids = torch.arange(tokens)[None] % 15
    bundle = Bundle.open(tiny_bundle)
    engine = OnnxEngine(bundle.graph_path(graphs.TEXT_ENCODER), threads=1)
    found = engine.run({"ids": ids.numpy()})
    assert found["text_embeds"].shape == found["uncond_embeds"].shape == (1, tokens, 32)
    uncond = model.world_model.project_text(model.world_model.cfg_uncond[:tokens][None])
    np.testing.assert_allclose(found["uncond_embeds"], uncond.numpy(), atol=2e-2)  # the checkpoint is fp16


def test_unusable_checkpoint_leaves_the_old_bundle(tmp_path: Path, tiny_bundle: Path):
    save_random_checkpoint(tmp_path / "checkpoint", tiny_config())
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"short")
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="truncated"):
        export_bundle(open_any(tmp_path / "checkpoint"), tmp_path / "bundle")
    Bundle.open(tmp_path / "bundle")


def test_an_export_that_is_stopped_leaves_the_old_bundle_and_is_taken_up(
    tmp_path: Path, tiny_checkpoint: Path, tracer: GraphTracer, monkeypatch: pytest.MonkeyPatch
):
    """Stopped while weights are written: nothing new stands at the place, and the next run goes on."""

    class Stopped(Exception):
        pass

    monkeypatch.setattr(weight_file, "_SYNC_BYTES", 1)
    out = tmp_path / "bundle"
    export_bundle(open_any(tiny_checkpoint), out, tracer=tracer)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    source, read = open_any(tiny_checkpoint), []

    def tensor(key: str) -> torch.Tensor:
        if len(read) == 20:
            raise Stopped
        read.append(key)
        return type(source).tensor(source, key)

    monkeypatch.setattr(source, "tensor", tensor)
    with pytest.raises(Stopped):
        export_bundle(source, out, precision=Precision(name="fp32"), tracer=tracer)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    again = open_any(tiny_checkpoint)
    rest: list[str] = []
    monkeypatch.setattr(again, "tensor", lambda key: rest.append(key) or type(again).tensor(again, key))
    export_bundle(again, out, tracer=tracer)
    assert rest
    assert not set(read) & set(rest)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_an_export_is_not_taken_up_by_another_exporter(
    tmp_path: Path, tiny_checkpoint: Path, tracer: GraphTracer, monkeypatch: pytest.MonkeyPatch
):
    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if total and done > total // 2 and what != "checkpoint hash":
            raise Stopped

    monkeypatch.setattr(weight_file, "_SYNC_BYTES", 1)
    with pytest.raises(Stopped):
        export_bundle(open_any(tiny_checkpoint), tmp_path / "bundle", tracer=tracer, progress=stop)
    unfinished = tmp_path / ".bundle.unfinished"
    assert (unfinished / weight_file.WEIGHTS_FILE).stat().st_size > 0
    monkeypatch.setattr(exporter, "exporter_identity", lambda: "other code")
    notes, written = [], []
    export_bundle(
        open_any(tiny_checkpoint),
        tmp_path / "bundle",
        tracer=tracer,
        progress=lambda what, done, total: written.append(done) if total and what != "checkpoint hash" else None,
        note=notes.append,
    )
    (note,) = notes
    assert note.startswith(f"an unfinished export in {unfinished} was made from another exporter")
    assert note.endswith(": it starts over")
    assert written[0] == 0
    Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        (Precision(name="fp16"), "choose --precision bf16 or --precision fp32"),
        (Precision(name="int4", int4_method="rtn"), "--compute bf16 or --compute fp32"),
    ],
    ids=["fp16", "int4"],
)
def test_a_weight_beyond_float16_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, advice: str
):
    """bfloat16 goes up to 3e38, float16 to 65504. One graph is enough, and spares the tracing of the others."""
    key = "text_encoder.t5.encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    model = random_model(tiny_config())
    model.get_parameter(key)[3, 4] = -131072.0
    save_checkpoint(tmp_path / "checkpoint", model, STATS, tokenizer_json(tiny_config()), dtype=torch.bfloat16)
    one_graph = partial(exporter.export_graphs, names=(graphs.TEXT_ENCODER,))
    monkeypatch.setattr(exporter, "export_graphs", one_graph)
    with pytest.raises(ExportError, match=rf"{re.escape(key)} does not fit float16: 1 values .*131072.*{advice}"):
        export_bundle(open_any(tmp_path / "checkpoint"), tmp_path / "bundle", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_that_changes_during_the_export_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, tiny_bundle: Path, tracer: GraphTracer
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    tensors = folder / "model.safetensors"
    content = tensors.read_bytes()

    def change(what: str, done: int, total: int) -> None:
        if total and done > total // 2 and what != "checkpoint hash":
            tensors.write_bytes(content)  # the same size, and all of it is readable

    with pytest.raises(CheckpointChangedError, match=r"model\.safetensors was changed .* start again"):
        export_bundle(open_any(folder), tmp_path / "bundle", tracer=tracer, progress=change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    assert Bundle.open(tmp_path / "bundle").manifest == Bundle.open(tiny_bundle).manifest


def _source(name: str, module: torch.nn.Module, example: torch.Tensor) -> GraphSource:
    return GraphSource(name=name, module=module, example=(example,), inputs=("x",), outputs=("y",), dynamic={})


def test_module_that_does_not_trace_is_named():
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="graph odd does not export"):
        trace_graph(_source("odd", Branching(), torch.ones(3)), {}, _never, opset=24)


def _never(key: str, parameter: torch.Tensor, transposed: bool):
    raise AssertionError(f"{key} asked for")


def test_a_linear_stores_its_weight_as_matmul_reads_it():
    """No Transpose is left for the engine to fold: at 8 B that would be a second copy of the model."""
    layer = torch.nn.Linear(32, 48)
    keys = {id(p): f"layer.{name}" for name, p in layer.named_parameters()}

    def weight_of(key: str, parameter: torch.Tensor, transposed: bool):
        shape = tuple(parameter.shape)
        return checkpoint_tensor(key, shape, parameter.dtype, CastReports(), transposed=transposed)

    traced = trace_graph(_source("layer", layer, torch.ones(2, 5, 32)), keys, weight_of, opset=24)
    assert [node.op_type for node in traced.model.graph] == ["MatMul", "Add"]
    by_key = {weight.key: weight for weight in traced.weights.values()}
    assert by_key["layer.weight"].shape == (32, 48)
    made = by_key["layer.weight"].make(lambda key: layer.weight.detach())
    np.testing.assert_array_equal(made, layer.weight.detach().numpy().T)
