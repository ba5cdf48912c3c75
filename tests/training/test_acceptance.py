"""The acceptance list: which side of a limit, several seeds, what is measured once, and the run by heart."""

import json
import shutil

import msgspec
import pytest
import torch
from click.testing import CliRunner
from small_models import save_random_checkpoint, tiny_config
from test_open_loop import write_flights

from worldvln_edge.cli import main
from worldvln_edge.models.worldvln import load_checkpoint
from worldvln_edge.training.data.simulator_flights import SimulatorFlights
from worldvln_edge.training.evaluation.acceptance import acceptance_lines, is_accepted, needed, verdicts
from worldvln_edge.training.evaluation.acceptance_run import (
    AcceptanceConfig,
    AcceptanceError,
    checkpoint_labels,
    read_acceptance,
    run_acceptance,
)
from worldvln_edge.training.evaluation.acceptance_tables import verdict_parts
from worldvln_edge.training.evaluation.open_loop import OpenLoopReport
from worldvln_edge.training.evaluation.overfit import OverfitConfig, OverfitReport, measure_overfit

GOOD = {
    "vae": {"unexplained": 0.3},
    "backbone": {
        "bit_ce": 0.4,
        "majority_bit_ce": 0.5,
        "semantic_bit_ce": 0.36,
        "semantic_majority_bit_ce": 0.45,
        "text_effect": -0.03,
        "text_effect_error": 0.01,
    },
    "adapter": {"cosine": 0.7},
    "action": {
        "nmse_x": 0.1,
        "nmse_yaw": 0.15,
        "segment_endpoint_m": 0.5,
        "segment_mean_endpoint_m": 2.0,
        "segment_yaw_deg": 3.0,
        "segment_mean_yaw_deg": 12.0,
    },
    "shuffled": {"nmse_x": 0.95, "nmse_yaw": 1.2},
}


def open_loop(**changes) -> OpenLoopReport:
    """A report that the list accepts for `nano`, but for `changes` of single stages."""
    stages = {name: {**metrics, **changes.pop(name, {})} for name, metrics in GOOD.items()}
    return OpenLoopReport(
        **{"flights": 4, "split": "validation", "seed": 0, "is_adapter_distilled": True, **changes},
        **stages,
        teacher_forced={},
        rgb_head={},
    )


BY_HEART = OverfitReport(rows=8, steps=300, bit_ce=0.04)


def lines_of(report, overfit=BY_HEART):
    return {line.metric: line for line in acceptance_lines(report, overfit)}


def test_every_line_of_the_list_is_there_with_the_limits_of_the_specification():
    asked = {line.metric: (line.relation, line.nano, line.mini) for line in acceptance_lines(open_loop(), BY_HEART)}
    assert asked == {
        "vae: reconstruction MSE / variance about the mean image": ("<", 0.6, 0.15),
        "sft: bit CE / ln 2": ("<", 1.0, 1.0),
        "sft: bit CE / majority": ("<", 1.0, 1.0),
        "sft: semantic bit CE / best of the two": ("<=", 0.9, 0.75),
        "sft: semantic bit CE, true minus shuffled instruction, in its standard errors": ("<", -2.0, -2.0),
        "sft: bit CE of few sequences, overfitted": ("<", 0.05, 0.05),
        "adapter: cosine to the teacher": (">", 0.6, 0.8),
        "action: NMSE yaw": ("<", 0.6, 0.2),
        "action: NMSE x": ("<", 0.6, 0.2),
        "action: endpoint distance of a segment / of integrating the mean": ("<=", 0.6, 0.3),
        "action: yaw error of a segment / of integrating the mean": ("<=", 0.6, 0.3),
        "control: NMSE yaw, frames shuffled": (">=", 0.95, 0.9),
        "control: NMSE x, frames shuffled": (">=", 0.95, 0.9),
    }
    assert is_accepted(verdicts([acceptance_lines(open_loop(), BY_HEART)], "nano"))
    assert not is_accepted(verdicts([acceptance_lines(open_loop(), BY_HEART)], "mini"))


