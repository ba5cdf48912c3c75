"""Engines against their graphs. The engines are real files of the real builder; what runs them is a fake GPU."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from engine_bundles import embed_bundle
from fake_gpu import FakeMemory
from fake_tensorrt import ENGINES_REALLY_RUN, FakeEngine, GraphEngine, check_on_fake_gpu, fake_tensorrt
from onnx import numpy_helper

from worldvln_edge.bundle import Bundle, EngineEntry, file_entry
from worldvln_edge.cli import main
from worldvln_edge.export import engine_checks, tensorrt_build
from worldvln_edge.export.build_job import BuildJob, EngineBuildError, Target
from worldvln_edge.export.engine_checks import check_engines
from worldvln_edge.export.engine_parity import engine_parity
from worldvln_edge.export.optimisation_profiles import graph_profiles
from worldvln_edge.export.parity_calls import new_caches, plan_calls
from worldvln_edge.export.tensorrt_build import build_engines, parse_targets
from worldvln_edge.parity_record import EngineParity
from worldvln_edge.runtime.engines.tensorrt_library import tensorrt_log
from worldvln_edge.runtime.worldvln import graphs

NEXT_DECODER = graphs.first_or_next(graphs.VAE_DECODER, False)


@pytest.fixture
def run_parity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Parity of a graph with an engine that the fake runs: the graph itself, or whatever `make` makes."""

    def run(bundle: Bundle, graph: str, make: Callable[[FakeMemory], FakeEngine | None] | None = None) -> EngineParity:
        memory = FakeMemory()
        file = bundle.folder / "engines" / "fake" / f"{graph}.engine"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(graph.encode())
        entry = EngineEntry(
            graph=graph,
            backend="tensorrt",
            version="1.0",
            compute_capability="sm89",
            file=f"engines/fake/{graph}.engine",
            content=file_entry(file),
            precision="fp32",
            profiles=1,
            build_seconds=0,
            peak_memory_bytes=0,
            log="",
            sources={},
        )
        make = make or (lambda memory: GraphEngine(memory, bundle.graph_path(graph)))
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(lambda data: make(memory)))
        tensorrt_log.cache_clear()
        parity = engine_parity(bundle, entry, memory)
        assert memory.left_behind() == {}
        return parity

    yield run
    tensorrt_log.cache_clear()


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """Of all graphs; engines may be put into it."""
    return Bundle.open(copied(tiny_bundle, tmp_path / "bundle"))


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change_weight(source: Path, target: Path, by: float = 0.5) -> None:
    """The same graph with one other weight; all of its weights go into the file."""
    model = onnx.load_model(source)
    tensor = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] += by
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, target)


def test_every_graph_of_a_bundle_equals_itself_at_every_shape(bundle: Bundle, run_parity) -> None:
    manifest = bundle.manifest
    for graph, entry in manifest.graphs.items():
        parity = run_parity(bundle, graph)
        assert (parity.within, parity.reason) == (True, "")
        assert parity.reference.startswith("onnxruntime ")
        profiles = graph_profiles(graph, entry, manifest.model, rows=manifest.guidance_rows)
        assert parity.shapes >= max(1, len(profiles))
        outputs = {output.name for output in entry.outputs if not output.name.startswith("present_")}
        has_cache = any(spec.name.startswith("past_") for spec in entry.inputs)
        assert {row.output for row in parity.outputs} == outputs | ({"kv_cache"} if has_cache else set())
        assert all(row.error == 0 for row in parity.outputs)


@pytest.mark.parametrize("graph", [graphs.WORLD_MODEL_STEP, graphs.WORLD_MODEL_CONTEXT, NEXT_DECODER])
def test_one_wrong_weight_is_found(bundle: Bundle, run_parity, tmp_path: Path, graph: str) -> None:
    changed = tmp_path / "changed.onnx"
    change_weight(bundle.graph_path(graph), changed)
    parity = run_parity(bundle, graph, lambda memory: GraphEngine(memory, changed))
    assert not parity.within
    assert " > " in parity.reason


