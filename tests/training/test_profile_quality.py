"""`worldvln-edge profiles`, and profiles flown by `eval` and `fly`: what was flown stands in the report."""

import json
import math
import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from worldvln_edge.cli import main
from worldvln_edge.runtime.bench.report_table import render
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.tasks import write_task_list
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight, success_difference
from worldvln_edge.training.evaluation.profile_quality import (
    ProfileQualityConfig,
    ProfileQualityReport,
    measure_profiles,
)
from worldvln_edge.training.evaluation.profile_tables import profile_parts
from worldvln_edge.training.sim.tasks import generate_task

OWN = '[{"name": "coarse", "skipped_scales": 1}]'


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_of(result) -> str:
    """The one sentence that a user reads."""
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line]
    assert line.startswith("error: ")
    return line


@pytest.fixture
def own_profiles(tmp_path) -> Path:
    path = tmp_path / "profiles.json"
    path.write_text(OWN)
    return path


@pytest.fixture(scope="module")
def report(tiny_bundle) -> ProfileQualityReport:
    config = ProfileQualityConfig(flights=1, tasks=2, threads=1)
    return measure_profiles(tiny_bundle, config, show_progress=False)


def flights(*successes: bool) -> list[EvalFlight]:
    return [
        EvalFlight(
            row="policy",
            task=f"task-{number}",
            kind="forward",
            landmark=None,
            instruction="fly",
            success=success,
            collided=False,
            final_distance_m=1.0,
            oracle_success=success,
            final_yaw_error_deg=2.0,
            oracle_distance_m=1.0,
            path_length_m=5.0,
            spl=0.5,
            ndtw=0.5,
            sdtw=0.5,
        )
        for number, success in enumerate(successes)
    ]


def test_difference_of_success_counts_the_tasks_that_changed():
    found = success_difference(flights(True, True, False, True), flights(True, False, False, False))
    assert (found.gained, found.lost, found.difference) == (2, 0, 0.5)
    half = 1.959964 * math.sqrt(3 - 4 / 6) / 6  # Agresti and Min: half a task more in each of the four outcomes
    assert found.interval == pytest.approx((2 / 6 - half, 2 / 6 + half), abs=1e-4)


def test_rows_that_end_alike_differ_by_nothing_and_more_tasks_say_so_more_surely():
    few, many = flights(True, False), flights(*[True, False] * 50)
    narrow, wide = success_difference(many, many), success_difference(few, few)
    assert narrow.difference == wide.difference == 0.0
    assert -wide.interval[0] == wide.interval[1] > narrow.interval[1] == -narrow.interval[0] > 0.0


def test_difference_needs_the_same_tasks():
    with pytest.raises(ValueError, match="only rows with the same tasks"):
        success_difference(flights(True), flights(True, False))
    with pytest.raises(ValueError, match="no tasks to compare success on"):
        success_difference([], [])


def test_report_holds_every_profile_against_exact(report):
    names = [quality.measured.profile.name for quality in report.profiles]
    assert names == ["exact", "balanced", "fast"]
    assert (report.flights, report.segments, report.tasks) == (1, 3, 2)
    exact, *others = report.profiles
    assert exact.measured.agreement.bits_equal == 1.0
    assert exact.closed_loop.against_exact is None
    assert [quality.speed_goal for quality in report.profiles] == [None, 2.0, 5.0]
    for quality in others:
        loop = quality.closed_loop
        assert loop.outcome.flights == 2
        changed = loop.against_exact.gained - loop.against_exact.lost
        assert loop.against_exact.difference == pytest.approx(
            loop.outcome.success_rate - exact.closed_loop.outcome.success_rate
        )
        assert loop.against_exact.difference == changed / 2


def test_goal_says_what_reaches_it(report):
    def shown(segment: float, world_model: float) -> str:
        balanced = report.profiles[1]
        speed = msgspec.structs.replace(
            balanced.measured.speed, segment_speed_up=segment, world_model_speed_up=world_model
        )
        measured = msgspec.structs.replace(balanced.measured, speed=speed)
        changed = msgspec.structs.replace(balanced, measured=measured)
        return render(profile_parts(msgspec.structs.replace(report, profiles=(report.profiles[0], changed))))

    assert "2: reached" in shown(2.0, 3.0)
    assert "2: world model only" in shown(1.9, 2.1)
    assert "2: missed" in shown(1.9, 1.9)


