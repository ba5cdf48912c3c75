"""From rewards to advantages: the product's, and the published shaping for comparison.

Legend: K candidates of a group, S segments.
Source: spec/training.md 5.5 (published), 5.9 items 5 and 6 (product).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

ADVANTAGE_EPS = 1e-4
EVEN_STD = 1e-6
"""Groups whose returns differ less say nothing, and are dropped."""
_FLIGHTS_A_SLOPE = 10
"""Fewer, and what is expected would be the return itself."""
_SHAPING_EPS, _LARGEST_EXPONENT = 1e-6, 10.0

Shaping = Literal["zscore_exp", "minstd_exp", "inv1p"]


class NotFiniteError(ValueError):
    """A reward that is NaN or infinite; the message names the flight."""


def segment_returns(rewards_S: np.ndarray, discount: float) -> np.ndarray:
    """Every segment's mean reward from itself on, nearer ones weighing more: a segment is credited for what follows.

    `R_c = sum_{m>=c} g^{m-c} r_m / sum_{m>=c} g^{m-c}`: float64 [S].
    """
    rewards = np.asarray(rewards_S, np.float64)
    returns = np.empty_like(rewards)
    total = weight = 0.0
    for c in range(len(rewards) - 1, -1, -1):
        total, weight = rewards[c] + discount * total, 1 + discount * weight
        returns[c] = total / weight
    return returns


def expected_returns(rewards_GKS: Sequence[np.ndarray], returns_GKS: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the rewards of earlier segments let expect of a segment's return, as a difference from the group's mean.

    Least squares over all flights, one fit a segment; rewards and returns are taken as differences from their group's
    mean. What a segment's return is expected from was settled before it drew anything, so subtracting it leaves the
    mean of the policy gradient as it is, but for the fit to the flights themselves, which vanishes with their number.

    Args:
        rewards_GKS, returns_GKS: of every group, float [K, S]; groups may differ in K. A reward must not depend on what
            is flown after its segment.

    Returns:
        Of every group, float64 [K, S]; 0 for the first segment, and where there are too few flights for a fit.
    """
    rewards = [rewards_KS - rewards_KS.mean(0) for rewards_KS in rewards_GKS]
    returns = np.concatenate([returns_KS - returns_KS.mean(0) for returns_KS in returns_GKS])
    seen = np.concatenate(rewards)
    found = [np.zeros_like(rewards_KS, dtype=np.float64) for rewards_KS in rewards]
    seen[:, seen.std(0) < EVEN_STD] = 0  # rounding, which says nothing
    free = len(returns) - len(returns_GKS)
    for segment in range(1, returns.shape[1]):
        if free < _FLIGHTS_A_SLOPE * segment:
            continue
        slopes, *_ = np.linalg.lstsq(seen[:, :segment], returns[:, segment], rcond=None)
        for expected_KS, rewards_KS in zip(found, rewards, strict=True):
            expected_KS[:, segment] = rewards_KS[:, :segment] @ slopes
    return found


def group_advantages(returns_K: np.ndarray, *, limit: float = 5.0) -> np.ndarray | None:
    """`(R - mean) / (std + 1e-4)` with the population's standard deviation, clipped to +-limit.

    Returns:
        float64 [K]; None where the group says nothing (one member, or all alike): it is dropped.

    Raises:
        NotFiniteError: a return that is NaN or infinite.
        ValueError: no members.
    """
    returns = np.asarray(returns_K, np.float64)
    if not len(returns):
        raise ValueError("the group is empty: none of its flights has this segment")
    if not np.isfinite(returns).all():
        raise NotFiniteError(f"returns of a group must be finite, found {returns.tolist()}")
    if len(returns) < 2 or float(returns.std()) < EVEN_STD:
        return None
    return np.clip((returns - returns.mean()) / (returns.std() + ADVANTAGE_EPS), -limit, limit)


class Shaped(NamedTuple):
    """Published shaping of the costs of a group."""

    values: np.ndarray
    """r, in (0, 1]: high where the cost is low."""
    distances: np.ndarray
    """What the exponential was taken of: z values, or distances from the least in standard deviations."""
    mean: float
    std: float


def shape_costs(costs_K: np.ndarray, shaping: Shaping) -> Shaped:
    """Published shaping of costs within a group.

    `zscore_exp`: everything better than average gets 1. `minstd_exp`: only the best does. `inv1p`: 1 / (1 + cost).
    """
    costs = np.asarray(costs_K, np.float64)
    mean, std = float(costs.mean()), float(costs.std())
    if shaping == "inv1p":
        return Shaped(1 / (1 + costs), costs, mean, std)
    start = mean if shaping == "zscore_exp" else float(costs.min())
    distances = (costs - start) / max(std, _SHAPING_EPS)
    return Shaped(np.exp(-np.minimum(np.maximum(distances, 0), _LARGEST_EXPONENT)), distances, mean, std)


def leave_one_out(values_K: np.ndarray) -> np.ndarray:
    """Every value minus the mean of the others; 0 for a group of one: float64 [K]."""
    values = np.asarray(values_K, np.float64)
    if len(values) < 2:
        return np.zeros_like(values)
    return values - (values.sum() - values) / (len(values) - 1)


def ranks_01(values_K: np.ndarray) -> np.ndarray:
    """Ranks from 0 (least) to 1, ties sharing their mean; 0 for a group of one: float64 [K]."""
    values = np.asarray(values_K, np.float64)
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return (below + (equal - 1) / 2) / max(1, len(values) - 1)
