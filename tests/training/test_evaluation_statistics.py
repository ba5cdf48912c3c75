"""Intervals, exact tests, and numbers over flights: alone, by group, and in pairs."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.training.evaluation.flight_statistics import (
    EvalFlight,
    comparison_tree,
    outcome,
    outcome_tree,
    pairing,
)
from worldvln_edge.training.evaluation.intervals import (
    bootstrap_interval,
    matched_interval,
    sign_test,
    wilson_interval,
)


def flight(number: int, *, success: bool = True, distance_m: float = 1.0, **changes) -> EvalFlight:
    made = EvalFlight(
        row="policy",
        task=f"task-{number}",
        kind="forward" if number % 2 else "approach",
        landmark=None if number % 2 else "red tower",
        instruction="fly",
        success=success,
        collided=False,
        oracle_success=success,
        final_distance_m=distance_m,
        final_yaw_error_deg=2.0,
        oracle_distance_m=distance_m,
        path_length_m=5.0,
        spl=float(success),
        ndtw=0.5,
        sdtw=0.5 * success,
    )
    return msgspec.structs.replace(made, **changes)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 40))
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_is_the_same_every_time_and_narrow_for_equal_values():
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap_interval(values) == bootstrap_interval(list(values))
    assert bootstrap_interval([2.5] * 9) == (2.5, 2.5)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0]]])
def test_bootstrap_needs_numbers(values):
    with pytest.raises(ValueError, match="a row of finite numbers"):
        bootstrap_interval(values)


@given(st.integers(0, 12), st.integers(0, 12))
def test_sign_test_counts_all_splits_that_are_as_uneven(wins, losses):
    total = wins + losses
    as_uneven = [k for k in range(total + 1) if abs(2 * k - total) >= abs(wins - losses)]
    expected = sum(math.comb(total, k) for k in as_uneven) / 2**total
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_sign_test_and_intervals_refuse_numbers_that_cannot_be():
    with pytest.raises(ValueError, match=">= 0"):
        sign_test(-1, 2)
    with pytest.raises(ValueError, match="at most as many changes"):
        matched_interval(3, 3, 5)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def test_a_flight_that_broke_off_counts_as_a_failure():
    result = outcome([flight(0), flight(1, success=False, error="NaN", distance_m=3.0)])
    assert (result.flights, result.success_rate, result.broken_off) == (2, 0.5, 1)
    assert result.mean_distance_m == 2.0
    low, high = result.distance_interval_m
    assert low <= 2.0 <= high


def test_groups_split_by_landmark_and_kind():
    tree = outcome_tree([flight(n, success=n < 3) for n in range(6)])
    assert (tree["all"].flights, tree["motion"].flights, tree["landmark"].flights) == (6, 3, 3)
    assert list(tree["by_kind"]) == ["approach", "forward"]
    assert tree["by_kind"]["approach"].success_rate == pytest.approx(2 / 3, abs=1e-4)
    assert "landmark" not in outcome_tree([flight(1)])


def test_comparison_counts_wins_and_losses_in_every_group():
    ours = [flight(n, success=n < 6, distance_m=1.0) for n in range(8)]
    theirs = [flight(n, success=n % 2 == 0, distance_m=2.0) for n in range(8)]
    tree = comparison_tree(ours, theirs)
    everything = tree["all"]
    assert (everything.success.gained, everything.success.lost, everything.success.difference) == (3, 1, 0.25)
    assert everything.success.p_value == pytest.approx(sign_test(3, 1))
    low, high = everything.success.interval
    assert low < 0.25 < high
    assert everything.paired.distance_gain_m == 1.0
    assert everything.paired.distance_gain_interval_m == (1.0, 1.0)
    assert everything.paired.nearer_p_value == pytest.approx(2 / 2**8, rel=1e-2)
    assert (tree["motion"].success.gained, tree["landmark"].success.gained) == (3, 0)
    assert tree["by_kind"]["approach"].success.lost == 1


def test_pairs_of_one_policy_with_itself_differ_by_nothing():
    flights = [flight(n, success=n % 3 == 0) for n in range(9)]
    same = comparison_tree(flights, flights)["all"]
    assert (same.success.difference, same.success.p_value, same.paired.nearer_p_value) == (0.0, 1.0, 1.0)
    assert same.paired.policy_nearer == 0.5


def test_rows_of_other_tasks_are_not_compared():
    with pytest.raises(ValueError, match="same tasks in the same order"):
        comparison_tree([flight(0), flight(1)], [flight(1), flight(0)])
    with pytest.raises(ValueError, match="same tasks in the same order"):
        pairing([flight(0)], [])
