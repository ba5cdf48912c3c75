"""`worldvln-edge speculation`: what it counts in closed loop, and what it prints."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.runtime.worldvln.speculation import SpeculationReport
from worldvln_edge.training.evaluation.speculation_quality import measure_speculation


@pytest.fixture(scope="module")
def report(tiny_bundle: Path):
    return measure_speculation(tiny_bundle, thresholds=(1.0, 0.0), tasks=2, threads=1, show_progress=False)


def test_guesses_that_are_never_taken_change_no_flight(report):
    off, never, _ = report.results
    assert off.speculated == SpeculationReport()
    assert never.speculated.accepted == 0
    assert never.speculated.finished == never.speculated.segments == 2 * 2
    assert never.outcome == off.outcome
    assert never.token_steps == off.token_steps
    assert never.speculated.added_token_steps > 0
    assert never.against_off.difference == 0


def test_guesses_that_are_always_taken_cost_nothing_extra(report):
    off, _, always = report.results
    assert always.speculated.accepted == always.speculated.segments == 2 * 2
    assert always.speculated.added_token_steps == 0
    assert always.speculated.saved_s > 0
    assert always.token_steps < off.token_steps  # the segments themselves were not generated again


def test_command_prints_a_row_for_every_threshold(tiny_bundle: Path):
    options = ["--tasks", "1", "--threads", "1", "--threshold", "1", "--threshold", "0"]
    result = CliRunner().invoke(cli.main, ["speculation", str(tiny_bundle), *options])
    assert result.exit_code == 0, result.output
    rows = [line.split()[:3] for line in result.stdout.splitlines()]
    assert ["1", "2", "0.0%"] in rows
    assert ["0", "2", "100.0%"] in rows


def test_json_holds_the_same(tiny_bundle: Path):
    options = ["--tasks", "1", "--threads", "1", "--threshold", "0", "--json"]
    result = CliRunner().invoke(cli.main, ["speculation", str(tiny_bundle), *options])
    assert result.exit_code == 0, result.output
    assert [row["threshold"] for row in json.loads(result.stdout)["results"]] == [None, 0.0]
