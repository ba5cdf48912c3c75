"""Early stopping saves environment steps and leaves the group's comparison as it is."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from grpo_flights import ended_after, flown_along
from rollout_world import PATIENT, START, CountingEnvironments, flier, flight_tasks

from worldvln_edge.config import ConfigError
from worldvln_edge.poses import integrate_actions
from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.pool import LocalEnvironments
from worldvln_edge.training.grpo.advantages import group_advantages, segment_returns
from worldvln_edge.training.grpo.collection import Collection, CollectionConfig
from worldvln_edge.training.grpo.early_stopping import (
    BudgetRule,
    CollisionRule,
    FlightSoFar,
    StallRule,
    actions_allowed,
    early_stopping_rules,
    rule_that_ends,
)
from worldvln_edge.training.grpo.fly_collection import collect
from worldvln_edge.training.grpo.held_out import HeldOutResult
from worldvln_edge.training.grpo.reward_terms import TermConfig
from worldvln_edge.training.grpo.rewards import task_reward
from worldvln_edge.training.grpo.scored_collection import JudgedFlight
from worldvln_edge.training.grpo.stopping_saving import stopped_flight, stopping_saving
from worldvln_edge.training.grpo.trace import HORIZON, FlightTrace
from worldvln_edge.training.sim.simulator import Simulator

(TASK,) = flight_tasks(1)  # its expert flies 120 cm: 4.8 primitive actions
STEP = 4
CONFIG = CollectionConfig(candidates=6)


def so_far(actions: Sequence[Sequence[float]], *, task: Task = TASK, collided: bool = False) -> FlightSoFar:
    poses = np.concatenate([[START], integrate_actions(np.array(START), np.array(actions).reshape(-1, 6))])
    return FlightSoFar(task=task, poses=poses, collided=collided)


def moves(count: int, *, forward: float = 0.0, yaw: float = 0.0) -> np.ndarray:
    return np.tile([forward, 0.0, 0.0, 0.0, yaw, 0.0], (count, 1))


def test_the_budget_is_a_multiple_of_the_experts_motion_within_its_bounds():
    turning = msgspec.structs.replace(
        TASK, reference_path_raw=tuple((0.0, 0, 400, 0, yaw, 0) for yaw in (170.0, -175.0, -160.0, -130.0))
    )
    assert BudgetRule(least=1).budget(TASK) == pytest.approx(2 * 120 / 25)
    assert BudgetRule(least=1).budget(turning) == pytest.approx(2 * 60 / 15)
    assert BudgetRule(tolerance=1.5, least=1).budget(TASK) == pytest.approx(1.5 * 120 / 25)
    assert BudgetRule(least=30).budget(TASK) == 30
    assert BudgetRule(least=1, most=3).budget(TASK) == 3


def test_the_action_that_exceeds_the_budget_is_flown_and_no_more():
    rule = BudgetRule(tolerance=1.0, least=4.0, most=4.0)  # one metre, or 60 degrees
    assert rule.allowed(so_far([]), moves(4, forward=25.0)) == 4
    assert rule.allowed(so_far([]), moves(8, forward=25.0)) == 5
    assert rule.allowed(so_far([]), moves(8, forward=10.0)) == 8
    assert rule.allowed(so_far(moves(3, forward=30.0)), moves(4, forward=25.0)) == 1
    assert rule.allowed(so_far([]), moves(8, yaw=-15.0)) == 5
    assert not rule.is_over(so_far(moves(4, forward=24.0)))
    assert rule.is_over(so_far(moves(5, forward=25.0)))


def test_a_flight_stalls_when_neither_distance_nor_heading_error_has_changed():
    rule = StallRule(steps=STEP, position_cm=5.0, yaw_deg=1.0)
    still = moves(STEP, forward=0.1)
    assert not rule.is_over(so_far(still[:-1]))
    assert rule.is_over(so_far(still))
    assert rule.is_over(so_far([*moves(6, forward=20.0), *still]))
    assert not rule.is_over(so_far([*moves(6, forward=20.0), *still[:-1]]))
    assert not rule.is_over(so_far(moves(STEP, forward=3.0)))
    assert not rule.is_over(so_far(moves(STEP, yaw=0.5)))
    assert rule.allowed(so_far(still), still) == STEP


def test_a_turn_across_the_opposite_heading_is_no_progress_by_360_degrees():
    behind = msgspec.structs.replace(TASK, end_pos=(*START[:4], START[4] - 180.1, 0.0))
    assert StallRule(steps=STEP).is_over(so_far(moves(STEP, yaw=0.05), task=behind))


def test_the_first_rule_ends_a_flight_and_the_strictest_cuts_its_actions():
    rules = (CollisionRule(), BudgetRule(least=2, most=2), BudgetRule(least=1, most=1))
    assert rule_that_ends(rules, so_far(moves(1, forward=90.0), collided=True)) == "collision"
    assert rule_that_ends(rules, so_far(moves(1, forward=90.0))) == "budget"
    assert rule_that_ends(rules, so_far([])) == ""
    assert actions_allowed(rules, so_far([]), moves(8, forward=25.0)) == (2, "budget")
    assert actions_allowed((), so_far([]), moves(8, forward=25.0)) == (8, "")


def test_rules_say_which_task_they_cannot_be_applied_to():
    foreign = msgspec.structs.replace(TASK, end_pos=None, reference_path_raw=())
    with pytest.raises(ConfigError, match=r"task 'ahead-0' has no \"reference_path_raw\", so the budget rule"):
        BudgetRule().check(foreign)
    with pytest.raises(ConfigError, match=r"task 'ahead-0' has no \"end_pos\", so the stall rule"):
        StallRule().check(foreign)
    CollisionRule().check(foreign)
    for rule in early_stopping_rules():
        rule.check(TASK)


def test_impossible_rules_are_refused():
    with pytest.raises(ConfigError, match="budget tolerance must be finite and > 0, found 0"):
        BudgetRule(tolerance=0)
    with pytest.raises(ConfigError, match="stall steps must be >= 1, found 0"):
        StallRule(steps=0)
    with pytest.raises(ConfigError, match="stall yaw_deg must be finite and > 0, found nan"):
        StallRule(yaw_deg=float("nan"))


@pytest.fixture(scope="module")
def environments():
    with LocalEnvironments(config=PATIENT) as pool:
        yield pool


@pytest.fixture(scope="module")
def whole(environments, tmp_path_factory) -> list[FlightTrace]:
    """A group without early stopping."""
    return traces(environments, tmp_path_factory.mktemp("whole"), ())


@pytest.fixture(scope="module")
def rule(whole) -> BudgetRule:
    """A budget that half of the group exceeds before its last step."""
    moved = np.stack([np.diff(trace.flown_poses()[:-1], axis=0) for trace in whole])
    motion = np.linalg.norm(moved[:, :, :3], axis=2) / 25 + np.abs(moved[:, :, 4]) / 15
    budget = float(np.median(motion.sum(1)))
    return BudgetRule(least=budget, most=budget)


@pytest.fixture(scope="module")
def stopped(environments, tmp_path_factory, rule) -> list[FlightTrace]:
    """The same group with that budget."""
    return traces(environments, tmp_path_factory.mktemp("stopped"), (rule,))


def traces(environments, folder, rules) -> list[FlightTrace]:
    counted = CountingEnvironments(environments)
    collection = collect(folder / "flights", flier(counted, rules=rules), [TASK], CONFIG)
    flights = list(collection.traces())
    assert counted.steps == collection.report.environment_steps == sum(flight.environment_steps for flight in flights)
    return flights


def returns(flights: Sequence[FlightTrace]) -> np.ndarray:
    """Return of every segment: float64 [K, S]."""
    reward = task_reward(TermConfig(), STEP)
    return np.stack([segment_returns(reward(flight, TASK), 0.9) for flight in flights])


def advantages(flights: Sequence[FlightTrace]) -> np.ndarray:
    return np.stack([group_advantages(column) for column in returns(flights).T], 1)


def hovered(flight: FlightTrace) -> FlightTrace:
    """The flight with the rest of its horizon flown by the simulator, which is told to move nowhere."""
    left = flight.environment_steps_saved
    with Simulator.for_task(TASK, image_hw=(16, 24)) as simulator:
        simulator.reset(flight.flown_poses()[-1])
        for _ in range(left):
            simulator.step(np.zeros(6))
        poses = np.concatenate([flight.flown_poses(), simulator.poses[1:]])
    last = flight.segments[-1]
    grown = replace(
        last,
        actions=np.concatenate([last.actions, np.zeros((left, 6))]),
        poses=poses[-len(last.poses) - left :],
    )
    return replace(
        flight, segments=(*flight.segments[:-1], grown), environment_steps=flight.horizon_steps, end_reason=HORIZON
    )


def test_a_stopped_flight_is_the_same_up_to_where_it_was_stopped(whole, stopped, rule):
    ended = [flight for flight in stopped if flight.end_reason == "budget"]
    assert len(ended) == 3
    for flight, unstopped in zip(stopped, whole, strict=True):
        steps = flight.environment_steps
        np.testing.assert_array_equal(flight.flown_poses(), unstopped.flown_poses()[: steps + 1])
        assert (steps == 12) == (flight.end_reason == HORIZON)
        before = FlightSoFar(task=TASK, poses=flight.flown_poses()[:-1], collided=False)
        assert not rule.is_over(before)
        if steps < 12:
            assert rule.is_over(replace(before, poses=flight.flown_poses()))
    assert sum(flight.environment_steps_saved for flight in stopped) > 0


def test_a_whole_flight_that_is_stopped_afterwards_is_the_one_that_was_flown_under_the_rule(whole, stopped, rule):
    for flight, unstopped in zip(stopped, whole, strict=True):
        found = stopped_flight(unstopped, TASK, (rule,))
        assert (found is unstopped) == (flight.end_reason == HORIZON)
        assert (found.end_reason, found.environment_steps) == (flight.end_reason, flight.environment_steps)
        for one, other in zip(found.segments, flight.segments, strict=True):
            assert np.array_equal(one.actions, other.actions)
            assert np.array_equal(one.poses, other.poses)
            assert all(torch.equal(a, b) for a, b in zip(one.bits, other.bits, strict=True))
    with pytest.raises(ConfigError, match="a trace does not say when the flight touched something"):
        stopped_flight(whole[0], TASK, (CollisionRule(),))


def test_saving_counts_the_steps_and_pairs_the_flights(whole, stopped, rule):
    def judge(flights: Iterable[FlightTrace]) -> HeldOutResult:
        judged = [
            JudgedFlight(
                task_id=one.task_id,
                candidate_id=one.candidate_id,
                seed=one.seed,
                rewards=tuple(task_reward(TermConfig(), STEP)(one, TASK)),
                succeeded=one.end_reason == HORIZON,
            )
            for one in flights
        ]
        return HeldOutResult(flights=tuple(judged), failed=0, environment_steps=1, seconds=1)

    saving = stopping_saving(iter(whole), judge(whole), {TASK.task_id: TASK}, (rule,), judge)
    flown = sum(flight.environment_steps for flight in stopped)
    assert (saving.rules, saving.stopped) == (("budget",), 3)
    assert saving.saved == pytest.approx(1 - flown / 72)
    assert saving.success_difference.mean == -0.5
    assert saving.reward_difference.mean == pytest.approx(judge(stopped).reward - judge(whole).reward)


def test_what_a_stopped_flight_is_worth_is_what_the_simulator_gives_for_standing_still(stopped):
    """So the steps that were saved change no advantage of the group, of stopped members or others."""
    flown_out = [hovered(flight) for flight in stopped]
    assert {flight.environment_steps for flight in flown_out} == {12}
    np.testing.assert_array_equal(returns(stopped), returns(flown_out))
    np.testing.assert_array_equal(advantages(stopped), advantages(flown_out))


def test_members_that_were_not_stopped_keep_their_returns_and_their_order(whole, stopped):
    kept = [index for index, flight in enumerate(stopped) if flight.end_reason == HORIZON]
    before, after = returns(whole)[kept], returns(stopped)[kept]
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(
        np.argsort(advantages(whole)[kept], axis=0), np.argsort(advantages(stopped)[kept], axis=0)
    )


def test_a_stall_changes_no_advantage_and_leaving_the_flight_out_would(whole):
    """A member that stands still for its last segments, flown to the end or stopped there by the rule."""
    standing = whole[0].flown_poses()
    standing[STEP:] = standing[STEP]
    group = [flown_along(whole[0], standing), *whole[1:]]
    rule = StallRule(steps=STEP)
    after = FlightSoFar(task=TASK, poses=standing[: 2 * STEP + 1], collided=False)
    assert rule.is_over(after)
    assert not rule.is_over(replace(after, poses=standing[: STEP + 1]))
    saved = [ended_after(group[0], 2), *group[1:]]
    assert saved[0].environment_steps_saved == STEP
    np.testing.assert_array_equal(advantages(saved), advantages(group))
    survivors = advantages(group[1:])
    assert np.abs(survivors - advantages(group)[1:]).max() > 0.05


def test_rules_are_part_of_what_a_collection_is(environments, tmp_path):
    rules = (BudgetRule(), StallRule(steps=8), CollisionRule())
    collect(tmp_path / "one", flier(environments, rules=rules), [TASK], CollectionConfig(candidates=1))
    assert Collection(tmp_path / "one").settings.rules == rules
