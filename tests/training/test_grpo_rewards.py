"""Rewards of flown segments: what each rewards, how they are summed, and what cannot be judged."""

from dataclasses import replace

import numpy as np
import pytest
from grpo_flights import ended_after, expert_task, flown_along, fly, tiny_tokenizer
from small_models import random_model, tiny_config

from worldvln_edge.config import ConfigError
from worldvln_edge.training.grpo.advantages import NotFiniteError, segment_returns
from worldvln_edge.training.grpo.reward_terms import TermConfig, action_costs, score_pose
from worldvln_edge.training.grpo.rewards import (
    REWARDS,
    RewardConfig,
    RewardError,
    WeightedRewards,
    has_succeeded,
)

CONFIG = tiny_config()
STEP = CONFIG.horizon.step
TASK = expert_task(CONFIG)
EXPERT = np.array(TASK.reference_path_raw)


@pytest.fixture(scope="module")
def trace():
    return fly(random_model(CONFIG), tiny_tokenizer(CONFIG), candidates=1, tasks=1)[0]


def reward(name: str, trace, task=TASK, terms: TermConfig | None = None) -> np.ndarray:
    return REWARDS[name](terms or TermConfig(), STEP)(trace, task)


def test_an_expert_has_the_highest_reward_of_every_kind(trace):
    flown = flown_along(trace, EXPERT)
    for name, best in {"action": [1, 1, 1], "task": [1, 1, 1], "success": [0, 0, 1], "path": [1, 1, 1]}.items():
        np.testing.assert_allclose(reward(name, flown), best, rtol=1e-12, err_msg=name)
    assert not reward("collision", flown).any()


@pytest.mark.parametrize("name", ["action", "task", "path"])
def test_who_strays_more_has_less(trace, name: str):
    strayed = [reward(name, flown_along(trace, EXPERT + np.array([0, offset, 0, 0, 0, 0]))) for offset in (0, 50, 200)]
    assert (strayed[0] > strayed[1]).all()
    assert (strayed[1] > strayed[2]).all()


def test_numbers_of_a_flight_beside_the_path_are_those_of_the_formulas(trace):
    """1 m to the side and 5 degrees off, all the time."""
    flown = flown_along(trace, EXPERT + np.array([0, 100, 0, 0, 5, 0]))
    yaw = np.radians(5) ** 2
    cost = 1 / 3 + yaw + 0.2 * (1 + yaw) / 6
    np.testing.assert_allclose(reward("action", flown), np.full(3, 1 / (1 + cost)), rtol=1e-12)
    dense = 1 / (1 + 0.25 + 0.25)
    np.testing.assert_allclose(reward("task", flown), np.full(3, 0.85 * dense), rtol=1e-12)
    near = TermConfig(near_m=1.5, near_deg=6.0, success_bonus=1.0)
    np.testing.assert_array_equal(reward("task", flown, terms=near), np.ones(3))


def test_angles_wrap_in_every_term(trace):
    turned = EXPERT + np.array([0, 0, 0, 0, 360, 360])
    np.testing.assert_allclose(reward("action", flown_along(trace, turned)), np.ones(3))
    costs = action_costs(turned, EXPERT, wraps_angles=False)
    assert costs.yaw == pytest.approx(0)
    assert costs.all6 > 1
    assert score_pose(turned[0], EXPERT[0], TermConfig()).yaw_error_deg == pytest.approx(0)


def test_a_flight_that_ended_early_stands_where_it_ended(trace):
    whole = flown_along(trace, EXPERT)
    short = ended_after(whole, 1)
    stood = EXPERT.copy()
    stood[STEP + 1 :] = stood[STEP]
    for name in ("action", "task", "path", "success"):
        np.testing.assert_array_equal(reward(name, short), reward(name, flown_along(trace, stood)), err_msg=name)
    assert reward("action", short)[0] == 1.0 > reward("action", short)[1] > reward("action", short)[2]


def test_a_collision_costs_in_the_last_segment_flown_and_forbids_success(trace):
    crashed = flown_along(trace, EXPERT, collided=True)
    np.testing.assert_array_equal(reward("collision", crashed), [0, 0, -1])
    np.testing.assert_array_equal(reward("collision", ended_after(crashed, 2)), [0, -1, 0])
    assert not reward("success", crashed).any()


def test_reference_is_the_mean_log_probability_of_a_segments_bits(trace):
    bits = sum(one.numel() for one in trace.segments[0].log_probs)
    found = reward("reference", trace)
    np.testing.assert_allclose(found, [segment.log_prob / bits for segment in trace.segments], rtol=1e-9)
    assert (found < 0).all()
    assert reward("reference", ended_after(trace, 1))[1:].tolist() == [0, 0]


