"""Missions of several instructions: the same ones every time, flyable, and flown as one chained session."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.config import HorizonConfig
from worldvln_edge.runtime.bench.report_table import render
from worldvln_edge.runtime.sessions.chained_session import SettledRule
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.training.evaluation import missions
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    ReplayPilot,
    SceneSimulators,
    expert_actions,
    fly_task,
)
from worldvln_edge.training.evaluation.mission_pilot import MissionPilot
from worldvln_edge.training.evaluation.mission_tasks import THEN, generate_mission
from worldvln_edge.training.evaluation.missions import fly_missions, mission_parts
from worldvln_edge.training.sim.tasks import generate_task

FRAME = np.zeros((8, 8, 3), np.uint8)


class ListeningPolicy(NullPolicy):
    """Its drone moves for so many segments of every horizon, and then stands still."""

    def __init__(self, moving_segments: int = 3):
        super().__init__(HorizonConfig(), image_hw=(16, 16))
        self.moving_segments = moving_segments
        self.told = []
        self.seen = []

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.told.append(prompt)
        self.seen.append([])
        return ListeningSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt)

    def close(self):
        """Holds nothing."""


class ListeningSession(NullSession):
    def observe(self, frames, **options):
        self._policy.seen[-1] += [int(frame[0, 0, 0]) for frame in frames]
        chunk = super().observe(frames, **options)
        if chunk is None or chunk.segment >= self._policy.moving_segments:
            return chunk
        return replace(chunk, actions=chunk.actions + np.float32(5))


def numbered(first: int, count: int) -> list[np.ndarray]:
    """Frames whose pixels are their index."""
    return [np.full((8, 8, 3), index, np.uint8) for index in range(first, first + count)]


def fly_numbered(pilot: MissionPilot, calls: int) -> list[np.ndarray]:
    return [pilot.observe(numbered(max(0, 16 * call - 15), 16 if call else 1)) for call in range(calls)]


def test_a_mission_is_the_same_every_time_and_its_legs_follow_each_other():
    mission = generate_mission(3, 3)
    assert mission == generate_mission(3, 3)
    path = np.array(mission.reference_path_raw)
    assert path.shape == (1 + 3 * 48, 6)
    assert tuple(path[-1]) == mission.end_pos
    assert np.abs(np.diff(path[:, :3], axis=0)).max() < 100  # no jump between two legs
    assert len(mission.instruction.split(THEN)) == 3


def test_one_leg_is_an_ordinary_held_out_task():
    mission = generate_mission(0, 1)
    index = int(generate_task("test", 0).task_id.split("-")[1])
    first = generate_task("test", index)
    assert (mission.instruction, mission.scene) == (first.instruction, first.scene)


def test_the_expert_flies_a_mission_to_its_end():
    mission = generate_mission(5, 2)
    with SceneSimulators((16, 16)) as simulators:
        pilot = ReplayPilot(expert_actions, num_actions=96)
        flown = fly_task(mission, pilot, simulators.for_task(mission))
    assert flown.score.success, flown.score


@pytest.mark.parametrize("ends_when_settled", [False, True])
def test_every_horizon_is_told_its_own_leg(ends_when_settled):
    policy, mission = ListeningPolicy(), generate_mission(1, 3)
    pilot = MissionPilot(policy, 3, ends_when_settled=ends_when_settled)
    pilot.start(mission, seed=0)
    fly_numbered(pilot, 9)
    pilot.end()
    assert policy.told == mission.instruction.split(THEN)
    assert policy.seen == [list(range(49)), list(range(48, 97)), list(range(96, 129))]  # neighbours share a frame
    assert (pilot.settled_legs, pilot.steps_flown) == (0, 9 * 16)


def test_instruction_ends_when_the_drone_has_settled_and_the_next_starts_from_the_newest_frame():
    policy, mission = ListeningPolicy(moving_segments=1), generate_mission(1, 3)
    pilot = MissionPilot(policy, 3, ends_when_settled=True)
    pilot.start(mission, seed=0)
    actions = fly_numbered(pilot, 9)
    pilot.end()
    assert policy.told == mission.instruction.split(THEN)
    assert policy.seen == [list(range(17)), list(range(32, 49)), list(range(64, 81))]
    assert [bool(chunk.any()) for chunk in actions] == [True, False] * 3 + [False] * 3
    assert {chunk.shape for chunk in actions} == {(16, 6)}
    assert (pilot.settled_legs, pilot.steps_flown) == (3, 6 * 16)


def test_without_the_rule_settled_legs_are_counted_and_have_their_whole_time():
    policy = ListeningPolicy(moving_segments=1)
    pilot = MissionPilot(policy, 2)
    pilot.start(generate_mission(1, 2), seed=0)
    fly_numbered(pilot, 6)
    pilot.end()
    assert [len(seen) for seen in policy.seen] == [49, 33]
    assert (pilot.settled_legs, pilot.steps_flown) == (2, 6 * 16)


def test_what_a_leg_stood_still_does_not_count_for_the_next():
    policy = ListeningPolicy(moving_segments=0)
    pilot = MissionPilot(policy, 2, ends_when_settled=True, settled=SettledRule(steps=20))
    pilot.start(generate_mission(1, 2), seed=0)
    fly_numbered(pilot, 4)
    pilot.end()
    assert [len(seen) for seen in policy.seen] == [17, 17]


def test_a_new_mission_starts_with_its_first_leg():
    policy, mission = ListeningPolicy(moving_segments=0), generate_mission(1, 2)
    pilot = MissionPilot(policy, 2, ends_when_settled=True)
    for _ in range(2):
        pilot.start(mission, seed=0)
        fly_numbered(pilot, 6)
        pilot.end()
    assert policy.told == mission.instruction.split(THEN) * 2
    assert (pilot.settled_legs, pilot.steps_flown) == (4, 4 * 16)
    with pytest.raises(RuntimeError, match="no flight; call start"):
        pilot.observe([FRAME])


def test_a_pilot_of_other_legs_is_refused():
    with pytest.raises(FlightError, match="has 2 legs, this pilot flies 3"):
        MissionPilot(NullPolicy(), 3).start(generate_mission(1, 2), seed=0)


def test_no_legs_are_refused():
    with pytest.raises(ValueError, match="at least one leg, found 0"):
        generate_mission(0, 0)


def test_report_has_success_with_and_without_the_rule_beside_the_expert():
    report = fly_missions(ListeningPolicy(moving_segments=0), legs=(1, 2), missions=2, show_progress=False)
    assert [(result.legs, result.seconds) for result in report.results] == [(1, 3.0), (2, 6.0)]
    assert [result.expert.success_rate for result in report.results] == [1.0, 1.0]
    for result in report.results:
        assert result.policy.outcome.mean_distance_m > result.expert.mean_distance_m
        assert result.policy.settled_legs == result.until_settled.settled_legs == 2 * result.legs
        assert result.policy.mean_seconds == result.seconds
        assert result.until_settled.mean_seconds == result.legs  # one segment of 16 frames an instruction
        assert result.settled_gain.difference == 0
    table = render(mission_parts(report))
    assert [line.split()[:5] for line in table.splitlines() if line.startswith("2 ")] == [
        ["2", "policy", "6.00", "4", "of"],
        ["2", "policy,", "until", "settled", "2.00"],
        ["2", "expert", "6.00", "100.0%", "34%"],
    ]
    assert "in points by legs: +0.0 (-49.0 to +49.0) with 1;" in table


def test_missions_are_flown_once_where_nobody_asks_for_the_rule():
    report = fly_missions(ListeningPolicy(), legs=(1,), missions=1, with_settled=False, show_progress=False)
    assert (report.results[0].until_settled, report.results[0].settled_gain) == (None, None)
    assert "until settled" not in render(mission_parts(report))


@pytest.mark.parametrize(("option", "rows"), [("--settled", 3), ("--no-settled", 2)])
def test_command_flies_with_and_without_the_rule(monkeypatch, tmp_path, option, rows):
    monkeypatch.setattr(missions, "load_policy", lambda *_, **__: ListeningPolicy())
    result = CliRunner().invoke(cli.main, ["missions", str(tmp_path), "--legs", "1", "--missions", "1", option])
    assert result.exit_code == 0, result.output
    assert len([line for line in result.stdout.splitlines() if line.startswith("1 ")]) == rows


def test_command_says_when_a_model_flies_shorter_horizons(tiny_bundle: Path):
    result = CliRunner().invoke(cli.main, ["missions", str(tiny_bundle), "--threads", "1"])
    assert result.exit_code == 1
    assert "a leg of a mission has 48 actions, tiny flies 12 a horizon" in result.output
