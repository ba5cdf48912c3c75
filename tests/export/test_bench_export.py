"""`bench-export` runs the real commands, tells what each one took, and says what to do when one fails."""

import json
import subprocess
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from small_models import tiny_config

from worldvln_edge.cli import main
from worldvln_edge.export import bench_export, exporter
from worldvln_edge.export.bench_export import ExportStep, bench_exports, table
from worldvln_edge.export.graph_tracer import GraphTracer
from worldvln_edge.export.parameter_counts import graph_parameters
from worldvln_edge.runtime.worldvln.graphs import WORLD_MODEL_STEP


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps' commands run here: a process of its own takes seconds to load torch."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "worldvln_edge"]
        result = CliRunner().invoke(main, command[3:])
        return subprocess.CompletedProcess(command, result.exit_code, result.stdout)

    monkeypatch.setattr(bench_export.subprocess, "run", run)


@pytest.fixture
def traced_before(tracer: GraphTracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the graphs that were traced for other tests: tracing takes nearly all of their time."""
    monkeypatch.setattr(exporter, "GraphTracer", lambda: tracer)


def test_a_random_checkpoint_is_made_in_a_process_of_its_own_and_removed(tmp_path: Path):
    (step,) = bench_exports(tmp_path / "work", preset_name="nano", checkpoint=None, precisions=(), keep=False)
    assert step.step == "make-checkpoint nano"
    assert step.bytes == pytest.approx(33.3e6, rel=0.01)
    assert step.seconds > 0
    assert 50e6 < step.peak_rss_bytes < 5e9
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.usefixtures("in_this_process", "traced_before")
def test_an_export_is_measured_and_its_bundle_removed(tmp_path: Path, tiny_checkpoint: Path, tiny_bundle: Path):
    arguments = ["bench-export", "--checkpoint", str(tiny_checkpoint), "--precision", "fp32", "--work", str(tmp_path)]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    (step,) = msgspec.json.decode(result.stdout, type=list[ExportStep])
    assert step.step == "export fp32"
    files = {path.name: path.stat().st_size for path in tiny_bundle.iterdir()}
    assert step.bytes == sum(files.values()) - files["manifest.json"]
    # float32; what the context graph and the embedding read, the step graph reads, too.
    assert step.backbone_bytes == 4 * graph_parameters(tiny_config())[WORLD_MODEL_STEP].total
    assert "export fp32" in result.stderr  # as soon as it was measured
    assert not list(tmp_path.iterdir())
    assert tiny_checkpoint.is_dir()
    kept = CliRunner().invoke(main, [*arguments, "--keep"])
    assert "export fp32" in kept.stdout
    assert sorted(path.name for path in (tmp_path / "fp32").iterdir()) == sorted(files)


def test_the_table_has_a_line_for_every_step():
    steps = [
        ExportStep(
            step="make-checkpoint worldvln-8b", bytes=23_900_000_000, seconds=396.0, peak_rss_bytes=1_100_000_000
        ),
        ExportStep(
            step="export int4",
            bytes=8_120_000_000,
            seconds=444.0,
            peak_rss_bytes=1_740_000_000,
            backbone_bytes=4_700_000_000,
        ),
    ]
    assert [line.split() for line in table(steps).splitlines()] == [
        ["step", "minutes", "peak", "GB", "GB", "backbone", "GB"],
        ["make-checkpoint", "worldvln-8b", "6.6", "1.10", "23.90"],
        ["export", "int4", "7.4", "1.74", "8.12", "4.70"],
    ]
    assert "backbone_bytes" not in json.loads(msgspec.json.encode(steps[0]))


def test_a_disk_that_is_too_small_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(bench_export.shutil, "disk_usage", lambda path: usage(60e9, 20e9, 40e9))
    result = CliRunner().invoke(main, ["bench-export", "--work", str(tmp_path)])
    assert result.exit_code == 1
    assert "need 44.9 GB and 40.0 GB are free; choose another disk with --work" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("in_this_process")
def test_a_step_that_fails_ends_the_measurement_and_names_its_command(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    steps = bench_exports(
        tmp_path / "work", preset_name="nano", checkpoint=tmp_path / "empty", precisions=("fp16",), keep=False
    )
    with pytest.raises(bench_export.BenchExportError, match=r"`worldvln-edge export .* ended with status 1, .* above"):
        next(steps)
    assert (tmp_path / "empty").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8"], "'int8' is not one of 'fp32', 'fp16', 'bf16', 'int4'"),
        (["--preset", "giant"], "'giant' is not one of"),
        (["--checkpoint", "/nowhere"], "'/nowhere' does not exist"),
    ],
)
def test_wrong_use_is_said(arguments: list[str], message: str, tmp_path: Path):
    result = CliRunner().invoke(main, ["bench-export", "--work", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
def test_the_smallest_preset_is_measured_from_the_command_line(tmp_path: Path):
    """The whole command as it is typed, every step in its own process."""
    command = ["bench-export", "--preset", "nano", "--precision", "int4", "--work", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    made, exported = msgspec.json.decode(result.stdout, type=list[ExportStep])
    assert (made.step, exported.step) == ("make-checkpoint nano", "export int4")
    assert exported.bytes < made.bytes
    assert exported.backbone_bytes is not None
    assert exported.backbone_bytes < exported.bytes
    assert not list(tmp_path.iterdir())
