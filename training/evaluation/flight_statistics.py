"""Numbers over many flights: success with its interval, errors, by kind, and in pairs against another row.

Distances are m, angles deg. A flight is one task flown under one row of the evaluation (policy, baseline). Every flight
counts: one that broke off is a failure that ends where the drone was.
Source: spec/training.md 8.6, last paragraph (motion tasks and landmark tasks apart); spec/seed_systems.md 2.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from worldvln_edge.training.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    matched_interval,
    sign_test,
    wilson_interval,
)


class EvalFlight(msgspec.Struct, frozen=True, kw_only=True):
    """How one task ended under one row. `flight_outcome.py` says how each number is measured."""

    row: str
    task: str
    kind: str
    landmark: str | None
    instruction: str
    success: bool
    collided: bool
    oracle_success: bool
    final_distance_m: float
    """Navigation error: from the last position to the goal."""
    final_yaw_error_deg: float
    oracle_distance_m: float
    """Least distance of any position to the goal."""
    path_length_m: float
    spl: float
    ndtw: float
    sdtw: float
    error: str | None = None
    """Why the flight broke off; None: it was flown to its end. Whether it had collided by then is not known."""
    latency_ms: tuple[float, ...] = ()
    profiles: tuple[str, ...] = ()
    """Generation profiles that were flown; empty where nothing was generated."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A group of flights. Intervals are 95 %: Wilson for shares, bootstrap for means."""

    flights: int
    success_rate: float
    success_interval: Interval
    oracle_success_rate: float
    oracle_success_interval: Interval
    collisions: int
    broken_off: int
    """Flights without an end, counted as failures."""
    mean_distance_m: float
    distance_interval_m: Interval
    median_distance_m: float
    mean_yaw_error_deg: float
    yaw_error_interval_deg: Interval
    median_yaw_error_deg: float
    mean_oracle_distance_m: float
    mean_path_length_m: float
    spl: float
    spl_interval: Interval
    ndtw: float
    ndtw_interval: Interval
    sdtw: float
    sdtw_interval: Interval


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Share of tasks that succeed under one row minus that under another, with its 95 % interval (Agresti and Min)."""

    difference: float
    interval: Interval
    gained: int
    """Tasks that succeed under the first row only."""
    lost: int
    """Tasks that succeed under the second row only."""
    p_value: float
    """McNemar's exact test: how likely as uneven a split is between two policies that are alike."""