@pytest.mark.parametrize(
    ("metric", "changes"),
    [
        ("vae: reconstruction MSE / variance about the mean image", {"vae": {"unexplained": 0.6}}),
        ("sft: bit CE / majority", {"backbone": {"bit_ce": 0.5}}),
        ("sft: semantic bit CE / best of the two", {"backbone": {"semantic_bit_ce": 0.41}}),
        (
            "sft: semantic bit CE, true minus shuffled instruction, in its standard errors",
            {"backbone": {"text_effect": 0.03}},
        ),
        ("adapter: cosine to the teacher", {"adapter": {"cosine": 0.6}}),
        ("action: NMSE x", {"action": {"nmse_x": 0.6}}),
        (
            "action: yaw error of a segment / of integrating the mean",
            {"action": {"segment_yaw_deg": 7.3}},
        ),
        ("control: NMSE x, frames shuffled", {"shuffled": {"nmse_x": 0.94}}),
    ],
)
def test_a_line_fails_on_the_wrong_side_of_its_limit(metric, changes):
    lines = lines_of(open_loop(**changes))
    assert [name for name, line in lines.items() if line.holds("nano") is False] == [metric]


def test_a_majority_above_ln_2_is_no_excuse():
    lines = lines_of(open_loop(backbone={"semantic_bit_ce": 0.68, "semantic_majority_bit_ce": 0.9}))
    line = lines["sft: semantic bit CE / best of the two"]
    assert line.value == pytest.approx(0.68 / 0.693147, rel=1e-5)
    assert line.holds("nano") is False


def test_what_was_not_measured_is_not_accepted_and_what_does_not_apply_is():
    lines = acceptance_lines(open_loop(is_adapter_distilled=False), None)
    found = {verdict.metric: verdict for verdict in verdicts([lines], "nano")}
    adapter = found["adapter: cosine to the teacher"]
    overfit = found["sft: bit CE of few sequences, overfitted"]
    assert (adapter.is_applicable, adapter.is_accepted) == (False, None)
    assert (overfit.is_applicable, overfit.is_accepted) == (True, None)
    assert not is_accepted(list(found.values()))
    assert is_accepted(verdicts([acceptance_lines(open_loop(is_adapter_distilled=False), BY_HEART)], "nano"))
    table, conclusion = verdict_parts(["value"], list(found.values()))
    cells = {row[0]: row[2:] for row in table.rows}
    assert cells["adapter: cosine to the teacher"] == ("trained with the action head, not distilled", "n/a")
    assert conclusion == ("Not accepted: 11 of 12 lines hold. Not measured: sft: bit CE of few sequences, overfitted.")


def test_metrics_that_are_missing_are_lines_that_were_not_measured():
    empty = msgspec.structs.replace(open_loop(), vae={}, backbone={}, adapter={}, action={}, shuffled={})
    lines = acceptance_lines(empty, BY_HEART)
    assert {line.state for line in lines if "overfitted" not in line.metric} == {"not measured"}
    assert all(line.holds("nano") is None for line in lines if "overfitted" not in line.metric)


def test_two_of_three_seeds_are_enough_with_mean_and_standard_error():
    assert [needed(count) for count in (1, 2, 3, 4, 6)] == [1, 2, 2, 3, 4]
    reports = [open_loop(action={"nmse_x": value}) for value in (0.1, 0.7, 0.4)]
    lines = [acceptance_lines(report, BY_HEART) for report in reports]
    found = {verdict.metric: verdict for verdict in verdicts(lines, "nano")}
    one = found["action: NMSE x"]
    assert (one.values, one.held, one.needed, one.is_accepted) == ((0.1, 0.7, 0.4), 2, 2, True)
    assert one.mean == pytest.approx(0.4)
    assert one.standard_error == pytest.approx(0.3 / 3**0.5)
    table, conclusion = verdict_parts(["seed 0", "seed 1", "seed 2"], list(found.values()))
    row = next(row for row in table.rows if row[0] == "action: NMSE x")
    assert row == ("action: NMSE x", "< 0.6", "0.100", "0.700", "0.400", "0.400", "0.173", "2 of 3", "yes")
    assert conclusion == "Accepted: 13 of 13 lines hold. A line must hold for 2 of 3 checkpoints."
    worse = [open_loop(action={"nmse_x": value}) for value in (0.1, 0.7, 0.8)]
    failed = verdicts([acceptance_lines(report, BY_HEART) for report in worse], "nano")
    assert not is_accepted(failed)
    assert "Do not hold: action: NMSE x." in verdict_parts(["a", "b", "c"], failed)[1]


# One command over real, if random, networks.


