"""Navigation metrics: the golden episodes, DTW against brute force, and every edge of the definitions."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from worldvln_edge.training.evaluation.navigation_metrics import (
    dtw_distance,
    fast_dtw,
    navigation_means,
    navigation_metrics,
    ndtw,
    path_length,
)

COLUMNS = {
    "SR": "success",
    "OSR": "oracle_success",
    "NE": "navigation_error_m",
    "ONE": "oracle_error_m",
    "SPL": "spl",
    "PL": "path_length_m",
    "steps": "steps",
    "nDTW": "ndtw",
    "sDTW": "sdtw",
}


def paths(most: int):
    # Whole numbers, so that paths share positions and ties happen.
    rows = st.integers(1, most).flatmap(lambda n: arrays(np.float64, (n, 3), elements=st.integers(-3, 3)))
    return rows.map(lambda path: path.astype(np.float64))


def brute_force_dtw(path, reference) -> float:
    """The definition: the cheapest of all monotonous matchings, found by looking at every one."""

    @cache
    def best(i, j):
        before = [(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
        return math.dist(path[i], reference[j]) + min((best(a, b) for a, b in before), default=0.0)

    return best(len(path) - 1, len(reference) - 1)


@pytest.mark.golden
@pytest.mark.parametrize(("dtw", "table"), [("exact", "exact_dtw"), ("fast", "fastdtw")])
def test_golden_episodes_give_every_metric_and_its_mean(golden, dtw, table):
    data = np.load(golden("seed_systems") / "navigation_metrics.npz")
    assert [str(name) for name in data["metric_names"]] == list(COLUMNS)
    episodes = [
        navigation_metrics(
            data[f"agent_{i:02d}"],
            data[f"reference_{i:02d}"],
            data["goals"][i],
            has_stopped=bool(data["stop_called"][i]),
            radius_m=float(data["success_distance"]),
            dtw=dtw,
        )
        for i in range(len(data["goals"]))
    ]
    found = [[getattr(episode, name) for name in COLUMNS.values()] for episode in episodes]
    np.testing.assert_allclose(found, data[f"per_episode_{table}"], rtol=1e-9, atol=1e-12)
    means = navigation_means(episodes)
    np.testing.assert_allclose(
        [getattr(means, name) for name in COLUMNS.values()], data[f"mean_{table}"], rtol=1e-9, atol=1e-12
    )
    assert (means.flights, means.n_invalid) == (20, 0)


@settings(max_examples=150, deadline=None)
@given(paths(8), paths(8))
def test_dtw_is_the_cheapest_of_all_matchings(path, reference):
    assert dtw_distance(path, reference) == pytest.approx(brute_force_dtw(path, reference), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(paths(30), paths(30))
def test_fast_dtw_is_an_upper_bound_and_exact_on_short_paths(path, reference):
    exact, fast = dtw_distance(path, reference), fast_dtw(path, reference)
    assert fast >= exact - 1e-9
    if min(len(path), len(reference)) < 3:
        assert fast == pytest.approx(exact, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(paths(12), st.lists(st.integers(1, 3), min_size=12, max_size=12))
def test_positions_that_repeat_change_no_likeness(path, times):
    distinct = path[np.concatenate([[True], (np.diff(path, axis=0) != 0).any(1)])]
    repeated = np.repeat(distinct, times[: len(distinct)], axis=0)
    assert ndtw(repeated, path) == ndtw(distinct, path)


def line(*x_m: float) -> np.ndarray:
    return np.array([[x, 0.0, 0.0] for x in x_m])


def test_the_radius_itself_is_too_far():
    assert navigation_metrics(line(0), line(0, 3), line(3)[0]).success == 0
    assert navigation_metrics(line(0, 0.001), line(0, 3), line(3)[0]).success == 1


def test_whoever_does_not_stop_fails_but_may_have_been_there():
    never = navigation_metrics(line(0, 5), line(0, 5), line(5)[0], has_stopped=False)
    assert (never.success, never.oracle_success, never.spl, never.sdtw) == (0, 1, 0, 0)
    assert never.ndtw == 1
    assert never.steps == 1


def test_no_way_to_go_and_none_gone_is_an_efficient_path():
    still = navigation_metrics(line(2), line(2), line(2)[0])
    assert (still.success, still.spl, still.path_length_m) == (1, 1, 0)
    wandering = navigation_metrics(line(2, 3, 2), line(2), line(2)[0])
    assert (wandering.success, wandering.spl) == (1, 0)


def test_spl_measures_against_the_straight_line_and_never_exceeds_success():
    detour = navigation_metrics(line(0, 6, 4), line(0, 4), line(4)[0])
    assert detour.spl == pytest.approx(4 / 8)
    short = navigation_metrics(line(0, 2), line(0, 4), line(4)[0])
    assert short.spl == 1


def test_another_rules_verdict_takes_the_place_of_success():
    turned_wrong = navigation_metrics(line(0, 4), line(0, 4), line(4)[0], succeeded=False)
    assert (turned_wrong.success, turned_wrong.spl, turned_wrong.sdtw) == (0, 0, 0)
    assert turned_wrong.oracle_success == 1


def test_geodesic_distances_take_the_place_of_straight_lines():
    found = navigation_metrics(line(0, 4), line(0, 4), line(4)[0], goal_distances_T=np.array([9.0, 5.0]))
    assert (found.navigation_error_m, found.success, found.oracle_error_m) == (5.0, 0, 5.0)


@pytest.mark.parametrize(
    "broken",
    [{"positions_T3": line(0, math.nan)}, {"goal_3": line(math.inf)[0]}, {"goal_distances_T": [math.inf, 1.0]}],
)
def test_a_flight_without_a_known_error_fails_and_is_left_out_of_the_errors(broken):
    arguments = {"positions_T3": line(0, 4), "reference_G3": line(0, 4), "goal_3": line(4)[0]} | broken
    invalid = navigation_metrics(**arguments)
    assert (invalid.is_valid, invalid.success, invalid.ndtw) == (False, 0, 0)
    good = navigation_metrics(line(0, 4), line(0, 4), line(5)[0])
    means = navigation_means([good, invalid])
    assert (means.n_invalid, means.success, means.navigation_error_m) == (1, 0.5, 1.0)
    assert math.isnan(navigation_means([invalid]).navigation_error_m)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions_T3": np.zeros((0, 3))}, "positions must be at least one row of 3"),
        ({"reference_G3": np.zeros((4, 2))}, "reference must be at least one row of 3"),
        ({"reference_G3": line(math.nan)}, "reference path holds positions that are not finite"),
        ({"goal_3": np.zeros(2)}, "goal must be 3 numbers"),
        ({"radius_m": 0.0}, "radius must be a finite number of m above 0"),
        ({"goal_distances_T": np.zeros(5)}, "expected 2 goal distances"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change, message):
    arguments = {"positions_T3": line(0, 4), "reference_G3": line(0, 4), "goal_3": line(4)[0]} | change
    with pytest.raises(ValueError, match=message):
        navigation_metrics(**arguments)


def test_means_need_flights():
    with pytest.raises(ValueError, match="no flights"):
        navigation_means([])


def test_length_of_a_path_is_the_sum_of_its_steps():
    assert path_length(np.array([[0, 0, 0], [3, 4, 0], [3, 4, 12]])) == 17
    assert path_length(line(1)) == 0
