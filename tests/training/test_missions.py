"""Missions of several instructions: the same ones every time, flyable, and flown as one chained session."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.config import HorizonConfig
from worldvln_edge.runtime.bench.bench_table import render
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    ReplayPilot,
    SceneSimulators,
    expert_actions,
    fly_task,
)
from worldvln_edge.training.evaluation.missions import THEN, MissionPilot, fly_missions, generate_mission, mission_parts
from worldvln_edge.training.sim.tasks import generate_task

FRAME = np.zeros((8, 8, 3), np.uint8)


class ListeningPolicy(NullPolicy):
    def __init__(self):
        super().__init__(HorizonConfig(), image_hw=(16, 16))
        self.told = []

    def new_session(self, prompt, **options):
        self.told.append(prompt)
        return super().new_session(prompt, **options)


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


def test_every_horizon_is_told_its_own_leg():
    policy, mission = ListeningPolicy(), generate_mission(1, 3)
    pilot = MissionPilot(policy, 3)
    pilot.start(mission, seed=0)
    for count in (1, *[16] * 8):
        pilot.observe([FRAME] * count)
    pilot.end()
    assert policy.told == mission.instruction.split(THEN)


def test_a_pilot_of_other_legs_is_refused():
    with pytest.raises(FlightError, match="has 2 legs, this pilot flies 3"):
        MissionPilot(NullPolicy(), 3).start(generate_mission(1, 2), seed=0)


def test_no_legs_are_refused():
    with pytest.raises(ValueError, match="at least one leg, found 0"):
        generate_mission(0, 0)


def test_report_has_the_policy_beside_the_expert():
    report = fly_missions(ListeningPolicy(), legs=(1, 2), missions=2, show_progress=False)
    assert [(result.legs, result.seconds) for result in report.results] == [(1, 3.0), (2, 6.0)]
    assert [result.expert.success_rate for result in report.results] == [1.0, 1.0]
    assert all(result.policy.mean_distance_m > result.expert.mean_distance_m for result in report.results)
    table = render(mission_parts(report))
    assert "100.0%" in table


def test_command_says_when_a_model_flies_shorter_horizons(tiny_bundle: Path):
    result = CliRunner().invoke(cli.main, ["missions", str(tiny_bundle), "--threads", "1"])
    assert result.exit_code == 1
    assert "a leg of a mission has 48 actions, tiny flies 12 a horizon" in result.output
