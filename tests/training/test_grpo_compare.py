"""`train grpo-compare` and `train grpo` around their runs: comparing checkpoints, and what is said before flying."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from grpo_flights import expert_task
from grpo_program import MODEL, NoiseFlier, random_policy, tasks
from safetensors.torch import load_file
from small_models import STATS, WORDS

from worldvln_edge.models.worldvln import save_checkpoint
from worldvln_edge.runtime.bench.report_table import render
from worldvln_edge.tasks import Task, write_task_list
from worldvln_edge.training.grpo.compare import compare_checkpoints
from worldvln_edge.training.grpo.comparison import comparison_parts, read_comparison, write_comparison
from worldvln_edge.training.grpo.evaluating import Evaluations
from worldvln_edge.training.grpo.grpo_config import EvaluationConfig, GrpoConfig
from worldvln_edge.training.grpo.grpo_setup import read_held_out_tasks, read_tasks
from worldvln_edge.training.grpo.rewards import RewardConfig
from worldvln_edge.training.grpo.scored_collection import GrpoError
from worldvln_edge.training.stages.tokenizer import build_word_tokenizer
from worldvln_edge.training.train_cli import train
from worldvln_edge.training.trainer.training_checkpoint import Best

CONFIG = GrpoConfig(rows=4, evaluation=EvaluationConfig(tasks=3, rollouts=2))
HELD_OUT = tuple(tasks(3, "held-out"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """A policy, the same one, and one whose semantic bits are less even; the last has a table of its training."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = build_word_tokenizer(WORDS, "<<<t=3s>>>", MODEL.text_encoder.vocabulary).to_str()
    for name, factor in (("first", 1.0), ("same", 1.0), ("other", 3.0)):
        model = random_policy()
        with torch.no_grad():
            model.world_model.semantic_head2.weight.mul_(factor)
        save_checkpoint(folder / name, model, STATS, tokenizer, dtype=torch.float32)
    rows = [{"collection": 0}, {"collection": 1, "clipped": 0.25, "environment_steps_total": 960.0}]
    (folder / "first" / "run.json").write_text('{"sft": {"seed": 0}}')
    (folder / "first" / "loss_curve.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 0.5}\n')
    (folder / "other" / "collections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / name for name in ("first", "same", "other")]


def compare(
    checkpoints: list[Path],
    work: Path,
    said: list[str],
    flown: Sequence[Task] = HELD_OUT,
    config: GrpoConfig = CONFIG,
):
    return compare_checkpoints(
        checkpoints,
        flown,
        config,
        lambda policy: NoiseFlier(policy, said.append),
        work,
        device=torch.device("cpu"),
    )


def test_checkpoints_are_compared_on_the_same_flights_and_a_comparison_goes_on(checkpoints: list[Path], tmp_path: Path):
    said: list[str] = []
    found = compare(checkpoints, tmp_path, said)
    first, same, other = found.policies
    assert first.reward_difference is first.k3 is first.clipped is None
    assert same.reward_difference is not None
    assert (same.reward_difference.mean, same.reward_difference.standard_error, same.k3) == (0, 0, 0)
    assert same.reward == first.reward
    assert other.reward_difference is not None
    assert other.reward_difference.mean == pytest.approx(other.reward - first.reward)
    assert (other.reward_difference.tasks, other.reward_difference.flights) == (3, 6)
    assert other.k3 is not None
    assert other.k3 > 1e-3
    assert (other.clipped, other.environment_steps) == (0.25, 960.0)
    flown = len(said)
    assert flown == 12  # two policies are the same, and so are their flights
    assert compare(checkpoints, tmp_path, said) == found
    assert len(said) == flown
    write_comparison(found, tmp_path)
    assert read_comparison(tmp_path) == found
    said_of, table, *savings = comparison_parts(found)
    assert said_of.startswith(
        f"3 tasks, 2 flights each, with the same seeds for every checkpoint; differences to {first.checkpoint}"
    )
    assert [row[0] for row in table.rows] == [str(path) for path in checkpoints]
    assert table.rows[0][3:6] == ("-", f"{first.success:.1%}", "-")
    assert table.rows[2][3].startswith(f"{other.reward_difference.mean:+.4f} ± 0.")
    assert table.rows[2][6:] == (f"{other.k3:.4f}", "0.250", "960")
    assert first.stopping is not None
    assert savings[0].startswith(f"Early stopping (budget, stall) would save {first.stopping.saved:.1%} of the ")
    assert (
        f"{first.stopping.stopped} of 6 flights, success {100 * first.stopping.success_difference.mean:+.1f}"
        in savings[0]
    )


def test_a_single_task_has_no_standard_error(checkpoints, tmp_path):
    found = compare(checkpoints[::2], tmp_path, [], HELD_OUT[:1])
    write_comparison(found, tmp_path)
    table = comparison_parts(read_comparison(tmp_path))[1]
    assert table.rows[1][3].endswith(" ± -")


def test_a_folder_without_a_comparison_is_named(tmp_path):
    with pytest.raises(GrpoError, match=r"comparison.json: No such file.*; give the --work folder of"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(GrpoError, match=r"comparison.json: no comparison"):
        read_comparison(tmp_path)


@pytest.mark.parametrize(
    ("missing", "rules"),
    [
        ({"end_pos": None}, ("budget",)),
        ({"reference_path_raw": ()}, ("stall",)),
        ({"end_pos": None, "reference_path_raw": ()}, None),
    ],
)
def test_early_stopping_is_said_of_the_rules_that_every_task_is_made_for(checkpoints, tmp_path, missing, rules):
    first_task, *others = HELD_OUT
    config = msgspec.structs.replace(CONFIG, reward=RewardConfig(weights={"collision": 1.0}))
    compared = compare(checkpoints[:2], tmp_path, [], [msgspec.structs.replace(first_task, **missing), *others], config)
    assert [one.stopping and one.stopping.rules for one in compared.policies] == [rules, rules]
    assert ("Early stopping" in render(comparison_parts(compared))) == (rules is not None)


def test_one_checkpoint_or_two_presets_cannot_be_compared(checkpoints: list[Path], tmp_path: Path):
    with pytest.raises(GrpoError, match="comparing takes at least two checkpoints"):
        compare(checkpoints[:1], tmp_path, [])
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoints[1].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = msgspec.structs.replace(
        MODEL, name="bigger", generation=msgspec.structs.replace(MODEL.generation, tau_video=0.9)
    )
    (other / "config.json").write_bytes(config.to_json())
    with pytest.raises(GrpoError, match=r"is of bigger, .*first of tiny, or sizes differ"):
        compare([checkpoints[0], other], tmp_path / "work", [])


def test_what_cannot_begin_is_said_before_anything_flies(checkpoints: list[Path], tmp_path: Path):
    def said(*options: str) -> str:
        arguments = ["grpo", "--checkpoint", str(checkpoints[0]), "--work", str(tmp_path / "work"), *options]
        result = CliRunner().invoke(train, arguments)
        assert result.exit_code != 0
        return str(result.exception) + result.output

    out = ["--out", str(tmp_path / "out")]
    assert "give --data FLIGHTS, or --set grpo.anchor=0 for none" in said(*out)
    assert "would replace" in said("--out", str(checkpoints[0]), "--set", "grpo.anchor=0")
    assert "unknown key grpo.candidate; did you mean candidates" in said(*out, "--set", "grpo.candidate=4")
    assert "grpo.candidates must be >= 2, found 1" in said(*out, "--set", "grpo.candidates=1")
    assert "no reward 'speed'; known are action" in said(*out, "--set", "grpo.reward.weights.speed=1")
    assert "grpo.policy_scales must be 1.." in said(*out, "--set", "grpo.policy_scales=9", "--set", "grpo.anchor=0")
    assert "aux is of the published objective only" in said(*out, "--set", "grpo.objective.aux=0.1")
    assert not (tmp_path / "work").exists()


def test_tasks_come_from_files_or_from_the_simulator(tmp_path: Path):
    listed = [expert_task(MODEL, task_id=f"t{i}") for i in range(3)]
    write_task_list(listed, tmp_path / "tasks.json")
    assert {task.task_id for task in read_tasks(tmp_path / "tasks.json", seed=0).take(0, 3)} == {"t0", "t1", "t2"}
    assert [task.task_id for task in read_held_out_tasks(tmp_path / "tasks.json", 2)] == ["t0", "t1"]
    with pytest.raises(GrpoError, match=r"tasks.json: 3 tasks, and 4 are to be evaluated; .* grpo.evaluation.tasks=3"):
        read_held_out_tasks(tmp_path / "tasks.json", 4)
    assert read_tasks(None, seed=0).fingerprint == "generated train"
    assert read_held_out_tasks(None, 1)[0].task_id == "validation-000000"


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_command_flies_the_simulator_learns_and_writes_the_policy_that_it_evaluated(
    checkpoints: list[Path], tmp_path: Path, one_thread, monkeypatch, decay: float
):
    """The last step is made the best one, whatever it was worth."""
    monkeypatch.setattr(Evaluations, "best", lambda self, step: Best(metric="held_out_reward", value=0.0, step=step))
    settings = {
        "collections": 1,
        "tasks": 2,
        "candidates": 4,
        "rows": 4,
        "anchor": 0,
        "ema_decay": decay,
        "learning_rate": 1e-2,
        "clipped_limit": 1,
        "k3_limit": 100,
        "evaluation.tasks": 1,
        "evaluation.rollouts": 2,
    }
    work, out = tmp_path / "work", tmp_path / "out"
    arguments = ["grpo", "--checkpoint", str(checkpoints[0]), "--work", str(work), "--out", str(out), "--threads", "1"]
    for name, value in settings.items():
        arguments += ["--set", f"grpo.{name}={value}"]
    result = CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "checkpoint of tiny, of step" in result.output
    [file] = (work / "grpo" / "evaluations").glob("step-*[1-9].json")
    flown = [json.loads(line) for line in (out / "collections.jsonl").read_text().splitlines()]
    assert [row["collection"] for row in flown] == [0, 1]
    assert file.stem == f"step-{flown[1]['step']:08d}"
    assert list(json.loads((out / "run.json").read_bytes())) == ["sft", "grpo"]
    curve = [json.loads(line)["stage"] for line in (out / "loss_curve.jsonl").read_text().splitlines()]
    assert curve[0] == "sft"
    assert set(curve[1:]) == {"grpo"}
    trained, first = (load_file(folder / "model.safetensors") for folder in (out, checkpoints[0]))
    moved = max(float((trained[name] - first[name]).abs().max()) for name in first)
    # A step of Adam moves a weight by about the learning rate; an average keeps 0.9 of where it was.
    steps = flown[1]["step"]
    assert (0.1 if decay else 0.5) < moved / (1e-2 * steps) < (0.4 if decay else 1.5)
