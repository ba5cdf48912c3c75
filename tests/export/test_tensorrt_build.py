"""Engines built by the real TensorRT-RTX, without a GPU. They are built here, not run."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from engine_bundles import BLOCK, block_model, embed_bundle, matmul_model, write_bundle

from worldvln_edge.bundle import Bundle, BundleError, write_manifest
from worldvln_edge.cli import main
from worldvln_edge.export import tensorrt_build, tensorrt_network
from worldvln_edge.export.build_job import BuildJob, EngineBuildError, Target
from worldvln_edge.export.engine_records import only_writer
from worldvln_edge.export.optimisation_profiles import Span
from worldvln_edge.export.tensorrt_build import build_engines, parse_targets
from worldvln_edge.export.tensorrt_builder import build_engine
from worldvln_edge.export.tensorrt_network import check_formats
from worldvln_edge.runtime.engines.engine import EngineError
from worldvln_edge.runtime.worldvln.graphs import ACTION_ADAPTER, GUIDANCE_ROWS, LATENT_EMBED, WORLD_MODEL_STEP

pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")

SMALL = {"width": 128, "heads": 4, "kv_heads": 2, "intermediate": 256, "capacity": 192}


def block_job(
    folder: Path, precision: str = "fp16", target: str = "sm89", tokens=(1, 16, 64), **sizes: int
) -> BuildJob:
    """The job of one cached block; its graph is no graph of a flight, so its profile is given here."""
    sizes = sizes or SMALL
    write_bundle(folder, {BLOCK: block_model(precision, **sizes)}, precision)
    low, best, high = ((rows, n, sizes["width"]) for rows, n in zip((1, 2, 2), tokens, strict=True))
    return BuildJob(
        bundle=folder,
        graph=BLOCK,
        file=f"{BLOCK}.onnx",
        profiles=({"embeds": Span(lowest=low, best=best, highest=high), **_cache_spans(sizes)},),
        target=parse_targets(target)[0],
        sources={},
    )


def _cache_spans(sizes: dict[str, int]) -> dict[str, Span]:
    cache = (sizes["kv_heads"], sizes["capacity"], sizes["width"] // sizes["heads"])
    shapes: dict[str, tuple[int, ...]] = {
        "write_index": (),
        "kv_length": (),
        "past_key_0": cache,
        "past_value_0": cache,
    }
    return {name: Span(lowest=(1, *shape), best=(2, *shape), highest=(2, *shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = embed_bundle(tmp_path_factory.mktemp("built") / "bundle")
    results = build_engines(folder, parse_targets("sm89,sm120"), jobs=2)
    assert [result.error for result in results] == [""] * 4
    return folder


def test_engines_of_two_gpus_are_built_without_a_gpu_and_recorded(built: Path) -> None:
    bundle = Bundle.open(built)
    assert {(e.graph, e.compute_capability) for e in bundle.manifest.engines} == {
        (graph, target) for graph in (LATENT_EMBED, ACTION_ADAPTER) for target in ("sm89", "sm120")
    }
    for entry in bundle.manifest.engines:
        assert entry.file == f"engines/tensorrt_rtx-{entry.version}/{entry.compute_capability}/{entry.graph}.engine"
        assert bundle.engine_path(entry).stat().st_size == entry.content.size_bytes > 10_000
        assert (built / entry.log).is_file()
        assert (entry.precision, entry.parity) == ("fp16", None)
        assert entry.sources == {n: bundle.manifest.files[n].sha256 for n in (f"{entry.graph}.onnx", "weights.bin")}
        assert entry.peak_memory_bytes > 1e7


def test_every_token_count_of_an_observed_scale_has_its_own_profile(built: Path) -> None:
    profiles = {entry.graph: entry.profiles for entry in Bundle.open(built).manifest.engines}
    assert profiles == {LATENT_EMBED: 4, ACTION_ADAPTER: 0}


def test_a_second_build_keeps_what_is_there_and_replaces_what_changed(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built, folder)
    first = Bundle.open(folder).manifest.engines
    (folder / first[0].file).write_bytes(b"half an engine")
    seen: list[tuple[str, int, int]] = []
    results = build_engines(
        folder, parse_targets("sm89,sm120"), progress=lambda r, done, count: seen.append((r.graph, done, count))
    )
    assert [result.is_kept for result in results] == [True] * 3 + [False]
    assert [done for _, done, count in seen if count == 4] == [1, 2, 3, 4]
    manifest = Bundle.open(folder).manifest
    assert [entry.file for entry in manifest.engines] == [entry.file for entry in first]
    Bundle.open(folder).engine_path(manifest.engines[0])


def test_an_engine_file_without_its_entry_leaves_the_bundle_usable(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(built, folder)
    manifest = Bundle.open(folder).manifest
    write_manifest(folder, msgspec.structs.replace(manifest, engines=manifest.engines[:1]))
    assert len(Bundle.open(folder).manifest.engines) == 1


def test_a_graph_that_does_not_build_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = write_bundle(
        tmp_path / "mixed",
        {
            ACTION_ADAPTER: matmul_model("bf16", (16, 16), 64, 96, ("features", "tokens")),
            LATENT_EMBED: matmul_model("fp16", (GUIDANCE_ROWS, "n"), 64, 192, ("latents", "embeds")),
        },
    )
    results = {result.graph: result for result in build_engines(folder, parse_targets("sm75"))}
    assert "computes in bf16, which tensorrt_rtx builds for sm80 or newer" in results[ACTION_ADAPTER].error
    assert [entry.graph for entry in Bundle.open(folder).manifest.engines] == [LATENT_EMBED]


def test_a_builder_that_dies_takes_one_engine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embed_bundle(tmp_path / "bundle")
    monkeypatch.setattr(tensorrt_build, "_build_safely", die_at_the_adapter)
    results = {result.graph: result for result in build_engines(folder, parse_targets("sm89"), jobs=2)}
    assert "the builder was killed or crashed" in results[ACTION_ADAPTER].error
    assert results[LATENT_EMBED].entry is not None


def test_a_killed_builder_names_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embed_bundle(tmp_path / "bundle")
    monkeypatch.setattr(tensorrt_build, "_build_safely", die_at_the_adapter)
    (result,) = build_engines(folder, parse_targets("sm89"), graphs=[ACTION_ADAPTER])
    assert "killed or crashed (exit code 9)" in result.error


def die_at_the_adapter(job: BuildJob):
    if job.graph == ACTION_ADAPTER:
        os._exit(9)
    return tensorrt_build.BuildResult(graph=job.graph, target=job.target, entry=build_engine(job))


def test_valid_length_of_the_cache_reaches_the_engine(tmp_path: Path) -> None:
    job = block_job(tmp_path / "block")
    entry = build_engine(job)
    log = (tmp_path / "block" / entry.log).read_text()
    assert "Unused Input" not in log
    assert entry.precision == "fp16"


def test_an_engine_that_ignores_an_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_network, "_kv_lengths", lambda path: {})  # what the parser alone would give
    job = block_job(tmp_path / "block")
    with pytest.raises(EngineBuildError, match="does not use input kv_length, so the engine would compute something"):
        build_engine(job)
    assert not list((tmp_path / "block").rglob("*.engine"))


def test_attention_over_the_cache_in_fp32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"KV cache is fp32 here.*--precision fp16 or bf16"):
        build_engine(block_job(tmp_path / "block", "fp32"))


def test_bf16_block_builds_from_sm80_on(tmp_path: Path) -> None:
    assert build_engine(block_job(tmp_path / "new", "bf16", "sm86")).precision == "bf16"
    with pytest.raises(EngineBuildError, match="for sm75: the graph computes in bf16, which tensorrt_rtx builds"):
        build_engine(block_job(tmp_path / "old", "bf16", "sm75"))


def target_of(package: str, capability: str) -> Target:
    return Target(package=package, version="1", compute_capability=capability, is_local=package == "tensorrt")


def test_advice_for_a_format_is_one_that_the_gpu_takes() -> None:
    """fp32 is in every bundle, so on sm75 no precision helps tensorrt_rtx; a build on the device does."""
    with pytest.raises(EngineBuildError, match=r"--precision fp16 or int8 and build it on the device"):
        check_formats({"bf16", "fp32"}, target_of("tensorrt_rtx", "sm75"), "here")
    with pytest.raises(EngineBuildError, match=r"in fp32, which .* build it on the device with `--target local`"):
        check_formats({"fp16", "fp32"}, target_of("tensorrt_rtx", "sm75"), "here")
    with pytest.raises(EngineBuildError, match=r"--precision fp16 or int8 or fp32 or bf16 or int4$"):
        check_formats({"fp8", "fp32"}, target_of("tensorrt_rtx", "sm86"), "here")
    check_formats({"fp8", "fp32"}, target_of("tensorrt_rtx", "sm89"), "here")
    check_formats({"bf16", "fp32"}, target_of("tensorrt", "sm75"), "here")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("sm99", "unknown target 'sm99'; tensorrt_rtx .* builds ahead of time for sm75, .*--target local"),
        ("local,sm89", "give `local` alone"),
        ("", "give `local` alone"),
    ],
)
def test_unknown_targets_are_refused(target: str, message: str) -> None:
    with pytest.raises(EngineBuildError, match=message):
        parse_targets(target)


def test_local_target_says_what_is_missing_here() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(EngineError, match=r"tensorrt does not load here.*worldvln-edge\[tensorrt\].*JetPack"):
            parse_targets("local")
    else:
        pytest.skip("tensorrt is installed here")


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match="pip install 'worldvln-edge\\[tensorrt-rtx\\]'"):
        parse_targets("sm89")


def test_too_little_disk_is_said_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1_000_000)
    monkeypatch.setattr(tensorrt_build.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EngineBuildError, match=r"2 engines need about 0\.1 GB, 0\.0 GB are free; make room"):
        build_engines(embed_bundle(tmp_path / "bundle"), parse_targets("sm89"))


def test_two_builds_at_once_are_refused(tmp_path: Path) -> None:
    folder = embed_bundle(tmp_path / "bundle")
    with only_writer(folder), pytest.raises(EngineBuildError, match="another build is at work"):
        build_engines(folder, parse_targets("sm89"))


def test_unknown_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no graph 'nothing'"):
        build_engines(embed_bundle(tmp_path / "bundle"), parse_targets("sm89"), graphs=["nothing"])


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    model = matmul_model("fp16", (16, 16), 64, 96, ("features", "tokens"))
    model.graph.node[0].op_type = "NoSuchOperator"
    write_bundle(folder, {ACTION_ADAPTER: model})
    (result,) = build_engines(folder, parse_targets("sm89"))
    assert result.error.startswith("graph action_adapter for sm89: tensorrt_rtx")
    assert "does not parse it" in result.error


def test_engines_of_another_version_gpu_or_export_are_refused(built: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(built)
    here = {"backend": "tensorrt_rtx", "version": bundle.manifest.engines[0].version, "compute_capability": "sm89"}
    assert bundle.engine(LATENT_EMBED, **here).compute_capability == "sm89"
    with pytest.raises(BundleError, match=r"built for .*sm120, .*sm89, here is .* on sm86; run `worldvln-edge build"):
        bundle.engine(LATENT_EMBED, **here | {"compute_capability": "sm86"})
    with pytest.raises(BundleError, match=r"here is tensorrt_rtx 9\.9 on sm89"):
        bundle.engine(LATENT_EMBED, **here | {"version": "9.9"})
    with pytest.raises(BundleError, match="engines of other were built for nothing"):
        bundle.engine("other", **here)
    engines = tuple(msgspec.structs.replace(e, sources={"weights.bin": "0"}) for e in bundle.manifest.engines)
    stale = Bundle(built, msgspec.structs.replace(bundle.manifest, engines=engines))
    with pytest.raises(BundleError, match=r"was built from another weights\.bin"):
        stale.engine(LATENT_EMBED, **here)


@pytest.mark.parametrize("file", ["../secret.engine", "engines/../../secret", "/etc/passwd", "weights.bin", "engines"])
def test_engine_files_lie_below_the_engines_folder(built: Path, file: str) -> None:
    bundle = Bundle.open(built)
    entry = msgspec.structs.replace(bundle.manifest.engines[0], file=file)
    with pytest.raises(BundleError, match=r"does not lie below engines/|not a plain file name"):
        bundle.engine_path(entry)


def test_command_prints_json_and_fails_when_a_graph_does(tmp_path: Path) -> None:
    folder = str(embed_bundle(tmp_path / "bundle", "bf16"))
    done = CliRunner().invoke(main, ["build", folder, "--target", "sm80", "--graphs", ACTION_ADAPTER, "--json"])
    assert done.exit_code == 0, done.output
    (engine,) = json.loads(done.stdout)["engines"]
    assert engine["graph"] == ACTION_ADAPTER
    assert engine["parity"] is None
    assert "built, not run" in done.stderr
    failed = CliRunner().invoke(main, ["build", folder, "--target", "sm75", "--graphs", ACTION_ADAPTER])
    assert failed.exit_code == 1
    assert "not built: graph action_adapter for sm75" in failed.stdout
    wrong = CliRunner().invoke(main, ["build", folder, "--target", "sm1"])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: unknown target 'sm1'")
    unclear = CliRunner().invoke(main, ["build", folder])
    assert unclear.exit_code == 2
    assert "give either --target or --check-engines" in unclear.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_one_block_of_the_released_width_builds(tmp_path: Path, target: str) -> None:
    job = block_job(
        tmp_path / "block",
        "fp16",
        target,
        (1, 1600, 6400),
        width=4096,
        heads=32,
        kv_heads=8,
        intermediate=16384,
        capacity=9472,
    )
    entry = build_engine(job)
    assert entry.content.size_bytes > 480e6  # 243 million weights of two bytes
    assert entry.peak_memory_bytes < 8e9


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["inplace", "portable"])
def test_every_graph_of_the_shipped_model_builds_for_two_gpus(tmp_path: Path, kv: str) -> None:
    from worldvln_edge.export.exporter import export_bundle
    from worldvln_edge.export.precision import Precision
    from worldvln_edge.models.checkpoint_source import open_checkpoint

    checkpoint = open_checkpoint(Path(__file__).parents[2] / "worldvln_edge" / "checkpoints" / "nano")
    manifest = export_bundle(checkpoint, tmp_path / "bundle", precision=Precision(name="fp16"), kv=kv)
    results = build_engines(tmp_path / "bundle", parse_targets("sm89,sm120"), jobs=2, style="range")
    assert [result.error for result in results] == [""] * 2 * len(manifest.graphs)
    steps = [entry for entry in Bundle.open(tmp_path / "bundle").manifest.engines if entry.graph == WORLD_MODEL_STEP]
    assert [entry.compute_capability for entry in steps] == ["sm120", "sm89"]
    assert {entry.precision for entry in steps} == {"fp16+fp32"}