class Pairing(msgspec.Struct, frozen=True, kw_only=True):
    """The policy against another row, task by task. Gains are other minus policy: above 0, the policy is better."""

    policy_nearer: float
    """Share of tasks on which the policy ended nearer to the goal; a tie counts half."""
    nearer_p_value: float
    """Sign test of these tasks, ties left out."""
    policy_better_heading: float
    distance_gain_m: float
    distance_gain_error_m: float
    """Standard error of the mean."""
    distance_gain_interval_m: Interval
    """95 %, bootstrap over tasks."""
    yaw_gain_deg: float
    yaw_gain_error_deg: float
    yaw_gain_interval_deg: Interval


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two rows on the same tasks and seeds."""

    tasks: int
    success_rate: float
    other_success_rate: float
    success: Difference
    paired: Pairing


def success_difference(row: Sequence[EvalFlight], other: Sequence[EvalFlight]) -> Difference:
    """Success of `row` minus that of `other`, on the same tasks; the interval is `intervals.matched_interval`.

    Raises:
        ValueError: the rows do not hold the same tasks in the same order, or none.
    """
    _check_pairs(row, other)
    if not row:
        raise ValueError("no tasks to compare success on")
    gained = sum(a.success and not b.success for a, b in zip(row, other, strict=True))
    lost = sum(b.success and not a.success for a, b in zip(row, other, strict=True))
    return Difference(
        difference=round((gained - lost) / len(row), 4),
        interval=matched_interval(gained, lost, len(row)),
        gained=gained,
        lost=lost,
        p_value=_significant(sign_test(gained, lost)),
    )


def outcome(flights: Sequence[EvalFlight]) -> Outcome:
    """Statistics of at least one flight."""
    columns = {
        name: np.array([getattr(flight, name) for flight in flights], np.float64)
        for name in (
            *("final_distance_m", "final_yaw_error_deg", "oracle_distance_m", "path_length_m"),
            *("spl", "ndtw", "sdtw"),
        )
    }
    mean = {name: round(float(values.mean()), 4) for name, values in columns.items()}
    successes = sum(flight.success for flight in flights)
    oracle_successes = sum(flight.oracle_success for flight in flights)
    return Outcome(
        flights=len(flights),
        success_rate=round(successes / len(flights), 4),
        success_interval=wilson_interval(successes, len(flights)),
        oracle_success_rate=round(oracle_successes / len(flights), 4),
        oracle_success_interval=wilson_interval(oracle_successes, len(flights)),
        collisions=sum(flight.collided for flight in flights),
        broken_off=sum(flight.error is not None for flight in flights),
        mean_distance_m=mean["final_distance_m"],
        distance_interval_m=bootstrap_interval(columns["final_distance_m"]),
        median_distance_m=round(float(np.median(columns["final_distance_m"])), 4),
        mean_yaw_error_deg=mean["final_yaw_error_deg"],
        yaw_error_interval_deg=bootstrap_interval(columns["final_yaw_error_deg"]),
        median_yaw_error_deg=round(float(np.median(columns["final_yaw_error_deg"])), 4),
        mean_oracle_distance_m=mean["oracle_distance_m"],
        mean_path_length_m=mean["path_length_m"],
        spl=mean["spl"],
        spl_interval=bootstrap_interval(columns["spl"]),
        ndtw=mean["ndtw"],
        ndtw_interval=bootstrap_interval(columns["ndtw"]),
        sdtw=mean["sdtw"],
        sdtw_interval=bootstrap_interval(columns["sdtw"]),
    )


def outcome_tree(flights: Sequence[EvalFlight]) -> dict[str, Any]:
    """`all`, `motion` (no landmark in the text), `landmark` and `by_kind` of one row; empty groups are left out."""
    groups, kinds = _groups(flights)
    tree: dict[str, Any] = {name: outcome([flights[i] for i in chosen]) for name, chosen in groups.items()}
    tree["by_kind"] = {kind: outcome([flights[i] for i in chosen]) for kind, chosen in kinds.items()}
    return tree


def comparison_tree(row: Sequence[EvalFlight], other: Sequence[EvalFlight]) -> dict[str, Any]:
    """Two rows compared in the groups of `outcome_tree`.

    Raises:
        ValueError: the rows do not hold the same tasks in the same order.
    """
    _check_pairs(row, other)
    groups, kinds = _groups(row)

    def of(chosen: Sequence[int]) -> Comparison:
        ours, theirs = [row[i] for i in chosen], [other[i] for i in chosen]
        return Comparison(
            tasks=len(chosen),
            success_rate=round(sum(flight.success for flight in ours) / len(ours), 4),
            other_success_rate=round(sum(flight.success for flight in theirs) / len(theirs), 4),
            success=success_difference(ours, theirs),
            paired=pairing(ours, theirs),
        )

    tree: dict[str, Any] = {name: of(chosen) for name, chosen in groups.items()}
    tree["by_kind"] = {kind: of(chosen) for kind, chosen in kinds.items()}
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
        nearer_p_value=_significant(sign_test(int((distance > 0).sum()), int((distance < 0).sum()))),
        policy_better_heading=_share_won(yaw),
        distance_gain_m=round(float(distance.mean()), 4),
        distance_gain_error_m=_standard_error(distance),
        distance_gain_interval_m=bootstrap_interval(distance),
        yaw_gain_deg=round(float(yaw.mean()), 3),
        yaw_gain_error_deg=_standard_error(yaw),
        yaw_gain_interval_deg=bootstrap_interval(yaw),
    )


def _groups(flights: Sequence[EvalFlight]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Places of the flights of every group that has some, and of every kind."""
    groups = {
        "all": list(range(len(flights))),
        "motion": [i for i, flight in enumerate(flights) if flight.landmark is None],
        "landmark": [i for i, flight in enumerate(flights) if flight.landmark is not None],
    }
    kinds: dict[str, list[int]] = {kind: [] for kind in sorted({flight.kind for flight in flights})}
    for i, flight in enumerate(flights):
        kinds[flight.kind].append(i)
    return {name: chosen for name, chosen in groups.items() if chosen}, kinds


def _check_pairs(row: Sequence[EvalFlight], other: Sequence[EvalFlight]) -> None:
    if [flight.task for flight in row] != [flight.task for flight in other]:
        raise ValueError("only rows with the same tasks in the same order can be compared in pairs")


def _share_won(gains: np.ndarray) -> float:
    return round(float((gains > 0).mean() + 0.5 * (gains == 0).mean()), 4)


def _standard_error(gains: np.ndarray) -> float:
    return round(float(gains.std(ddof=1) / math.sqrt(len(gains))), 4) if len(gains) > 1 else 0.0


def _significant(p_value: float) -> float:
    return float(f"{p_value:.3g}")