@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    return write_flights(tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two random checkpoints that say which seed they have."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_random_checkpoint(folder / str(seed), tiny_config())
        (folder / str(seed) / "run.json").write_text(json.dumps({"vae": {"seed": seed}, "sft": {"seed": seed}}))
    return [folder / "0", folder / "1"]


def invoke(*arguments):
    return CliRunner().invoke(main, ["eval", "acceptance", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def measured(seeds, flights, tmp_path_factory):
    """Options, output folder and result of a first run over both."""
    out = tmp_path_factory.mktemp("acceptance")
    options = ("--flights", flights, "--limit", 2, "--limits", "nano", "--threads", 1, "--out", out)
    return options, out, invoke(*seeds, *options)


def test_command_measures_every_checkpoint_once(seeds, measured):
    options, out, result = measured
    assert result.exit_code == 1, result.output  # random weights
    assert "Not accepted: " in result.stdout
    record = read_acceptance(out)
    assert [(c.label, c.open_loop.flights) for c in record.checkpoints] == [("seed 0", 2), ("seed 1", 2)]
    kept = {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    assert len(kept) == 2
    again = invoke(seeds[1], *options, "--json")
    assert {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()} == kept
    assert json.loads(again.stdout)["checkpoints"][0]["label"] == "value"
    assert "| acceptance | asked | value | accepted |" in (out / "acceptance.md").read_text()


def test_few_sequences_are_learnt_by_heart_and_the_run_ends_there(tiny_checkpoint, flights, tmp_path):
    loaded = load_checkpoint(tiny_checkpoint)
    source = SimulatorFlights(flights, loaded.config.image_hw)
    config = OverfitConfig(rows=2, steps=200, bit_ce=0.5, look_every=5)
    report = measure_overfit(loaded, source, tmp_path / "run", config, show_progress=False)
    assert report.bit_ce < 0.5
    assert 0 < report.steps < 200
    assert report.steps % 5 == 0
    short = OverfitConfig(rows=2, steps=3, bit_ce=0.0, look_every=5)
    stopped = measure_overfit(loaded, source, tmp_path / "short", short, show_progress=False)
    assert (stopped.rows, stopped.steps) == (2, 3)
    assert stopped.bit_ce > report.bit_ce


def test_overfit_goes_into_the_list(seeds, flights, measured):
    config = AcceptanceConfig(
        out=measured[1],
        flights=flights,
        limits_of="nano",
        limit=2,
        with_overfit=True,
        overfit=OverfitConfig(rows=2, steps=4, look_every=2),
    )
    record, text = run_acceptance(seeds[:1], config, show_progress=False)
    assert record.checkpoints[0].overfit.rows == 2
    assert "2 sequences, 4 steps" in text
    assert run_acceptance(seeds[:1], config, show_progress=False)[0] == record
    assert len(list((measured[1] / "overfit").iterdir())) == 1


def test_checkpoints_are_told_apart_by_the_shortest_name(seeds, tmp_path):
    assert checkpoint_labels(seeds) == ["seed 0", "seed 1"]
    assert checkpoint_labels(seeds[:1]) == ["value"]
    other = tmp_path / "other"
    shutil.copytree(seeds[0], other)
    assert checkpoint_labels([seeds[0], other]) == ["0", "other"]
    same = tmp_path / "again" / "0"
    shutil.copytree(seeds[0], same)
    assert checkpoint_labels([seeds[0], same]) == [str(seeds[0]), str(same)]


def test_checkpoints_that_do_not_go_together_are_refused(seeds, flights, tmp_path):
    config = AcceptanceConfig(out=tmp_path, flights=flights, limit=2)
    with pytest.raises(AcceptanceError, match=r"no limits for 'tiny'.*; give --limits nano or --limits mini"):
        run_acceptance(seeds[:1], config, show_progress=False)
    with pytest.raises(AcceptanceError, match="given twice"):
        run_acceptance([seeds[0], seeds[0]], config, show_progress=False)
    with pytest.raises(AcceptanceError, match="is no checkpoint folder"):
        run_acceptance([tmp_path], config, show_progress=False)
    named = msgspec.structs.replace(tiny_config(), name="other")
    save_random_checkpoint(tmp_path / "other", named)
    with pytest.raises(AcceptanceError, match=r"different presets: .* is other; give those of one preset"):
        run_acceptance([seeds[0], tmp_path / "other"], config, show_progress=False)
    assert not (tmp_path / "acceptance.json").exists()


def test_a_record_that_cannot_be_read_says_what_to_run(tmp_path):
    with pytest.raises(AcceptanceError, match="run `worldvln-edge eval acceptance` first"):
        read_acceptance(tmp_path)
    (tmp_path / "acceptance.json").write_text("{}")
    with pytest.raises(AcceptanceError, match="not the record of an acceptance run"):
        read_acceptance(tmp_path)


def test_options_of_flying_in_front_of_a_subcommand_are_refused(tiny_checkpoint):
    result = CliRunner().invoke(main, ["eval", "--count", "3", "acceptance", str(tiny_checkpoint)])
    assert result.exit_code == 2
    assert "options of flying do nothing for `eval acceptance`" in result.output
