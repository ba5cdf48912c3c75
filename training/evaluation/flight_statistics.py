"""Numbers over many flights: success with its interval, errors, by kind, and in pairs against the policy.

Distances are m, angles deg. A flight is one task flown under one row of the evaluation (policy, baseline).
Source: spec/training.md 8.6, last paragraph: motion tasks and landmark tasks apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

_Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


class EvalFlight(msgspec.Struct, frozen=True, kw_only=True):
    """How one task ended under one row."""

    row: str
    task: str
    kind: str
    landmark: str | None
    instruction: str
    success: bool
    collided: bool
    final_distance_m: float
    final_yaw_error_deg: float
    latency_ms: tuple[float, ...] = ()
    profiles: tuple[str, ...] = ()
    """Generation profiles that were flown; empty where nothing was generated."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A group of flights."""

    flights: int
    success_rate: float
    success_interval: tuple[float, float]
    """95 %, Wilson."""
    collisions: int
    mean_distance_m: float
    median_distance_m: float
    mean_yaw_error_deg: float
    median_yaw_error_deg: float


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Share of tasks that succeed under one row minus that under another, with its 95 % interval."""

    difference: float
    interval: tuple[float, float]
    gained: int
    """Tasks that succeed under the first row only."""
    lost: int
    """Tasks that succeed under the second row only."""


class Pairing(msgspec.Struct, frozen=True, kw_only=True):
    """The policy against another row, task by task."""

    policy_nearer: float
    """Share of tasks on which the policy ended nearer to the goal; a tie counts half."""
    policy_better_heading: float
    distance_gain_m: float
    """Mean of (other - policy), with the standard error of that mean below."""
    distance_gain_error_m: float
    yaw_gain_deg: float
    yaw_gain_error_deg: float


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927). Raises ValueError without trials."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"expected 0 <= successes <= trials and at least one trial, found {successes} of {trials}")
    share, z2 = successes / trials, _Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)


def success_difference(row: Sequence[EvalFlight], other: Sequence[EvalFlight]) -> Difference:
    """Success of `row` minus that of `other`, on the same tasks.

    The interval is that of Agresti and Min for matched pairs (2005): Wald's, after half a task was added to each of the
    four outcomes of a pair. Tasks that end alike under both rows make it narrower, not wider.

    Raises:
        ValueError: the rows do not hold the same tasks in the same order, or none.
    """
    _check_pairs(row, other)
    if not row:
        raise ValueError("no tasks to compare success on")
    gained = sum(a.success and not b.success for a, b in zip(row, other, strict=True))
    lost = sum(b.success and not a.success for a, b in zip(row, other, strict=True))
    tasks, difference = len(row) + 2, gained - lost
    centre = difference / tasks
    half = _Z_95 * math.sqrt(gained + lost + 1 - difference**2 / tasks) / tasks
    return Difference(
        difference=round(difference / len(row), 4),
        interval=(round(max(-1.0, centre - half), 4), round(min(1.0, centre + half), 4)),
        gained=gained,
        lost=lost,
    )


def outcome(flights: Sequence[EvalFlight]) -> Outcome:
    """Statistics of at least one flight."""
    distances = np.array([flight.final_distance_m for flight in flights])
    yaws = np.array([flight.final_yaw_error_deg for flight in flights])
    successes = sum(flight.success for flight in flights)
    return Outcome(
        flights=len(flights),
        success_rate=round(successes / len(flights), 4),
        success_interval=wilson_interval(successes, len(flights)),
        collisions=sum(flight.collided for flight in flights),
        mean_distance_m=round(float(distances.mean()), 4),
        median_distance_m=round(float(np.median(distances)), 4),
        mean_yaw_error_deg=round(float(yaws.mean()), 3),
        median_yaw_error_deg=round(float(np.median(yaws)), 3),
    )


def outcome_tree(flights: Sequence[EvalFlight]) -> dict[str, Any]:
    """`all`, `motion` (no landmark in the text), `landmark` and `by_kind` of one row; empty groups are left out."""
    groups = {
        "all": list(flights),
        "motion": [flight for flight in flights if flight.landmark is None],
        "landmark": [flight for flight in flights if flight.landmark is not None],
    }
    tree: dict[str, Any] = {name: outcome(group) for name, group in groups.items() if group}
    kinds = sorted({flight.kind for flight in flights})
    tree["by_kind"] = {kind: outcome([flight for flight in flights if flight.kind == kind]) for kind in kinds}
    return tree


def pairing(policy: Sequence[EvalFlight], other: Sequence[EvalFlight]) -> Pairing:
    """Compare two rows task by task.

    Raises:
        ValueError: the rows do not hold the same tasks in the same order.
    """
    _check_pairs(policy, other)
    distance = np.array([b.final_distance_m - a.final_distance_m for a, b in zip(policy, other, strict=True)])
    yaw = np.array([b.final_yaw_error_deg - a.final_yaw_error_deg for a, b in zip(policy, other, strict=True)])
    return Pairing(
        policy_nearer=_share_won(distance),
        policy_better_heading=_share_won(yaw),
        distance_gain_m=round(float(distance.mean()), 4),
        distance_gain_error_m=_standard_error(distance),
        yaw_gain_deg=round(float(yaw.mean()), 3),
        yaw_gain_error_deg=_standard_error(yaw),
    )


def _check_pairs(row: Sequence[EvalFlight], other: Sequence[EvalFlight]) -> None:
    if [flight.task for flight in row] != [flight.task for flight in other]:
        raise ValueError("only rows with the same tasks in the same order can be compared in pairs")


def _share_won(gains: np.ndarray) -> float:
    return round(float((gains > 0).mean() + 0.5 * (gains == 0).mean()), 4)


def _standard_error(gains: np.ndarray) -> float:
    return round(float(gains.std(ddof=1) / math.sqrt(len(gains))), 4) if len(gains) > 1 else 0.0