class ForgetfulEngine(GraphEngine):
    """Attends to the whole cache, as if nothing said how much of it is valid."""

    def __init__(self, memory: FakeMemory, path: Path):
        super().__init__(memory, path)
        run = self.session.run
        capacity = self.shapes["past_key_0"][2]
        self.session = type("Session", (), {})()
        self.session.run = lambda names, feeds: run(
            names, feeds | {"kv_length": np.full_like(feeds["kv_length"], capacity)}
        )


def test_attention_to_stale_entries_is_found(bundle: Bundle, run_parity) -> None:
    path = bundle.graph_path(graphs.WORLD_MODEL_STEP)
    parity = run_parity(bundle, graphs.WORLD_MODEL_STEP, lambda memory: ForgetfulEngine(memory, path))
    assert not parity.within
    assert "probabilities mean_abs" in parity.reason
    assert "next_codes" not in parity.reason  # forced bits give the right codes


class OddEngine(GraphEngine):
    """Changes one output after the run."""

    def __init__(self, memory: FakeMemory, path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]):
        super().__init__(memory, path)
        run, names = self.session.run, self.outputs
        self.session = type("Session", (), {})()
        self.session.run = lambda wanted, feeds: (
            [change(value) if output == name else value for output, value in zip(names, run(None, feeds), strict=True)]
            if wanted is None
            else run(wanted, feeds)
        )


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("bits", lambda a: 1 - a, r"bits wrong 1 > 0 at scale"),
        ("next_codes", lambda a: a + np.float32(1e-4), r"next_codes max_abs 0.0001 > 1e-06 at scale"),
        ("probabilities", lambda a: a * np.float32(np.nan), r"probabilities max_abs not finite"),
    ],
)
def test_wrong_outputs_of_a_step_are_named(bundle: Bundle, run_parity, name: str, change, reason: str) -> None:
    path = bundle.graph_path(graphs.WORLD_MODEL_STEP)
    parity = run_parity(bundle, graphs.WORLD_MODEL_STEP, lambda memory: OddEngine(memory, path, name, change))
    assert reason in parity.reason


def test_an_engine_that_does_not_load_or_run_has_failed(bundle: Bundle, run_parity) -> None:
    parity = run_parity(bundle, graphs.ACTION_HEAD, lambda memory: None)
    assert not parity.within
    assert "tensorrt 1.0 cannot load it on sm89" in parity.reason

    def refusing(memory: FakeMemory) -> GraphEngine:
        engine = GraphEngine(memory, bundle.graph_path(graphs.ACTION_HEAD))
        engine.on_run = lambda: False
        return engine

    assert "the run failed (it gave no reason)" in run_parity(bundle, graphs.ACTION_HEAD, refusing).reason


def test_steps_see_entries_of_earlier_calls_and_stale_ones_behind_them(bundle: Bundle) -> None:
    calls = plan_calls(bundle, graphs.WORLD_MODEL_STEP)
    entry = bundle.manifest.graphs[graphs.WORLD_MODEL_STEP]
    assert all(np.abs(cache).min() > 0 for cache in new_caches(entry, 2).values())
    written = 0
    for call in calls:
        assert call.entries.start <= written  # nothing between the visible prefix and the new entries is stale
        assert call.inputs["kv_length"].tolist() == [call.entries.stop] * call.rows
        written = max(written, call.entries.stop)
    assert any(call.entries.stop < written for call in calls)
    assert {int(call.inputs["force"]) for call in calls} == {0, 1}
    assert {call.rows for call in calls} == {1, bundle.manifest.guidance_rows}
    assert len({call.entries.stop for call in calls}) > 3


