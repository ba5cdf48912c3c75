"""`worldvln-edge bench --against full-horizon`: both schedules in one run, and the same actions."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.runtime.bench import bench_comparison
from worldvln_edge.runtime.bench.bench_comparison import TOLERANCE, compare_with_full_horizon
from worldvln_edge.runtime.bench.bench_flight import BenchConfig, synthetic_frames
from worldvln_edge.runtime.bench.full_horizon import FullHorizonFlight
from worldvln_edge.runtime.bench.schedule_agreement import BORDER, SegmentAgreement, compare_segments
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.worldvln.graphs import WORLD_MODEL_STEP
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy

QUICK = ["--threads", "1", "--frame-size", "32x24", "--against", "full-horizon", "--episodes", "2"]


def test_both_schedules_give_the_same_actions_for_different_work(tiny_bundle: Path):
    ticks = []
    config = BenchConfig(frame_hw=(24, 32), threads=1)
    report = compare_with_full_horizon(tiny_bundle, config, episodes=2, on_episode=lambda: ticks.append(None))
    assert len(ticks) == 4
    assert report.largest_action_difference <= TOLERANCE == report.tolerance
    assert report.agrees
    exact, full = report.exact, report.full_horizon
    assert len(exact.segments_ms) == len(full.segments_ms) == 3
    assert full.token_steps > exact.token_steps
    assert report.token_step_ratio == full.token_steps / exact.token_steps
    assert report.ratio == full.episode_ms / exact.episode_ms
    assert exact.episode_ms > exact.waited_ms  # work ahead counts as the session's own
    assert full.episode_ms == full.waited_ms
    # The research server encodes the text anew for every segment; the session once a flight.
    assert ["text_encoder" in stages for stages in full.stages_ms] == [True] * 3
    assert ["text_encoder" in stages for stages in exact.stages_ms] == [True, False, False]


def test_no_episodes_are_refused(tiny_bundle: Path):
    with pytest.raises(ValueError, match="at least 1"):
        compare_with_full_horizon(tiny_bundle, episodes=0)


def test_command_prints_both_schedules_and_draws_them(tiny_bundle: Path, tmp_path):
    plot, markdown = tmp_path / "bench.png", tmp_path / "bench.md"
    options = [*QUICK, "--plot", str(plot), "--markdown", str(markdown)]
    result = CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), *options])
    assert result.exit_code == 0, result.output
    assert "medians of 2 episodes" in result.stdout
    assert "allowed 0.001" in result.stdout
    assert plot.stat().st_size > 0
    assert "| token-steps |" in markdown.read_text()


class _Drifting(FullHorizonFlight):
    """A yardstick whose actions are off by a hundredth of a centimetre."""

    def observe(self, frames) -> ActionChunk:
        chunk = super().observe(frames)
        return ActionChunk(
            segment=chunk.segment,
            actions=chunk.actions + np.float32(0.01),
            observed_frames=chunk.observed_frames,
            seed=chunk.seed,
            timings_ms=chunk.timings_ms,
        )


def test_other_actions_are_exit_1(tiny_bundle: Path, monkeypatch):
    monkeypatch.setattr(bench_comparison, "FullHorizonFlight", _Drifting)
    result = CliRunner().invoke(cli.main, ["bench", str(tiny_bundle), *QUICK, "--json"])
    assert result.exit_code == 1
    assert "differ by more than an fp32 bundle may" in result.output
    report = json.loads(result.stdout)
    assert report["largest_action_difference"] == pytest.approx(0.01, abs=1e-3)
    # No bit differs, so rounding is no excuse.
    assert [segment["differing_bits"] for segment in report["agreement"]] == [0, 0, 0]


def agreement(**changes) -> SegmentAgreement:
    fields = {
        "segment": 0,
        "steps_equal": 3,
        "steps": 5,
        "differing_bits": 2,
        "largest_border": BORDER / 2,
        "largest_probability_difference": 1e-5,
        "largest_action_difference": 4.0,
    }
    return SegmentAgreement(**{**fields, **changes})


def test_other_bits_are_rounding_only_on_the_border():
    assert agreement().is_rounding(TOLERANCE)
    assert not agreement(largest_border=2 * BORDER).is_rounding(TOLERANCE)
    assert not agreement(differing_bits=0, largest_border=0.0).is_rounding(TOLERANCE)
    assert agreement(differing_bits=0, largest_action_difference=1e-4).is_rounding(TOLERANCE)


class _OtherGuidance:
    """The step, with a little less guidance in every second call."""

    def __init__(self, engine):
        self._engine, self._calls = engine, 0

    def run(self, inputs, in_place=None, *, fetch=None):
        self._calls += 1
        changed = {**inputs, "guidance": inputs["guidance"] * np.float32(0.5 if self._calls % 2 else 1.0)}
        return self._engine.run(changed, in_place, fetch=fetch)


def test_first_bits_that_differ_are_found_and_told_from_rounding(tiny_bundle: Path):
    policy, frames = load_policy(tiny_bundle, threads=1), synthetic_frames((24, 32), 9, 0)
    same = compare_segments(policy, frames, "go", 0)
    assert [(each.steps_equal, each.steps, each.differing_bits) for each in same] == [(5, 5, 0)] * 3
    assert all(each.is_rounding(TOLERANCE) for each in same)
    engines = policy.engines = {**policy.engines, WORLD_MODEL_STEP: _OtherGuidance(policy.engines[WORLD_MODEL_STEP])}
    other = compare_segments(policy, frames, "go", 0)
    assert policy.engines is engines
    wrong = [each for each in other if each.differing_bits]
    assert wrong
    assert all(each.steps_equal < each.steps for each in wrong)
    assert not all(each.is_rounding(TOLERANCE) for each in other)
