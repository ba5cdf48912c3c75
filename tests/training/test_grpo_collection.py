"""Judging a collection: which segments are learnt from and how much, and what is kept of that on disk."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from grpo_flights import ended_after, expert_task, flown_along, fly, tiny_tokenizer
from small_models import random_model, tiny_config

from worldvln_edge.config import ConfigError
from worldvln_edge.training.grpo.advantages import NotFiniteError, expected_returns, group_advantages, segment_returns
from worldvln_edge.training.grpo.candidates import flight_name
from worldvln_edge.training.grpo.grpo_config import EvaluationConfig, GrpoConfig, objective_overrides
from worldvln_edge.training.grpo.held_out import HeldOutResult, paired_difference, read_result, write_result
from worldvln_edge.training.grpo.reward_terms import TermConfig
from worldvln_edge.training.grpo.rewards import RewardConfig, RewardError
from worldvln_edge.training.grpo.run_table import RunTable, header_line, plot_table, row_line
from worldvln_edge.training.grpo.scored_collection import (
    GrpoError,
    JudgedFlight,
    ScoredCollection,
    judge_collection,
    padded,
    read_collection,
    read_numbers,
    write_collection,
)
from worldvln_edge.training.grpo.task_pool import GeneratedTasks, ListedTasks, TaskPoolError
from worldvln_edge.training.grpo.trace import TRACE_SUFFIX, TraceError, write_trace

CONFIG = tiny_config()
STEP = CONFIG.horizon.step
TASKS = {f"task-{i}": expert_task(CONFIG, task_id=f"task-{i}") for i in range(2)}
GRPO = GrpoConfig()


@pytest.fixture(scope="module")
def traces():
    return fly(random_model(CONFIG), tiny_tokenizer(CONFIG), candidates=3, tasks=2)


@pytest.fixture(scope="module")
def many():
    return fly(random_model(CONFIG), tiny_tokenizer(CONFIG), candidates=12, tasks=2)


def judge(traces, config: GrpoConfig = GRPO):
    return judge_collection(traces, TASKS, config, step=STEP)


def test_every_segment_is_compared_within_its_task_by_what_it_leads_to(traces):
    judged = judge(traces)
    assert judged.groups == 6
    assert judged.dropped_groups == 0
    assert len(judged.samples) == 18
    assert judged.start_spread_cm > 0
    for task in TASKS:
        own = [i for i, trace in enumerate(traces) if trace.task_id == task]
        for segment in range(3):
            returns = [segment_returns(np.array(judged.flights[i].rewards), 0.9)[segment] for i in own]
            places = [
                next(k for k, (t, s) in enumerate(judged.samples) if t is traces[i] and s == segment) for i in own
            ]
            np.testing.assert_allclose(judged.advantages[places], group_advantages(np.array(returns)))


def test_first_segments_alone_are_compared_on_request(traces):
    judged = judge(traces, msgspec.structs.replace(GRPO, group_later_segments=False))
    assert {segment for _, segment in judged.samples} == {0}
    assert judged.start_spread_cm == 0.0


def test_what_earlier_rewards_let_expect_is_subtracted_on_request(many):
    expecting = msgspec.structs.replace(GRPO, subtract_expected=True)
    usual, judged = judge(many), judge(many, expecting)
    rewards = [np.array([flight.rewards for flight in judged.flights[first : first + 12]]) for first in (0, 12)]
    returns = [np.stack([segment_returns(own, 0.9) for own in group]) for group in rewards]
    for group, own, expected in zip((0, 1), returns, expected_returns(rewards, returns), strict=True):
        for segment in range(3):
            places = [k for k, (t, s) in enumerate(judged.samples) if s == segment and t.task_id == f"task-{group}"]
            compared = group_advantages(own[:, segment] - expected[:, segment])
            np.testing.assert_allclose(judged.advantages[places], compared, atol=1e-9)
            assert np.allclose(judged.advantages[places], usual.advantages[places]) == (segment == 0)
    # Too few flights for a fit: nothing is expected, so nothing is lost.
    few = [*many[:3], *many[12:15]]
    np.testing.assert_array_equal(judge(few, expecting).advantages, judge(few).advantages)


def test_the_bonus_of_a_success_is_never_expected_from_earlier_segments(many):
    """With rewards of 0, nothing but the bonus is left, and all of it stays."""
    expert = np.array(TASKS["task-0"].reference_path_raw)
    far = expert + np.linspace(0, 900, len(expert))[:, None]
    flights = [flown_along(trace, far if trace.candidate_id % 3 else expert) for trace in many]
    reward = RewardConfig(weights={"collision": 1.0}, success_bonus=0.5)
    plain, subtracted = (
        judge(flights, msgspec.structs.replace(GRPO, reward=reward, subtract_expected=subtracts))
        for subtracts in (False, True)
    )
    assert {flight.succeeded for flight in plain.flights} == {False, True}
    np.testing.assert_array_equal(subtracted.advantages, plain.advantages)


def test_a_group_that_is_worth_the_same_is_dropped_whatever_was_expected_of_it(many):
    """Flights of the first task end in their first segment or never, those of the second in the first or second."""
    flights = [
        replace(ended_after(trace, 1 + trace.candidate_id % 2), collided=True)
        if trace.candidate_id % 2 == 0 or trace.task_id == "task-1"
        else trace
        for trace in many
    ]
    reward = RewardConfig(weights={"collision": 1.0})
    judged = judge(flights, msgspec.structs.replace(GRPO, reward=reward, subtract_expected=True))
    assert {segment for trace, segment in judged.samples if trace.task_id == "task-0"} == {0}
    assert {segment for trace, segment in judged.samples if trace.task_id == "task-1"} == {0, 1}


def test_returns_that_follow_from_earlier_rewards_are_expected_and_others_are_not():
    generator = np.random.default_rng(0)
    rewards = [generator.normal(size=(8, 3)) + 5 * group for group in range(40)]
    noises = [generator.normal(size=8) for _ in rewards]
    returns = [
        np.stack([one[:, 0], 0.5 * one[:, 0] - 3, one[:, 0] - 2 * one[:, 1] + noise], 1)
        for one, noise in zip(rewards, noises, strict=True)
    ]
    for own, noise, expected in zip(returns, noises, expected_returns(rewards, returns), strict=True):
        assert not expected[:, 0].any()
        left = (own - expected) - (own - expected).mean(0)
        np.testing.assert_allclose(left[:, 1], 0, atol=1e-9)
        np.testing.assert_allclose(left[:, 2], noise - noise.mean(), atol=0.6)


def test_rounding_of_equal_rewards_foretells_nothing():
    rewards = np.array([[0.1 + 0.2, 0.0], [0.3, 0.0]] * 12)
    returns = np.stack([np.zeros(24), np.tile([1.0, 0.0], 12)], 1)
    assert not expected_returns([rewards], [returns])[0].any()


def test_a_flight_that_ended_early_is_compared_in_the_segments_that_it_has(traces):
    shorter = [ended_after(traces[0], 1), *traces[1:]]
    judged = judge(shorter)
    assert [s for t, s in judged.samples if t is shorter[0]] == [0]
    assert len(judged.samples) == 16
    # Nothing of it changes what the others were worth.
    assert judged.flights[1:] == judge(traces).flights[1:]
    # They are compared with it in its later segments too, where it stands still.
    for segment in (1, 2):
        returns = np.array([segment_returns(np.array(flight.rewards), 0.9)[segment] for flight in judged.flights[:3]])
        places = [
            next(k for k, (t, s) in enumerate(judged.samples) if t is trace and s == segment) for trace in traces[1:3]
        ]
        np.testing.assert_allclose(judged.advantages[places], group_advantages(returns)[1:])


def test_the_last_flight_that_still_flies_is_compared_with_those_that_were_stopped(traces):
    stopped = [traces[0], *(ended_after(trace, 1) for trace in traces[1:3])]
    judged = judge(stopped)
    assert [s for t, s in judged.samples if t is traces[0]] == [0, 1, 2]
    assert judged.dropped_groups == 0


def test_flights_that_are_worth_the_same_or_fly_alone_are_dropped_and_counted(traces):
    expert = np.array(TASKS["task-0"].reference_path_raw)
    same = [flown_along(trace, expert) for trace in traces[:3]]
    judged = judge([*same, *traces[3:]])
    assert (judged.groups, judged.dropped_groups) == (3, 3)
    assert judge([traces[0], *traces[3:]]).dropped_groups == 3
    with pytest.raises(GrpoError, match=r"none of the 3 groups of this collection can be learnt from: .* fly more"):
        judge(same)


def test_a_flight_of_no_task_is_refused(traces):
    with pytest.raises(GrpoError, match=r"task 'elsewhere', candidate 0 .* the tasks of this run have no such task"):
        judge([replace(traces[0], task_id="elsewhere")])


def nan_reward(terms: TermConfig, step: int):
    return lambda trace, task: np.full(3, np.nan)


def test_a_reward_that_is_not_a_number_ends_the_run_with_the_flight(traces):
    config = msgspec.structs.replace(GRPO, reward=RewardConfig(weights={f"{__name__}:nan_reward": 1.0}))
    with pytest.raises(NotFiniteError, match=r"task 'task-0', candidate 0 \(seed \d+\): reward .* is not finite"):
        judge(traces, config)


def test_success_is_worth_its_bonus_in_every_segment(traces):
    expert = np.array(TASKS["task-0"].reference_path_raw)
    flights = [flown_along(traces[0], expert), *traces[1:]]
    plain, bonus = (
        judge(flights, msgspec.structs.replace(GRPO, reward=RewardConfig(success_bonus=b))).flights for b in (0.0, 0.2)
    )
    assert plain[0].succeeded
    for one, other in zip(plain, bonus, strict=True):
        np.testing.assert_allclose(np.subtract(other.rewards, one.rewards), 0.2 * one.succeeded, atol=1e-12)


def test_published_weights_are_never_negative(traces):
    published = msgspec.convert(objective_overrides("published")["grpo"], GrpoConfig)
    judged = judge(traces, published)
    assert len(judged.samples) == 18
    assert (judged.advantages >= 0).all()
    assert (judge(traces).advantages < 0).any()
    without = {name: expert_task(CONFIG, task_id=name, reference_path_raw=()) for name in TASKS}
    success = msgspec.structs.replace(published, reward=RewardConfig(weights={"success": 1.0}))
    with pytest.raises(RewardError, match='"reference_path_raw", which the published weights need'):
        judge_collection(traces, without, success, step=STEP)


def test_a_collection_reads_back_as_it_was_written(traces, tmp_path):
    judged = judge(traces)
    scores = padded([torch.rand(4 + index % 2) for index in range(len(judged.samples))])
    names = [flight_name(trace.group_id, trace.candidate_id) + TRACE_SUFFIX for trace, _ in judged.samples]
    for name, (trace, _) in zip(names, judged.samples, strict=True):
        write_trace(trace, tmp_path / name)
    collection = ScoredCollection(
        samples=judged.samples,
        advantages=torch.from_numpy(judged.advantages).float(),
        old_BN=scores,
        ref_BN=scores - 1,
        numbers={"reward": 0.5},
    )
    file = tmp_path / "scores.safetensors"
    assert read_collection(file, tmp_path) is None
    write_collection(collection, names, file)
    again = read_collection(file, tmp_path)
    assert again is not None
    for name in ("advantages", "old_BN", "ref_BN"):
        assert torch.equal(getattr(again, name), getattr(collection, name))
    assert [(t.seed, s) for t, s in again.samples] == [(t.seed, s) for t, s in judged.samples]
    assert read_numbers(file) == {"reward": 0.5}
    (tmp_path / names[0]).unlink()
    with pytest.raises(TraceError, match="no such trace"):
        read_collection(file, tmp_path)
    file.write_bytes(b"no scores")
    with pytest.raises(GrpoError, match=r"scores.safetensors: no scores of a collection .*; delete its folder"):
        read_numbers(file)


def test_scores_that_cannot_be_written_are_named(traces, tmp_path):
    empty = ScoredCollection(
        samples=(), advantages=torch.zeros(0), old_BN=torch.zeros(0, 1), ref_BN=torch.zeros(0, 1), numbers={}
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(GrpoError, match=r"cannot be written .*; make room and give the same command again"):
        write_collection(empty, [], tmp_path / "file" / "scores.safetensors")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": 1}, "grpo.candidates must be >= 2, found 1"),
        ({"passes": 0}, "grpo.passes must be >= 1, found 0"),
        ({"k3_limit": -1.0}, "grpo.k3_limit must be finite and >= 0"),
        ({"learning_rate": 0.0}, "optimiser.learning_rate must be finite and > 0"),
        ({"objective": {"kind": "published"}, "early_stopping": [{"rule": "stall"}]}, "is not part of the published"),
        ({"early_stopping": [{"rule": "stal"}]}, "Invalid value 'stal'"),
        ({"evaluation": {"tasks": 0}}, "grpo.evaluation.tasks must be >= 1, found 0"),
        ({"evaluation": {"every": -1}}, "grpo.evaluation.every must be >= 0, found -1"),
        ({"reward": {"discount": 1.5}}, r"grpo.reward.discount must be in \[0, 1\]"),
        ({"reward": {"success_bonus": -0.1}}, "grpo.reward.success_bonus must be finite and >= 0"),
        ({"published": {"ce": -1.0}}, "grpo.published.ce must be finite and >= 0"),
        ({"objectve": {}}, "unknown field `objectve`"),
        ({"ema_decay": 1.0}, r"grpo.ema_decay must be in \[0, 1\), found 1.0"),
        ({"subtract_expected": True, "group_later_segments": False}, "about segments behind the first"),
        ({"subtract_expected": True, "objective": {"kind": "published"}}, "subtract_expected is not part of the publ"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict, message: str):
    with pytest.raises((ConfigError, msgspec.ValidationError), match=message):
        msgspec.convert(values, GrpoConfig)


def test_a_run_may_be_made_longer_and_evaluated_more_often():
    other = msgspec.structs.replace(GRPO, collections=99, evaluation=EvaluationConfig(every=3))
    assert other.identity() == GRPO.identity()
    assert msgspec.structs.replace(GRPO, tasks=5).identity() != GRPO.identity()


def _result(rewards: dict[tuple[str, int], float]) -> HeldOutResult:
    flights = tuple(
        JudgedFlight(task_id=task, candidate_id=k, seed=k, rewards=(reward,), succeeded=reward > 0.5)
        for (task, k), reward in rewards.items()
    )
    return HeldOutResult(flights=flights, failed=0, environment_steps=0, seconds=0.0)


def test_differences_are_paired_by_task_and_seed_and_their_error_is_over_tasks(tmp_path):
    old = _result({("a", 0): 0.1, ("a", 1): 0.3, ("b", 0): 0.9, ("c", 0): 0.5})
    new = _result({("a", 0): 0.2, ("a", 1): 0.6, ("b", 0): 0.8, ("d", 0): 0.0})
    found = paired_difference(new, old)
    assert (found.tasks, found.flights) == (2, 3)
    assert found.mean == pytest.approx((0.2 - 0.1) / 2)
    assert found.standard_error == pytest.approx(np.std([0.2, -0.1], ddof=1) / np.sqrt(2))
    assert paired_difference(new, old, "succeeded").mean == pytest.approx((0.5 + 0.0) / 2)
    with pytest.raises(GrpoError, match="no flight of the same task and seed"):
        paired_difference(_result({("z", 0): 0.1}), old)
    file = tmp_path / "evaluations" / "step.json"
    assert read_result(file) is None
    write_result(new, file)
    assert read_result(file) == new
    file.write_text("{}")
    with pytest.raises(GrpoError, match=r"no evaluation of flights .*; delete it to evaluate again"):
        read_result(file)
    with pytest.raises(GrpoError, match="cannot be written"):
        write_result(new, file / "below")


def test_tasks_of_a_list_come_in_a_new_order_once_all_were_flown():
    listed = [expert_task(CONFIG, task_id=f"t{i}") for i in range(6)]
    pool = ListedTasks(listed, seed=3, source="tasks.json")
    epochs = [[task.task_id for c in (2 * e, 2 * e + 1) for task in pool.take(c, 3)] for e in range(3)]
    assert all(sorted(epoch) == [f"t{i}" for i in range(6)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [task.task_id for task in ListedTasks(listed, seed=3, source="").take(1, 3)] == epochs[0][3:]
    assert ListedTasks(listed[:5], seed=3, source="").fingerprint != pool.fingerprint
    with pytest.raises(TaskPoolError, match=r"tasks.json: 6 tasks, and 7 are wanted"):
        pool.take(0, 7)
    with pytest.raises(TaskPoolError, match=r"tasks.json: no tasks"):
        ListedTasks([], seed=0, source="tasks.json")
    with pytest.raises(TaskPoolError, match="2 tasks have the id 't0'"):
        ListedTasks([*listed, listed[0]], seed=0, source="tasks.json")


def test_generated_tasks_never_come_twice():
    pool = GeneratedTasks("train")
    assert [task.task_id for c in range(2) for task in pool.take(c, 2)] == [f"train-{i:06d}" for i in range(4)]


def test_the_table_counts_steps_replaces_rows_and_forgets_what_was_interrupted(tmp_path):
    lines: list[str] = []
    table = RunTable(tmp_path / "collections.jsonl", done=0, show=lines.append)
    row = {"collection": 1, "environment_steps": 10, "reward": 0.25, "held_out_difference": -0.5, "k3": float("nan")}
    for number in (0, 1, 1, 2):
        table.add({**row, "collection": number})
    assert [r["environment_steps_total"] for r in table.rows] == [10, 20, 30]
    assert lines[0] == header_line()
    assert len(lines[1]) == len(lines[0])
    assert "-0.5000" in lines[1]
    again = RunTable(tmp_path / "collections.jsonl", done=1)
    assert [r["collection"] for r in again.rows] == [0, 1]
    assert row_line(again.rows[1]).split()[:3] == ["1", "20", "0.2500"]
    plot_table(again.rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    plot_table([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