def test_the_same_seed_gives_the_same_calls(bundle: Bundle) -> None:
    first, again, other = (plan_calls(bundle, NEXT_DECODER, seed) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        assert all(np.array_equal(array, two.inputs[name]) for name, array in one.inputs.items())
    assert not np.array_equal(first[0].inputs["codes"], other[0].inputs["codes"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    folder = embed_bundle(tmp_path_factory.mktemp("parity") / "bundle")
    results = build_engines(folder, parse_targets("sm89,sm120"))
    assert [result.error for result in results] == [""] * 4
    return folder


@pytest.fixture
def on_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has an sm89, which runs ONNX Runtime."""
    monkeypatch.setattr(engine_checks, "CudaMemory", FakeMemory)
    monkeypatch.setattr(engine_checks, "_check_safely", check_on_fake_gpu)


def test_engines_for_this_gpu_are_checked_and_recorded(built: Path, tmp_path: Path, on_fake_gpu) -> None:
    folder = copied(built, tmp_path / "bundle")
    results = check_engines(folder)
    assert {(r.entry.compute_capability, r.is_failed, bool(r.not_run)) for r in results} == {
        ("sm89", False, False),
        ("sm120", False, True),
    }
    for entry in Bundle.open(folder).manifest.engines:
        if entry.compute_capability == "sm120":
            assert entry.parity is None
        else:
            assert entry.parity is not None
            assert entry.parity.within
            assert {row.measure for row in entry.parity.outputs} == {"relative_max", "relative_rms"}
            assert all(0 <= row.error <= row.bound for row in entry.parity.outputs)
    reasons = {r.not_run for r in results if r.not_run}
    (version,) = {entry.version for entry in Bundle.open(folder).manifest.engines}
    assert reasons == {f"it was built for tensorrt_rtx {version} on sm120, here is tensorrt_rtx {version} on sm89"}


def test_the_command_checks_engines_and_fails_for_a_wrong_one(built: Path, tmp_path: Path, on_fake_gpu) -> None:
    folder = copied(built, tmp_path / "bundle")
    graph, other = graphs.ACTION_ADAPTER, graphs.LATENT_EMBED
    change_weight(folder / f"{graph}.onnx", folder / ENGINES_REALLY_RUN / f"{graph}.onnx")
    done = CliRunner().invoke(main, ["build", str(folder), "--check-engines", "--json"])
    assert done.exit_code == 1, done.output
    engines = {(e["graph"], e["target"]): e for e in json.loads(done.stdout)["engines"]}
    assert engines[graph, "sm89"]["parity"]["within"] is False
    assert engines[other, "sm89"]["parity"]["within"] is True
    assert engines[other, "sm120"]["not_run"].startswith("it was built for")
    assert "error: 1 of 4 engines do not compute what their graphs do" in done.stderr
    assert "sm89 action_adapter: fp16, 0 profiles" in done.stderr
    assert "out of bounds: tokens relative_max" in done.stderr
    assert "within bounds at 8 shapes" in done.stderr
    again = CliRunner().invoke(main, ["build", str(folder), "--check-engines", "--graphs", other])
    assert again.exit_code == 0, again.output
    recorded = {e.graph: e.parity for e in Bundle.open(folder).manifest.engines if e.compute_capability == "sm89"}
    assert recorded[graph] is not None
    assert not recorded[graph].within


def test_a_refused_engine_is_built_again(built: Path, tmp_path: Path, on_fake_gpu) -> None:
    folder = copied(built, tmp_path / "bundle")
    graph = graphs.ACTION_ADAPTER
    change_weight(folder / f"{graph}.onnx", folder / ENGINES_REALLY_RUN / f"{graph}.onnx")
    (result,) = [r for r in check_engines(folder, graphs=[graph]) if not r.not_run]
    assert result.is_failed
    (rebuilt,) = build_engines(folder, parse_targets("sm89"), graphs=[graph])
    assert not rebuilt.is_kept
    assert rebuilt.entry is not None
    assert rebuilt.entry.parity is None


def test_a_check_that_crashes_is_a_failed_engine(
    built: Path, tmp_path: Path, on_fake_gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_checks, "_check_safely", crash)
    folder = copied(built, tmp_path / "bundle")
    (result,) = [r for r in check_engines(folder, graphs=[graphs.ACTION_ADAPTER]) if not r.not_run]
    assert result.entry.parity is not None
    assert result.entry.parity.reason == "the process that ran it crashed (exit code 11)"


def crash(job: engine_checks.CheckJob) -> None:
    os._exit(11)


def test_without_a_gpu_every_engine_is_not_run_with_the_reason(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    folder = copied(built, tmp_path / "bundle")
    results = check_engines(folder)
    if not all(result.not_run for result in results):
        pytest.skip("this machine has a GPU")
    assert {result.entry.parity for result in results} == {None}
    assert results[0].not_run.startswith("no CUDA driver answers here")
    done = CliRunner().invoke(main, ["build", str(folder), "--check-engines"])
    assert done.exit_code == 0
    assert "not run: no CUDA driver answers here" in done.stdout


def test_formats_that_onnx_runtime_does_not_run_say_so(tmp_path: Path, on_fake_gpu) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    folder = embed_bundle(tmp_path / "bundle", "bf16")
    build_engines(folder, parse_targets("sm89"), graphs=[graphs.ACTION_ADAPTER])
    (result,) = check_engines(folder)
    assert "does not run bf16 computed in bf16, so there is nothing to compare with" in result.not_run


def test_a_bundle_without_engines_has_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"has no engines of any graph; build some with `worldvln-edge build"):
        check_engines(embed_bundle(tmp_path / "bundle"))


def build_as_if_local(job: BuildJob) -> tensorrt_build.BuildResult:
    """What `tensorrt` would build on the device, built by tensorrt_rtx for the same GPU."""
    import tensorrt_rtx

    rtx = dataclasses.replace(job.target, package="tensorrt_rtx", version=tensorrt_rtx.__version__, is_local=False)
    result = tensorrt_build._build_safely(dataclasses.replace(job, target=rtx))
    assert result.entry is not None
    (job.bundle / job.engine_file).parent.mkdir(parents=True, exist_ok=True)
    (job.bundle / job.engine_file).write_bytes((job.bundle / result.entry.file).read_bytes())
    entry = msgspec.structs.replace(
        result.entry, backend=job.target.package, version=job.target.version, file=job.engine_file
    )
    return dataclasses.replace(result, target=job.target, entry=entry)


@pytest.fixture
def local_builds(monkeypatch: pytest.MonkeyPatch, on_fake_gpu) -> None:
    """`--target local` finds `tensorrt` 10.9 and an sm89."""
    pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(lambda data: None, version="10.9"))
    monkeypatch.setattr(tensorrt_build, "CudaMemory", FakeMemory)
    monkeypatch.setattr(tensorrt_build, "_build_safely", build_as_if_local)


def test_local_builds_are_checked_at_once(tmp_path: Path, local_builds) -> None:
    folder = embed_bundle(tmp_path / "bundle")
    change_weight(folder / "latent_embed.onnx", folder / ENGINES_REALLY_RUN / "latent_embed.onnx")
    command = ["build", str(folder), "--target", "local"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "sm89 latent_embed: fp16, 4 profiles" in done.stdout
    assert "out of bounds: embeds relative_max" in done.stdout
    assert "within bounds at 1 shapes" in done.stdout
    parities = {entry.graph: entry.parity for entry in Bundle.open(folder).manifest.engines}
    assert {graph: parity.within for graph, parity in parities.items()} == {
        graphs.LATENT_EMBED: False,
        graphs.ACTION_ADAPTER: True,
    }


def test_parity_may_be_left_out_and_made_later(tmp_path: Path, local_builds) -> None:
    folder = embed_bundle(tmp_path / "bundle")
    command = ["build", str(folder), "--target", "local", "--graphs", graphs.ACTION_ADAPTER]
    without = CliRunner().invoke(main, [*command, "--no-parity"])
    assert without.exit_code == 0, without.output
    assert "built, not run" in without.stdout
    assert Bundle.open(folder).manifest.engines[0].parity is None
    later = CliRunner().invoke(main, command)
    assert later.exit_code == 0, later.output
    assert "kept, within bounds at 1 shapes" in later.stdout
    (entry,) = Bundle.open(folder).manifest.engines
    assert entry.parity is not None
    target = Target(package="tensorrt", version="10.9", compute_capability="sm89", is_local=True)
    assert entry.file == f"{target.folder}/{graphs.ACTION_ADAPTER}.engine"
