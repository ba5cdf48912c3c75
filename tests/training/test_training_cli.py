"""`fly`, `eval`, `train` and `demo` on the command line: results on stdout, one sentence when something is wrong."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from worldvln_edge.cli import main
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.tasks import write_task_list
from worldvln_edge.training.demo import demo_tasks, run_demo
from worldvln_edge.training.evaluation.bundle_source import SOURCE_FILE, ExportFailedError, bundle_source
from worldvln_edge.training.evaluation.served_bundle import ServedBundleError, serve_bundle
from worldvln_edge.training.sim.flights import FlightsConfig, generate_flights
from worldvln_edge.training.sim.tasks import generate_task


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    write_task_list([generate_task("test", index) for index in (0, 9)], path)
    return str(path)


@pytest.fixture(scope="module")
def server():
    with BackgroundServer(NullPolicy(image_hw=(16, 16))) as server:
        yield server


@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flights")
    generate_flights(FlightsConfig(split="train", image_hw=(8, 8)), 18, folder, workers=1, show_progress=False)
    return str(folder)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_sentence(result, *parts):
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if not line.startswith("tasks:") and line]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("command", ["fly", "eval", "train", "demo"])
def test_help_shows_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: worldvln-edge {command}" in result.output


def test_commands_load_neither_torch_nor_the_simulator_until_they_are_used():
    program = "import sys, worldvln_edge.training.cli; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnxruntime", "mujoco", "matplotlib", "av"} & set(loaded)


def test_fly_writes_everything_and_prints_the_table_and_the_pictures(server, task_file, tmp_path):
    result = invoke("fly", "--server", server.url, "--tasks", task_file, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "0 of 2 flights succeeded" in result.stdout
    names = {path.name for path in tmp_path.iterdir()}
    stems = ("test-000000", "test-000009")
    assert names == {"summary.json", "index.png"} | {
        f"{stem}{end}" for stem in stems for end in ("_actions.json", "_poses.json", ".png", ".mp4")
    }
    for name in names:
        if name.endswith((".png", ".mp4")):
            assert str(tmp_path / name) in result.stdout


def test_fly_prints_its_summary_as_json(server, task_file, tmp_path):
    result = invoke("fly", "--server", server.url, "--tasks", task_file, "--out", tmp_path, "--no-video", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "summary.json").read_text())
    assert not list(tmp_path.glob("*.mp4"))


def test_fly_without_a_server_says_so(task_file, tmp_path):
    result = invoke("fly", "--server", "ws://127.0.0.1:9", "--tasks", task_file, "--out", tmp_path)
    assert_one_sentence(result, "no worldvln-edge server answers at ws://127.0.0.1:9", "worldvln-edge serve")


def test_fly_refuses_frames_that_the_camera_cannot_give(task_file, tmp_path):
    with BackgroundServer(NullPolicy(image_hw=(6000, 6000))) as server:
        result = invoke("fly", "--server", server.url, "--tasks", task_file, "--out", tmp_path)
    assert_one_sentence(result, "frames of 6000x6000")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{truncated", "not JSON"),
        (b'[{"instruction": "go"}]', '"initial_pos" is missing'),
        (b'{"instruction": "go", "initial_pos": [0, 0, 200, 0, 0, 0]}', "names no scene"),
    ],
)
def test_fly_refuses_a_corrupt_task_file(content, message, tmp_path):
    path = tmp_path / "tasks.json"
    path.write_bytes(content)
    assert_one_sentence(invoke("fly", "--tasks", path, "--out", tmp_path), message)


def test_fly_names_a_task_file_that_is_missing(tmp_path):
    assert_one_sentence(invoke("fly", "--tasks", tmp_path / "none.json"), "none.json", "no such file")


def test_eval_writes_the_tables_that_it_prints(server, flights, tmp_path):
    result = invoke(
        "eval", "--server", server.url, "--count", 4, "--workers", 1, "--train-flights", flights, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    cells = [line.strip("| ").split(" | ") for line in (tmp_path / "eval.md").read_text().splitlines()]
    printed = " ".join(result.stdout.split())
    assert all(" ".join(" ".join(row).split()) in printed for row in cells if len(row) > 1 and row[0] != "---")
    record = json.loads((tmp_path / "eval.json").read_text())
    assert list(record["rows"]) == [
        "policy",
        "shuffled text",
        "teacher-forced policy",
        "expert",
        "zero",
        "mean",
        "mean per kind",
        "mean per kind and magnitude",
    ]
    assert record["rows"]["expert"]["all"]["success_rate"] == 1.0
    assert record["rows"]["policy"]["all"]["mean_distance_m"] > 0
    assert len(record["flights"]) == 8 * 4


def test_eval_flies_the_policy_alone_without_baselines(server, tmp_path):
    result = invoke(
        "eval", "--server", server.url, "--count", 2, "--workers", 1, "--no-baselines", "--out", tmp_path, "--json"
    )
    assert list(json.loads(result.stdout)["rows"]) == ["policy"]


def test_eval_names_what_is_missing(server, tmp_path):
    assert_one_sentence(invoke("eval", "--bundle", tmp_path), "is no bundle")
    assert_one_sentence(invoke("eval", "--server", "ws://127.0.0.1:9"), "no worldvln-edge server")
    assert_one_sentence(invoke("eval", "--server", server.url, "--train-flights", tmp_path), "holds no flight shards")
    assert invoke("eval").exit_code == 2


def test_demo_tasks_are_of_different_kinds_and_scenes():
    tasks = demo_tasks(8)
    assert len({task.kind for task in tasks}) == 8
    assert len({(task.scene.family, task.scene.seed) for task in tasks}) == 8
    assert {task.scene.family for task in tasks} == {"city", "rooms"}


def test_demo_needs_a_checkpoint(tmp_path):
    result = invoke("demo", "--checkpoint", tmp_path, "--out", tmp_path / "demo")
    assert_one_sentence(result, "is no checkpoint", "model.safetensors")


def test_demo_says_when_the_export_or_the_server_fails(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ExportFailedError, match=r"the export of .* ended with status 1"):
        run_demo(checkpoint, tmp_path / "demo", tasks=1)
    empty = tmp_path / "bundle"
    empty.mkdir()
    with pytest.raises(ServedBundleError, match=r"before it was ready: error: .* is no bundle"):
        serve_bundle(empty, tmp_path / "server.log").__enter__()


def assert_demo_succeeded(result, out):
    """The printed table, summary.json with everything it promises, and the pictures."""
    assert result.exit_code == 0, result.output
    assert re.search(r"^[01] of 1 flights succeeded", result.stdout, re.MULTILINE)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    (flight,) = summary["flights"]
    assert set(flight) == {
        "task",
        "instruction",
        "kind",
        "success",
        "final_distance_m",
        "final_yaw_error_deg",
        "segments",
        "latency_ms_p50",
        "latency_ms_p95",
    }
    (task,) = demo_tasks(1)
    assert (flight["task"], flight["kind"], flight["instruction"]) == (task.task_id, task.kind, task.instruction)
    assert flight["segments"] == 3
    assert isinstance(flight["success"], bool)
    assert summary["success_rate"] == float(flight["success"])
    assert 0 < flight["latency_ms_p50"] <= flight["latency_ms_p95"]
    assert 0 <= flight["final_yaw_error_deg"] <= 180
    assert flight["final_distance_m"] >= 0
    assert min(summary["bundle_mb"], summary["checkpoint_mb"], summary["server_rss_mb"]) > 0
    for name in ("index.png", "test-000000.png", "test-000000_actions.json", "test-000000_poses.json", "server.log"):
        assert (out / name).stat().st_size > 0
    assert not list(out.glob("*.mp4"))


def test_demo_serves_flies_and_says_how_it_went(tiny_checkpoint, tiny_bundle, tmp_path):
    """Real server, real simulator; the bundle was exported before, which takes longer than the rest."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / SOURCE_FILE).write_text(json.dumps(bundle_source(tiny_checkpoint)))
    manifest = (bundle / "manifest.json").stat()
    result = invoke("demo", "--checkpoint", tiny_checkpoint, "--out", tmp_path, "--tasks", 1, "--no-video")
    assert_demo_succeeded(result, tmp_path)
    assert (bundle / "manifest.json").stat().st_ino == manifest.st_ino  # nothing had changed, so the bundle was kept


@pytest.mark.slow
def test_demo_flies_the_packaged_checkpoint(tmp_path):
    result = invoke("demo", "--out", tmp_path, "--tasks", 1, "--no-video")
    assert_demo_succeeded(result, tmp_path)
    assert (tmp_path / "bundle" / SOURCE_FILE).is_file()
    assert json.loads((tmp_path / "summary.json").read_text())["model"] == "nano"
