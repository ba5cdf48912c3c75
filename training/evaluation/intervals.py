"""How sure a number over flights is: 95 % intervals of shares, means and paired differences, and exact tests of pairs.

Source: Wilson (1927); Agresti and Min (2005), matched pairs; McNemar (1947), exact; percentile bootstrap with the draws
of spec/seed_systems.md 2.8 (1000, seed 42).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]

BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 1000, 42
_Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % interval of a share. Raises ValueError without trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"expected 0 <= successes <= trials and at least one trial, found {successes} of {trials}")
    share, z2 = successes / trials, _Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, draws: int = BOOTSTRAP_DRAWS, seed: int = BOOTSTRAP_SEED
) -> Interval:
    """95 % interval of a mean: percentiles of the means of `draws` samples with replacement.

    The same values give the same interval. Of one value both ends are that value.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"expected a row of finite numbers, at least one; found an array {list(numbers.shape)}")
    chosen = np.random.default_rng(seed).integers(len(numbers), size=(draws, len(numbers)))
    low, high = np.percentile(numbers[chosen].mean(1), [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def matched_interval(gained: int, lost: int, pairs: int) -> Interval:
    """95 % interval of the difference of two shares on the same tasks.

    Wald's, after half a task was added to each of the four outcomes of a pair. Tasks that end alike under both make it
    narrower, not wider.

    Args:
        gained, lost: tasks that succeed under the first one only, under the second one only.
        pairs: tasks, at least one.
    """
    if min(gained, lost) < 0 or pairs < 1 or gained + lost > pairs:
        raise ValueError(f"expected at least one pair and at most as many changes, found {gained}, {lost} of {pairs}")
    tasks, difference = pairs + 2, gained - lost
    centre = difference / tasks
    half = _Z_95 * math.sqrt(gained + lost + 1 - difference**2 / tasks) / tasks
    return round(max(-1.0, centre - half), 4), round(min(1.0, centre + half), 4)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of as uneven a split, if both were equally likely; ties are left out. 1 where there is nothing.

    With the tasks that only one of two policies solved this is McNemar's exact test.
    """
    if min(wins, losses) < 0:
        raise ValueError(f"expected numbers >= 0, found {wins} and {losses}")
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)