def test_rewards_are_summed_by_weight_and_a_weight_of_0_is_not_asked(trace):
    flown = flown_along(trace, EXPERT + np.array([0, 30, 0, 0, 0, 0]))
    found = WeightedRewards({"action": 0.3, "task": 1.3, "path": 0.0}, TermConfig(), step=STEP)(flown, TASK)
    np.testing.assert_allclose(found, 0.3 * reward("action", flown) + 1.3 * reward("task", flown), rtol=1e-12)
    WeightedRewards({"success": 1.0, "action": 0.0}, TermConfig(), step=STEP)(
        flown, expert_task(CONFIG, reference_path_raw=())
    )


def own_reward(terms: TermConfig, step: int):
    """A reward of somebody else's."""
    return lambda trace, task: np.arange(3.0)


def test_a_reward_of_your_own_goes_by_module_and_function(trace):
    name = f"{__name__}:own_reward"
    found = WeightedRewards({name: 2.0, "success": 1.0}, TermConfig(), step=STEP)(flown_along(trace, EXPERT), TASK)
    np.testing.assert_array_equal(found, [0, 2, 5])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"acton": 1.0}, r"no reward 'acton'; known are action, task, success, .* module:function"),
        ({"numpy:no_such": 1.0}, "'numpy:no_such' cannot be imported"),
        ({"action": 0.0}, "no reward has a weight other than 0"),
        ({"action": float("nan")}, "the weight of 'action' must be finite, found nan"),
    ],
)
def test_weights_that_reward_nothing_are_refused(weights, message: str):
    with pytest.raises(ConfigError, match=message):
        RewardConfig(weights=weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha_yaw": -1.0}, "alpha_yaw must be finite and >= 0"),
        ({"position_scale_m": 0.0}, "position_scale_m must be finite and > 0"),
        ({"success_bonus": 1.5}, r"success_bonus must be in \[0, 1\], found 1.5"),
    ],
)
def test_terms_out_of_range_are_refused(values, message: str):
    with pytest.raises(ConfigError, match=message):
        TermConfig(**values)


def nan_reward(terms: TermConfig, step: int):
    return lambda trace, task: np.array([0.0, np.nan, 0.0])


def long_reward(terms: TermConfig, step: int):
    return lambda trace, task: np.zeros(4)


def test_invalid_flights_are_errors_that_name_them_and_never_zero(trace):
    both = WeightedRewards({"action": 1.0, "success": 1.0}, TermConfig(), step=STEP)
    who = rf"task 'task-0', candidate 0 \(seed {trace.seed}\)"
    lost = EXPERT.copy()
    lost[7] = np.nan
    with pytest.raises(RewardError, match=rf"{who}: the flown poses hold NaN or infinity; collect it again"):
        both(flown_along(trace, lost), TASK)
    with pytest.raises(RewardError, match=rf"{who}: nothing was flown"):
        both(replace(trace, segments=(), environment_steps=0), TASK)
    with pytest.raises(RewardError, match=rf'{who}: the task has no "reference_path_raw"; set the weights'):
        both(trace, expert_task(CONFIG, reference_path_raw=()))
    with pytest.raises(RewardError, match=rf'{who}: the task has no "end_pos"'):
        has_succeeded(trace, expert_task(CONFIG, end_pos=None))
    with pytest.raises(NotFiniteError, match=rf"{who}: reward '.*nan_reward' is not finite: \[0.0, nan, 0.0\]"):
        WeightedRewards({f"{__name__}:nan_reward": 1.0}, TermConfig(), step=STEP)(trace, TASK)
    with pytest.raises(RewardError, match=r"long_reward' gives \[4\] numbers, the others \[3\]"):
        WeightedRewards({"success": 1.0, f"{__name__}:long_reward": 1.0}, TermConfig(), step=STEP)(trace, TASK)
    with pytest.raises(RewardError, match=rf"{who}: 12 actions are no whole segments of 7"):
        WeightedRewards({"action": 1.0}, TermConfig(), step=7)(trace, TASK)


def test_an_expert_who_arrived_earlier_stays_there(trace):
    stood = EXPERT.copy()
    stood[10:] = stood[9]
    early = expert_task(CONFIG, reference_path_raw=TASK.reference_path_raw[:10])
    np.testing.assert_allclose(reward("action", flown_along(trace, stood), early), np.ones(3))


def test_a_segment_is_credited_for_what_it_leads_to():
    found = segment_returns(np.array([1.0, 0.0, 2.0]), 0.5)
    np.testing.assert_allclose(found, [(1 + 0 + 0.5) / 1.75, (0 + 1) / 1.5, 2.0])
    np.testing.assert_allclose(segment_returns(np.full(3, 0.7), 0.9), np.full(3, 0.7))
