"""Success rates of two bundles: intervals agree with published values, and the summary says what was flown."""

import numpy as np
import pytest

from worldvln_edge.export.closed_loop import ClosedLoop, ClosedLoopError, fly_closed_loop, paired_interval, wilson


def test_wilson_interval_of_a_published_example():
    # 81 of 263: Newcombe, Statistics in Medicine 17 (1998) 857, table I.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_paired_interval_of_equal_flights_is_around_zero_and_narrower_than_of_independent_ones():
    flights = [True, False] * 20
    low, high = paired_interval(flights, flights)
    assert low == pytest.approx(-high)
    assert high < 0.07
    assert paired_interval(flights, [True] * 20 + [False] * 20)[1] > 3 * high


def test_paired_interval_holds_the_true_difference_in_95_of_100_cases():
    # Chances of (both, own only, other only, neither); the true difference is 0.1.
    cells = np.random.default_rng(0).choice(4, p=(0.5, 0.2, 0.1, 0.2), size=(1000, 60))
    intervals = [paired_interval((row < 2).tolist(), np.isin(row, (0, 2)).tolist()) for row in cells]
    covered = np.mean([low <= 0.1 <= high for low, high in intervals])
    assert 0.93 < covered < 0.985
    assert np.mean([high - low for low, high in intervals]) < 0.32


def test_summary_shows_both_rates_and_the_paired_difference():
    loop = ClosedLoop(successes=(True, False, True, True), reference=(True, True, False, True))
    assert loop.difference == 0.0
    assert "75.0%" in loop.summary()
    assert "1 won, 1 lost" in loop.summary()
    assert loop.measures()["fp32_success_rate"] == 0.75


def test_bundle_that_cannot_be_flown_is_named(tmp_path):
    with pytest.raises(ClosedLoopError, match="nowhere could not be flown"):
        fly_closed_loop(tmp_path / "nowhere", tmp_path / "nowhere", tasks=1, seed=0)
