"""ActiveVLN's grammar, prompts, budgets and reward against the recorded reference."""

import json

import numpy as np
import pytest

from worldvln_edge.training.environments.activevln_episode import (
    NOT_REACHED,
    REACHED,
    ActiveVLNConfig,
    ActiveVLNEpisode,
    HistoryError,
)
from worldvln_edge.training.environments.activevln_text import observation_text, parse_action, parse_response

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def recorded(golden) -> dict:
    return json.loads((golden("seed_systems") / "activevln_env.json").read_text())


class PlanarWorld:
    """The recording's stand-in for a simulator: heading 0 looks along -z, left turns are positive."""

    def __init__(self):
        self.position, self.heading = np.array([0, 0.17, 0.0]), 0.0

    def fly(self, moves_N6: np.ndarray) -> np.ndarray:
        positions = []
        for move in moves_N6:
            self.heading -= np.radians(move[4])
            forward = np.array([np.sin(self.heading), 0.0, -np.cos(self.heading)])
            self.position = self.position + move[0] / 100.0 * forward
            positions.append(self.position)
        return np.array(positions).reshape(-1, 3)


def test_every_recorded_rollout_is_played_alike(recorded):
    at_the_border = 0
    for rollout in recorded["rollouts"]:
        config = ActiveVLNConfig(
            history_actions=tuple(rollout["history_actions"]),
            **{
                name: rollout[name]
                for name in ("step_budget", "turn_budget", "reward_type", "success_reward_base", "ndtw_reward_base")
            },
        )
        episode = ActiveVLNEpisode(
            config,
            instruction="Walk forward three meters and stop.",
            goal_m=np.array(rollout["goal"]),
            reference_G3=np.array(recorded["reference_path"]),
        )
        world = PlanarWorld()
        episode.begin(world.position)
        assert len(episode.history_turns) + 1 == rollout["n_initial_observations"], rollout["name"]
        for _, moves in episode.history_turns:
            episode.fly_history(moves, world.fly(moves))
        for turn in rollout["turns"]:
            moves = episode.plan(turn["response"])
            outcome = episode.finish(moves, world.fly(moves))
            expected = dict(turn)
            if turn["end_reason"] == REACHED and turn["distance_to_goal"] == 3.0:  # nearer than 3 m is near enough here
                expected |= {"end_reason": NOT_REACHED, "task_success": False}
                at_the_border += 1
            assert outcome.reward == pytest.approx(expected.pop("reward"), abs=1e-9), rollout["name"]
            assert outcome.done == expected.pop("done"), rollout["name"]
            response = expected.pop("response")
            assert outcome.info["llm_raw_response"] == response
            for name, value in expected.items():
                got = outcome.info[name]
                assert got == (pytest.approx(value, abs=1e-9) if not isinstance(value, list) else value), rollout[
                    "name"
                ]
        assert len(outcome.info["gen_traj"]) == rollout["turns_used"]
        assert outcome.info["gen_traj"][-1]["extracted_actions"] == rollout["turns"][-1]["actions"]
    assert at_the_border == 3


def test_every_recorded_text_action_is_read_alike(recorded):
    for case in recorded["parse_action"]:
        for space in ("r2r", "rxr"):
            action = parse_action(case["text"], space)
            got = "error" if action is None else [action.name, action.amount]
            assert got == case[space], case["text"]


def test_observation_texts_are_the_recorded_ones(recorded):
    prompts = recorded["prompts"]
    words = {"image_placeholder": "<image>", "separator": ",", "max_actions": 3}
    told = "Walk forward three meters and stop."
    assert observation_text(told, is_first=True, **words) == prompts["first"]
    assert observation_text(told, is_first=False, **words) == prompts["next"]
    assert observation_text(told, is_first=True, **words | {"max_actions": 1}).endswith(prompts["single_action"])


def test_wide_turns_turn_as_far_as_they_say():
    degrees = parse_action("turn left 90 degrees", "rxr").primitives_N6[:, 4]
    assert (len(degrees), degrees.sum()) == (6, -90.0)
    assert parse_action("turn right 45 degrees", "r2r").primitives_N6[:, 4].sum() == 45.0
    assert parse_action("move forward 75cm", "r2r").primitives_N6[:, 0].tolist() == [25.0] * 3


def test_special_tokens_are_no_part_of_an_answer():
    said = parse_response(
        "move forward 25cm, stop<|im_end|>",
        action_space="r2r",
        separator=",",
        max_actions=3,
        special_tokens=("<|im_end|>",),
    )
    assert (said.is_correct, said.actions) == (True, ("move forward 25cm", "stop"))


def test_finished_episode_stays_finished():
    episode = ActiveVLNEpisode(
        ActiveVLNConfig(step_budget=9, turn_budget=9), instruction="", goal_m=np.zeros(3), reference_G3=np.zeros((1, 3))
    )
    first = episode.finish(episode.plan("stop"), np.zeros((0, 3)))
    assert (first.reward, first.done, episode.end_reason) == (10.0, True, REACHED)
    assert len(episode.plan("move forward 25cm")) == 0
    again = episode.finish(np.zeros((0, 6)), np.zeros((0, 3)))
    assert (again.reward, again.done, again.info["total_reward"]) == (0.0, True, 10.0)


@pytest.mark.parametrize("action", ["stop", "move forward 30cm", "turn left 90 degrees"])
def test_history_that_is_no_movement_is_refused(action):
    with pytest.raises(HistoryError, match=f"must be moves of the r2r action space, found '{action}'"):
        ActiveVLNEpisode(
            ActiveVLNConfig(history_actions=(action,)),
            instruction="",
            goal_m=np.zeros(3),
            reference_G3=np.zeros((0, 3)),
        )
