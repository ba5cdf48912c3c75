"""Runs that are interrupted go on as if nothing had happened: kill -9, SIGTERM, full disks, broken files."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import curve_fit_stage
import pytest
import torch
from curve_fit_stage import CurveFitStage, train
from safetensors.torch import load_file
from torchrun_processes import DEADLINE_S

from worldvln_edge.training.trainer.distributed import Ranks
from worldvln_edge.training.trainer.ema import MovingAverage
from worldvln_edge.training.trainer.run_folder import WorkFolderError, differences, identity_hash, open_run
from worldvln_edge.training.trainer.training_checkpoint import (
    CheckpointReadError,
    CheckpointWriteError,
    Progress,
    TrainingCheckpoints,
)

OPTIONS = {"optimiser": {"steps": 40, "ema_decay": 0.9}, "trainer": {"log_every": 3, "save_every": 5}}


def _program(folder: Path, options: dict, **process) -> subprocess.Popen:
    command = [sys.executable, curve_fit_stage.__file__, str(folder), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **process)


def _rows(folder: Path) -> list[dict]:
    """The curve without what the clock says."""
    lines = (folder / "loss_curve.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "rows_per_s")} for line in lines]


def _steps_saved(folder: Path) -> list[int]:
    return TrainingCheckpoints(folder / "checkpoints", Ranks(), keep_last=9, run_sha256="").steps()


def _assert_same(one: Path, other: Path) -> None:
    left, right = _rows(one), _rows(other)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for row, wanted in zip(left, right, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, dict(train(folder, **OPTIONS).weights)


def test_killed_runs_go_on_with_the_same_losses_and_weights(unbroken, tmp_path: Path):
    """Killed with -9 at four moments, whatever it was doing; each start goes on from the last checkpoint."""
    paused = {**OPTIONS, "pause_s": 0.01}
    found = []
    for wait_s in (0.05, 0.3, 0.1, 0.35):
        before = _steps_saved(tmp_path)
        process = _program(tmp_path, paused)
        begun = time.monotonic()
        while process.poll() is None and _steps_saved(tmp_path) == before and time.monotonic() < begun + DEADLINE_S:
            time.sleep(0.01)
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(_steps_saved(tmp_path)[-1])
    assert found == sorted(found)
    assert found[0] >= 5
    process = _program(tmp_path, OPTIONS)
    assert process.communicate(timeout=DEADLINE_S)[1] == ""
    _assert_same(tmp_path, unbroken[0])
    weights = load_file(tmp_path / "weights.safetensors")
    assert all(torch.allclose(weights[name], unbroken[1][name], rtol=0, atol=1e-6) for name in weights)


def test_sigterm_saves_the_last_step_and_the_run_goes_on(unbroken, tmp_path: Path):
    process = _program(tmp_path, {**OPTIONS, "pause_s": 0.03})
    while not (tmp_path / "loss_curve.jsonl").exists() or len(_rows(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 1
    (step,) = _steps_saved(tmp_path)[-1:]
    assert errors.strip() == (
        f"error: sft: stopped after step {step}, which is saved in {tmp_path}; the same command goes on from there"
    )
    assert train(tmp_path, **OPTIONS).steps == 40
    _assert_same(tmp_path, unbroken[0])


def test_a_finished_run_is_not_repeated(unbroken, tmp_path: Path):
    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    again = train(tmp_path, **OPTIONS)
    assert all(torch.equal(again.weights[name], unbroken[1][name]) for name in unbroken[1])
    assert _rows(tmp_path) == _rows(unbroken[0])


def test_a_step_that_was_not_saved_is_repeated_once_in_the_curve(unbroken, tmp_path: Path):
    """As after a kill between the last row and the last checkpoint; the last line is cut off too."""
    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000040")
    with (tmp_path / "loss_curve.jsonl").open("a") as stream:
        stream.write('{"stage": "sft", "st')
    train(tmp_path, **OPTIONS)
    assert _rows(tmp_path) == _rows(unbroken[0])


def test_what_a_kill_left_half_written_is_no_checkpoint(unbroken, tmp_path: Path):
    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000040").rename(checkpoints / ".step-00000040.building")
    (checkpoints / ".step-00000040.building" / "progress.json").unlink()
    (checkpoints / "step-00000099").mkdir()
    train(tmp_path, **OPTIONS)
    assert _rows(tmp_path) == _rows(unbroken[0])
    assert not list(checkpoints.glob(".*"))


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path):
    """No file of the process may grow beyond 3 kB: a checkpoint of this network cannot be written."""
    options = {"optimiser": {"steps": 12}, "trainer": {"save_every": 4}}
    train(tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    before = sorted(path.name for path in (tmp_path / "checkpoints").rglob("*"))

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    process = _program(tmp_path, options, preexec_fn=limit_files)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert errors.startswith(f"error: {tmp_path}/checkpoints: the checkpoint step-00000012 could not be written (")
    assert "a checkpoint of this run needs" in errors
    assert errors.endswith("GB; the checkpoint of step 8 is whole. Make room and give the same command again\n")
    assert sorted(path.name for path in (tmp_path / "checkpoints").rglob("*")) == before
    assert train(tmp_path, **options).steps == 12


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path):
    stage = CurveFitStage()
    optimiser = torch.optim.AdamW(stage.network.parameters())
    (tmp_path / "file").touch()
    checkpoints = TrainingCheckpoints(tmp_path / "file", Ranks(), keep_last=1, run_sha256="")
    message = r"step-00000003 could not be written \(.*Not a directory.*\); there is no earlier one"
    with pytest.raises(CheckpointWriteError, match=message):
        checkpoints.save(Progress(step=3, epoch=0, step_in_epoch=3), stage.network, optimiser, None)


@pytest.mark.parametrize("damage", ["progress.json", ".metadata", "__0_0.distcp", "missing"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path: Path, damage: str):
    train(tmp_path, optimiser={"steps": 4})
    folder = tmp_path / "checkpoints" / "step-00000004"
    if damage == "missing":
        (folder / "__0_0.distcp").unlink()
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:40])
    with pytest.raises(CheckpointReadError, match=r"step-00000004 cannot be read \(.+\); delete it to go on from"):
        train(tmp_path, optimiser={"steps": 4})


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    train(tmp_path / "one", optimiser={"steps": 4})
    train(tmp_path / "other", optimiser={"steps": 4, "clip_norm": 2.0})
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "one" / "checkpoints")
    with pytest.raises(CheckpointReadError, match="it is of another recipe, seed or data"):
        train(tmp_path / "one", optimiser={"steps": 4})


def test_averages_are_needed_where_the_checkpoint_has_none(tmp_path: Path):
    stage = CurveFitStage()
    optimiser = torch.optim.AdamW(stage.network.parameters())
    checkpoints = TrainingCheckpoints(tmp_path, Ranks(), keep_last=1, run_sha256="")
    checkpoints.save(Progress(step=1, epoch=0, step_in_epoch=1), stage.network, optimiser, None)
    with pytest.raises(CheckpointReadError, match=r"average/"):
        checkpoints.load(1, stage.network, optimiser, MovingAverage(stage.network, 0.9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": {"steps": 4, "learning_rate": 0.02}}, "optimiser.learning_rate: 0.01 there, 0.02 here"),
        ({"optimiser": {"steps": 4, "clip_norm": 2}}, "optimiser.clip_norm: 1.0 there, 2.0 here"),
        ({"trainer": {"precision": "bf16"}}, "precision: fp32 there, bf16 here"),
    ],
)
def test_the_folder_of_another_run_is_refused_with_what_differs(tmp_path: Path, change: dict, message: str):
    train(tmp_path, optimiser={"steps": 4})
    with pytest.raises(WorkFolderError, match=f"holds another run: {message}. Give another --work folder"):
        train(tmp_path, **({"optimiser": {"steps": 4}} | change))


def test_how_a_run_is_watched_may_change(tmp_path: Path):
    train(tmp_path, optimiser={"steps": 4}, trainer={"log_every": 1})
    assert train(tmp_path, optimiser={"steps": 4}, trainer={"log_every": 2, "save_every": 3}).steps == 4


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "describes no run"), (None, "but no run.json that says which")]
)
def test_the_folder_of_an_unknown_run_is_refused(tmp_path: Path, content: str | None, message: str):
    (tmp_path / "checkpoints").mkdir()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(WorkFolderError, match=message):
        train(tmp_path)


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path):
    process = _program(tmp_path, {**OPTIONS, "pause_s": 0.2})
    while not (tmp_path / "run.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(WorkFolderError, match="is in use by another training process; wait for it to end"):
        train(tmp_path, **OPTIONS)
    process.kill()
    process.wait()
    with open_run(tmp_path, json.loads((tmp_path / "run.json").read_bytes()), Ranks()):
        pass


def test_workers_of_a_killed_process_do_not_keep_its_folder(tmp_path: Path):
    options = {**OPTIONS, "trainer": {**OPTIONS["trainer"], "workers": 1}}
    process = _program(tmp_path, {**options, "pause_s": 0.05})
    while not _steps_saved(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert train(tmp_path, **options).steps == 40


def test_a_work_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "work").touch()
    with pytest.raises(WorkFolderError, match="work cannot be used as a work folder"):
        train(tmp_path / "work")


def test_differences_are_listed_by_path():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x" * 60}, "gone": None}
    new = {"a": 1, "b": {"c": [1, 3], "d": "x" * 60}, "new": True}
    assert differences(old, new) == [
        "b.c: [1,2] there, [1,3] here",
        "gone: null there, nothing here",
        "new: nothing there, true here",
    ]
    assert differences(old, old) == []


def test_the_hash_of_an_identity_does_not_depend_on_the_order_of_its_keys():
    assert identity_hash({"a": 1, "b": (1, 2)}) == identity_hash({"b": [1, 2], "a": 1})
    assert identity_hash({"a": 1}) != identity_hash({"a": 2})
