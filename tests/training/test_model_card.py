"""`worldvln-edge eval card`: numbers of finished runs between the markers of Markdown files, all or nothing."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from test_acceptance import BY_HEART, open_loop
from test_evaluation_statistics import flight

from worldvln_edge.cli import main
from worldvln_edge.tasks import SuccessRule
from worldvln_edge.training.evaluation.acceptance import acceptance_lines, verdicts
from worldvln_edge.training.evaluation.acceptance_run import AcceptanceRecord, CheckpointRecord
from worldvln_edge.training.evaluation.model_card import SECTIONS, fill_cards
from worldvln_edge.training.grpo.comparison import ComparedPolicy, Comparison, write_comparison
from worldvln_edge.training.grpo.held_out import PairedDifference

CARD = """# A model

<!-- card: flights -->
old
<!-- /card: flights -->

Words of a person.

<!-- card: groups -->
<!-- /card: groups -->
"""


def write_evaluation(folder, **changes):
    flights = [flight(number, row=row, success=row == "policy") for row in ("policy", "zero") for number in range(4)]
    record = {"split": "test", "first": 0, "seed": 0, "profiles": ["exact"], "success": SuccessRule()} | changes
    folder.mkdir(exist_ok=True)
    (folder / "eval.json").write_bytes(msgspec.json.encode({"flights": flights, **record}))
    return folder


def write_acceptance(folder):
    report = open_loop(action={"segment_nmse_x": 0.2, "segment_qualified": 1.0, "predicted_nmse_x": 0.3})
    checkpoint = CheckpointRecord(checkpoint="c", label="value", open_loop=report, overfit=BY_HEART)
    found = verdicts([acceptance_lines(report, BY_HEART)], "nano")
    record = AcceptanceRecord(
        preset="nano",
        limits_of="nano",
        flights="f",
        checkpoints=(checkpoint,),
        verdicts=tuple(found),
        is_accepted=True,
    )
    folder.mkdir(exist_ok=True)
    (folder / "acceptance.json").write_bytes(msgspec.json.encode(record))
    return folder


def write_checkpoint(folder):
    folder.mkdir(exist_ok=True)
    run = {"seed": 3, "flights": 5120, "optimiser": {"steps": 40}, "config": {"step_rows": 16}}
    (folder / "run.json").write_text(json.dumps({"vae": run, "sft": run}))
    rows = [
        {"stage": stage, "step": step, "seconds": 30.0 * step, "loss": 2.0 / step}
        for stage in ("vae", "sft")
        for step in (20, 40)
    ]
    rows.insert(2, {"stage": "vae", "step": 40, "epoch": 0, "held_out_loss": 0.1})
    (folder / "loss_curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_flown_comparison(folder):
    sft = ComparedPolicy(
        checkpoint="runs/nano",
        flights=32,
        failed=0,
        reward=0.9,
        success=0.5,
        reward_difference=None,
        success_difference=None,
        k3=None,
        clipped=None,
        environment_steps=None,
        stopping=None,
    )
    better = PairedDifference(mean=0.05, standard_error=0.01, tasks=2, flights=32)
    grpo = msgspec.structs.replace(
        sft,
        checkpoint="runs/grpo",
        reward_difference=better,
        success_difference=better,
        k3=0.02,
        clipped=0.1,
        environment_steps=61440.0,
    )
    write_comparison(Comparison(tasks=2, rollouts=16, policies=(sft, grpo)), folder)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, ["eval", "card", *(str(argument) for argument in arguments)])


def refused(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    return path


def test_sections_are_replaced_and_words_are_kept(card, tmp_path):
    evaluation = write_evaluation(tmp_path / "eval")
    result = invoke(card, "--eval", evaluation)
    assert (result.exit_code, result.output) == (0, f"{card}: written\n")
    text = card.read_text()
    assert "old" not in text
    assert "4 held-out tasks in held-out scenes" in text
    assert "`worldvln-edge eval --checkpoint CHECKPOINT --count 4` prints:" in text
    assert "| policy | 4 | 100.0% | 51% to 100% |" in text
    assert "| policy | 100.0% of 2 | 34% to 100% | 100.0% of 2 | 34% to 100% |" in text
    assert text.startswith("# A model\n\n<!-- card: flights -->\n\n4 held-out")
    assert "\n\nWords of a person.\n\n" in text
    assert invoke(card, "--eval", evaluation).output == f"{card}: unchanged\n"
    assert card.read_text() == text


def test_the_command_says_what_was_not_as_usual(card, tmp_path):
    changes = {"split": "validation", "first": 9, "seed": 2, "profiles": ["fast"]}
    invoke(card, "--eval", write_evaluation(tmp_path / "eval", **changes))
    assert "--count 4 --split validation --first 9 --seed 2 --profile fast` prints:" in card.read_text()


def test_a_card_holds_training_acceptance_the_chain_and_grpo(tmp_path):
    path = tmp_path / "card.md"
    names = ("training", "acceptance", "stages", "grpo")
    path.write_text("\n".join(f"<!-- card: {name} -->\n<!-- /card: {name} -->" for name in names))
    options = ("--acceptance", write_acceptance(tmp_path / "a"), "--checkpoint", write_checkpoint(tmp_path / "c"))
    options += ("--comparison", write_flown_comparison(tmp_path / "compared"))
    assert invoke(path, *options).exit_code == 0
    text = path.read_text()
    assert "5120 flights, seed 3, 40 minutes of training:" in text
    assert "| sft | 40 | 16 | 20 | 0.1 | 0.05 |" in text
    assert "This checkpoint, limits of `nano`, on 4 flights of the split validation:" in text
    assert "| action: NMSE x | < 0.6 | 0.100 | yes |" in text
    assert "Accepted: 13 of 13 lines hold." in text
    assert "| true latents | 0.200 |" in text
    assert "2 tasks, 16 flights each, with the same seeds for every checkpoint; differences to runs/nano" in text
    assert "| runs/grpo | 32 | 0.9000 | +0.0500 ± 0.0100 | 50.0% | +5.0 ± 1.0 | 0.0200 | 0.100 | 61440 |" in text


def test_nothing_is_written_unless_every_file_can_be_filled(card, tmp_path):
    other = tmp_path / "other.md"
    other.write_text("<!-- card: acceptance -->\n<!-- /card: acceptance -->\n")
    evaluation = write_evaluation(tmp_path / "eval")
    line = refused(card, other, "--eval", evaluation)
    assert line.endswith("other.md: the section acceptance is marked and not given; give --acceptance DIR")
    assert card.read_text() == CARD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# words only\n    <!-- card: flights -->\n", "no sections are marked; write <!-- card: flights -->"),
        ("a\n<!-- card: flights -->\n", ":2: every <!-- card: NAME --> needs its <!-- /card: NAME -->"),
        ("<!-- /card: flights -->\n<!-- card: flights -->\n", ":1: every <!-- card: NAME --> needs"),
        ("<!-- card: flights -->\n<!-- card: groups -->\n<!-- /card: flights -->\n", ":1: every <!-- card: NAME -->"),
        ("<!-- card: curves -->\n<!-- /card: curves -->\n", "the section curves is marked and not given; known are"),
    ],
)
def test_markers_that_do_not_fit_are_named(tmp_path, text, message):
    path = tmp_path / "card.md"
    path.write_text(text)
    assert message in refused(path, "--eval", write_evaluation(tmp_path / "eval"))
    assert path.read_text() == text


def test_sources_that_hold_nothing_are_named(card, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "eval.json: No such file or directory; run `worldvln-edge eval` again" in refused(card, "--eval", empty)
    assert "run `worldvln-edge eval acceptance` first" in refused(card, "--acceptance", empty)
    assert "give the --work folder of `train grpo-compare`" in refused(card, "--comparison", empty)
    assert "run.json: No such file" in refused(card, "--checkpoint", empty)
    assert "README.md.none: cannot be read" in refused(f"{card}.none", "--eval", write_evaluation(tmp_path / "eval"))
    (empty / "eval.json").write_text('{"policy": "p", "open_loop": {}}')
    assert "eval.json: does not hold what a card needs" in refused(card, "--eval", empty)
    assert "no flights of a policy" in refused(card, "--eval", write_evaluation(empty, flights=[]))
    (empty / "run.json").write_text('{"preset": "nano", "recipe": {}}')
    assert "run.json: names no stages" in refused(card, "--checkpoint", empty)
    (empty / "run.json").write_text('{"vae": {"optimiser": {}}}')
    assert "loss_curve.jsonl: No such file" in refused(card, "--checkpoint", empty)
    (empty / "loss_curve.jsonl").write_text("{")
    assert "loss_curve.jsonl: a line that is no loss" in refused(card, "--checkpoint", empty)
    (empty / "loss_curve.jsonl").write_text("")
    assert "loss_curve.jsonl: no losses of the stage vae" in refused(card, "--checkpoint", empty)
    assert invoke(card).exit_code == 2


@pytest.mark.parametrize("name", ["README.md", "docs/evaluation.md", "worldvln_edge/checkpoints/nano/README.md"])
def test_our_own_documents_mark_sections_that_a_run_fills(name, tmp_path):
    copy = tmp_path / "copy.md"
    copy.write_text((Path(__file__).parents[2] / name).read_text(encoding="utf-8"))
    assert fill_cards([copy], dict.fromkeys(SECTIONS, "filled")) == [True]


def test_a_file_that_cannot_be_written_stays(card, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worldvln_edge.training.evaluation.model_card.atomic_file", full)
    line = refused(card, "--eval", write_evaluation(tmp_path / "eval"))
    assert "cannot be written (No space left on device); it is as it was" in line
    assert card.read_text() == CARD