def test_profiles_prints_the_tables_that_it_writes(tiny_bundle, own_profiles, tmp_path):
    out = tmp_path / "profiles.md"
    result = invoke(
        "profiles", tiny_bundle, "--flights", 1, "--tasks", 0, "--threads", 1, "--profiles", own_profiles,
        "--markdown", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "No tasks were flown" in result.stdout
    markdown = out.read_text()
    assert "| exact | 100.0% | 100.0% | 100.0% |" in markdown
    assert "| coarse | 100.0% | 100.0% | - |" in markdown
    assert "| coarse | all | all | 1 | fp32 |" in markdown
    assert "exact, other draws" in result.stdout


def test_profiles_prints_json(tiny_bundle):
    result = invoke("profiles", tiny_bundle, "--flights", 1, "--tasks", 0, "--threads", 1, "--json")
    report = msgspec.json.decode(result.stdout, type=ProfileQualityReport)
    assert [quality.closed_loop for quality in report.profiles] == [None] * 3


def test_profiles_names_what_is_wrong(tiny_bundle, tmp_path):
    assert "is no bundle" in error_of(invoke("profiles", tmp_path))
    path = tmp_path / "profiles.json"
    path.write_text('[{"name": "a", "depth": 1}]')
    assert "unknown field `depth`" in error_of(invoke("profiles", tiny_bundle, "--profiles", path))
    path.write_text('[{"name": "a", "skipped_scales": 3}]')
    assert "skips 3 scales of 3" in error_of(invoke("profiles", tiny_bundle, "--profiles", path))
    path.write_text('[{"name": "a", "precision": "int4"}]')
    assert "name that bundle with --also" in error_of(invoke("profiles", tiny_bundle, "--profiles", path))
    alike = invoke("profiles", tiny_bundle, "--also", tiny_bundle)
    assert "both are fp32; name an export of another precision" in error_of(alike)
    assert "worldvln-edge profiles" in invoke("profiles", "--help").stdout
    assert invoke("profiles", tiny_bundle, "--flights", 0).exit_code == 2


def test_eval_flies_the_profile_and_says_so(tiny_bundle, own_profiles, tmp_path):
    common = ("eval", "--bundle", tiny_bundle, "--count", 1, "--workers", 1, "--no-baselines", "--out", tmp_path)
    result = invoke(*common, "--profile", "coarse", "--profiles", own_profiles)
    assert result.exit_code == 0, result.output
    assert "with profile coarse" in result.stdout
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["profiles"] == ["coarse"]
    assert record["flights"][0]["profiles"] == ["coarse"]
    assert json.loads(invoke(*common, "--json").stdout)["profiles"] == ["exact"]


def test_eval_refuses_a_profile_that_it_cannot_fly(tiny_bundle, tmp_path):
    unknown = invoke("eval", "--bundle", tiny_bundle, "--profile", "deep", "--no-baselines", "--out", tmp_path)
    assert "unknown profile 'deep'; choose one of exact, balanced, fast" in error_of(unknown)
    remote = invoke("eval", "--server", "ws://127.0.0.1:9", "--profile", "fast")
    assert remote.exit_code == 2
    assert "worldvln-edge serve BUNDLE --profile NAME" in " ".join(remote.output.split())


def test_fly_serves_the_bundle_with_the_profile(tiny_bundle, own_profiles, tmp_path):
    tasks = tmp_path / "tasks.json"
    write_task_list([generate_task("test", 0)], tasks)
    out = tmp_path / "flown"
    result = invoke(
        "fly", "--bundle", tiny_bundle, "--profile", "coarse", "--profiles", own_profiles, "--tasks", tasks,
        "--out", out, "--no-video",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "profile coarse" in result.stdout
    assert json.loads((out / "summary.json").read_text())["profiles"] == ["coarse"]
    assert (out / "server.log").is_file()


def test_fly_through_a_server_reports_what_the_server_flew(tmp_path):
    tasks = tmp_path / "tasks.json"
    write_task_list([generate_task("test", 0)], tasks)
    with BackgroundServer(NullPolicy(image_hw=(16, 16))) as server:
        result = invoke("fly", "--server", server.url, "--tasks", tasks, "--out", tmp_path, "--no-video", "--json")
    assert json.loads(result.stdout)["profiles"] == ["exact"]


def test_fly_refuses_what_does_not_go_together(tiny_bundle, tmp_path):
    tasks = tmp_path / "tasks.json"
    write_task_list([generate_task("test", 0)], tasks)
    unknown = invoke("fly", "--bundle", tiny_bundle, "--profile", "deep", "--tasks", tasks, "--out", tmp_path)
    assert "unknown profile 'deep'" in error_of(unknown)
    alone = invoke("fly", "--profile", "fast", "--tasks", tasks)
    assert alone.exit_code == 2
    assert "a server flies as it was started" in " ".join(alone.output.split())
    both = invoke("fly", "--bundle", tiny_bundle, "--server", "ws://127.0.0.1:9", "--tasks", tasks)
    assert both.exit_code == 2
    assert "give either --server URL or --bundle DIR" in both.output


def test_fly_says_why_its_server_did_not_start(tiny_bundle, tmp_path):
    """A bundle that is whole, whose measured times belong to another one."""
    from worldvln_edge.bundle import Bundle
    from worldvln_edge.runtime.worldvln.latency_model import device_name, new_model, write_model

    tasks = tmp_path / "tasks.json"
    write_task_list([generate_task("test", 0)], tasks)
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = write_model(bundle, new_model(Bundle.open_manifest(bundle), device_name(), 0, ()))
    path.write_text("{}")
    result = invoke("fly", "--bundle", bundle, "--tasks", tasks, "--out", tmp_path / "out")
    assert "before it was ready: error: " in error_of(result)
    assert "worldvln-edge tune" in error_of(result)
