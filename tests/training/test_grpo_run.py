"""A GRPO run: what it writes, that it goes on where it was stopped, and when it ends by itself."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import grpo_program
import pytest
import torch
from grpo_program import train
from safetensors.torch import load_file

from worldvln_edge.training.grpo.evaluating import Evaluations
from worldvln_edge.training.grpo.scored_collection import GrpoError
from worldvln_edge.training.trainer.run_folder import WorkFolderError
from worldvln_edge.training.trainer.trainer import TrainingStoppedError
from worldvln_edge.training.trainer.training_checkpoint import Best

TESTS = Path(grpo_program.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS)}
NUMBERS = ("reward", "success", "drift", "loss", "k3", "clipped", "anchor", "held_out_reward", "held_out_difference")


@pytest.fixture(scope="module")
def unbroken(one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(folder)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "collections.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(folder: Path) -> list[list[float | None]]:
    return [[row.get(name) for name in NUMBERS] for row in rows(folder)]


def run_program(folder: Path, options: dict) -> int:
    program = [sys.executable, grpo_program.__file__, str(folder), json.dumps(options)]
    return subprocess.run(program, env=ENVIRONMENT, timeout=600).returncode


def test_a_run_collects_learns_evaluates_and_says_so(unbroken):
    folder, result = unbroken
    table = rows(folder)
    assert [row["collection"] for row in table] == [0, 1, 2]
    assert result.collections == 2
    assert result.steps == table[-1]["step"] == 8  # 2 collections, 2 passes, 18 samples in steps of 9
    assert [row["environment_steps_total"] for row in table] == [0, 72, 144]
    for row in table[1:]:
        assert row["flights"] == 6
        assert row["failed"] == 0
        assert row["drift"] < 1e-3
        assert row["steps_per_s"] > 0
        assert 0 < row["learner_share"] < 1
        assert row["k3"] > 0
        assert row["anchor"] > 0
    assert "held_out_difference" not in table[0]
    assert table[2]["held_out_difference"] == pytest.approx(
        table[2]["held_out_reward"] - table[0]["held_out_reward"], abs=1e-9
    )
    losses = [json.loads(line) for line in (folder / "loss_curve.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == list(range(1, 9))
    assert (folder / "collections.png").stat().st_size > 1000


def test_the_step_with_the_best_held_out_reward_is_what_comes_out(unbroken):
    folder, result = unbroken
    table = rows(folder)
    best = max(table, key=lambda row: row["held_out_reward"])
    assert result.best_step == best["step"]
    start = grpo_program.random_policy().world_model.state_dict()
    is_start = all(torch.equal(result.weights[name], tensor) for name, tensor in start.items())
    assert is_start == (best["step"] == 0)


def test_averaged_weights_are_evaluated_and_come_out_and_others_fly_collections(
    one_thread, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(Evaluations, "best", lambda self, step: Best(metric="held_out_reward", value=0.0, step=step))
    averaged = {"ema_decay": 0.9, "learning_rate": 3e-3}
    plain = train(tmp_path / "plain", **averaged | {"ema_decay": 0.0})
    result = train(tmp_path / "averaged", **averaged)
    pairs = list(zip(rows(tmp_path / "plain"), rows(tmp_path / "averaged"), strict=True))
    for own, other in pairs:
        assert [own.get(name) for name in ("reward", "loss", "k3")] == [other.get(n) for n in ("reward", "loss", "k3")]
    assert [own["held_out_reward"] == other["held_out_reward"] for own, other in pairs] == [True, False, False]
    assert result.best_step == plain.best_step == 8
    start = grpo_program.random_policy().world_model.state_dict()
    far, near = (
        max(float((one.weights[name] - tensor).abs().max()) for name, tensor in start.items())
        for one in (plain, result)
    )
    assert 0 < near < 0.7 * far


@pytest.mark.slow
def test_a_run_with_averaged_weights_that_was_killed_goes_on_with_the_same_numbers(one_thread, tmp_path: Path):
    whole = train(tmp_path / "whole", ema_decay=0.9)
    assert run_program(tmp_path / "killed", {"die_at": 15, "ema_decay": 0.9}) == -signal.SIGKILL
    again = train(tmp_path / "killed", ema_decay=0.9)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(unbroken, tmp_path: Path):
    folder, result = unbroken
    again = train(tmp_path / "again")
    assert numbers(tmp_path / "again") == numbers(folder)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in result.weights.items())
    train(tmp_path / "other", seed=2, collections=1)
    assert numbers(tmp_path / "other")[1] != numbers(folder)[1]


@pytest.mark.parametrize(
    "die_at",
    [pytest.param(2, marks=pytest.mark.slow), 7, pytest.param(15, marks=pytest.mark.slow)],
    ids=["evaluating the start", "first collection", "second collection"],
)
def test_a_run_that_was_killed_while_it_flew_goes_on_with_the_same_numbers(unbroken, tmp_path: Path, die_at: int):
    """4 flights evaluate the start, then come 6 of a collection and 4 of the next evaluation."""
    assert run_program(tmp_path, {"die_at": die_at}) == -signal.SIGKILL
    flown = sorted(tmp_path.glob("*/*/flights/*.safetensors"))
    times = {file: file.stat().st_mtime_ns for file in flown}
    train(tmp_path)
    assert numbers(tmp_path) == numbers(unbroken[0])
    kept = {file: file.stat().st_mtime_ns for file in flown if file.exists()}
    assert all(times[file] == time for file, time in kept.items())


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [1, 6])
def test_a_run_that_was_killed_while_it_learnt_goes_on_with_the_same_numbers(unbroken, tmp_path: Path, die_at: int):
    assert run_program(tmp_path, {"die_at_step": die_at, "trainer": {"save_every": 1}}) == -signal.SIGKILL
    saved = sorted(int(path.name[5:]) for path in tmp_path.glob("checkpoints/step-*"))
    assert saved[-1] == die_at - 1
    train(tmp_path)
    assert numbers(tmp_path) == numbers(unbroken[0])


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_says_so_and_goes_on(unbroken, tmp_path: Path):
    def ask(name: str) -> None:
        signal.raise_signal(signal.SIGTERM)

    for _ in range(3):
        with pytest.raises(TrainingStoppedError, match=r"stopped after step 0, which is saved in .*; the same command"):
            train(tmp_path, before=ask, collections=1)
    assert len(list(tmp_path.glob("evaluations/step-00000000/flights/*.safetensors"))) == 3
    train(tmp_path, collections=1)
    assert numbers(tmp_path)[0] == numbers(unbroken[0])[0]


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(unbroken, tmp_path: Path):
    train(tmp_path, collections=1)
    result = train(tmp_path, collections=2)
    assert result.collections == 2
    assert numbers(tmp_path) == numbers(unbroken[0])


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(tmp_path: Path):
    train(tmp_path, collections=1, evaluation={"every": 0, "tasks": 1, "rollouts": 1})
    with pytest.raises(WorkFolderError, match=r"holds another run: config.candidates: 3 there, 4 here"):
        train(tmp_path, collections=1, candidates=4)
    with pytest.raises(WorkFolderError, match=r"holds another run: held_out: "):
        train(tmp_path, collections=1, evaluation={"every": 0, "tasks": 1, "rollouts": 2})


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"k3_limit": 0.0}, r"mean k3 per bit of the last pass is .*, above grpo.k3_limit 0: the policy has moved"),
        pytest.param(
            {"clipped_limit": 0.0, "objective": {"eps": 1e-7}},
            "share of clipped ratios of the last pass is 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_policy_that_moves_too_far_ends_the_run(tmp_path: Path, limits: dict, reason: str):
    result = train(tmp_path, **limits, evaluation={"every": 0, "tasks": 1, "rollouts": 1})
    assert result.collections == 1
    assert re.search(reason, result.stopped_by)
    again = train(tmp_path, **limits, evaluation={"every": 0, "tasks": 1, "rollouts": 1})
    assert (again.steps, again.stopped_by) == (result.steps, result.stopped_by)


@pytest.mark.slow
def test_scores_that_are_gone_in_the_middle_of_a_collection_are_named(tmp_path: Path):
    assert run_program(tmp_path, {"die_at_step": 2, "trainer": {"save_every": 1}}) == -signal.SIGKILL
    (tmp_path / "collections/000000/scores.safetensors").unlink()
    with pytest.raises(GrpoError, match=r"000000/scores.safetensors is gone, .* delete that checkpoint to go on"):
        train(tmp_path)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(unbroken, tmp_path: Path):
    program = [grpo_program.__file__, str(tmp_path), "{}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run([*launcher, *program], env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    for one, other in zip(numbers(tmp_path), numbers(unbroken[0]), strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    weights = load_file(tmp_path / "weights.safetensors")
    for name, tensor in unbroken[1].weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-3)
