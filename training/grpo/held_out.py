"""What a policy is worth on held-out tasks, and how it compares with another one on the same tasks and seeds.

Source: spec/training.md 8.4 (statistics: per-task differences).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from worldvln_edge.atomic import atomic_file
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.collection import CollectionReport
from worldvln_edge.training.grpo.rewards import RewardConfig, WeightedRewards
from worldvln_edge.training.grpo.scored_collection import GrpoError, JudgedFlight, judge_flights
from worldvln_edge.training.grpo.trace import FlightTrace


class HeldOutResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Flights of one policy on held-out tasks."""

    flights: tuple[JudgedFlight, ...]
    failed: int
    """Flights that could not be flown."""
    environment_steps: int
    seconds: float

    @property
    def reward(self) -> float:
        """Mean over flights of the mean segment reward."""
        return float(np.mean([flight.reward for flight in self.flights]))

    @property
    def success(self) -> float:
        """Share of flights."""
        return float(np.mean([flight.succeeded for flight in self.flights]))


class PairedDifference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One policy minus another, over flights that both flew: same task, same seed."""

    mean: float
    standard_error: float | None
    """Over tasks, whose flights are averaged first; None for a single task."""
    tasks: int
    flights: int


def judge_held_out(
    traces: Iterable[FlightTrace], report: CollectionReport, tasks: Sequence[Task], config: RewardConfig, *, step: int
) -> HeldOutResult:
    """What flights of held-out tasks are worth.

    Args:
        traces: the flights, of which one at a time is needed.
        report: of their collection.
        tasks: that were flown.
        config: rewards.
        step: actions of a segment.

    Raises:
        GrpoError, RewardError, NotFiniteError: see `judge_flights`.
    """
    rewards = WeightedRewards(config.weights, config.terms, step=step)
    flights = judge_flights(traces, {task.task_id: task for task in tasks}, rewards, bonus=config.success_bonus)
    return HeldOutResult(
        flights=tuple(flights),
        failed=len(report.failed),
        environment_steps=report.environment_steps,
        seconds=report.seconds_now,
    )


def paired_difference(new: HeldOutResult, old: HeldOutResult, what: str = "reward") -> PairedDifference:
    """Difference of `reward` or `succeeded`, paired by task, candidate and seed.

    Raises:
        GrpoError: no flight is common.
    """
    before = {(flight.task_id, flight.candidate_id, flight.seed): flight for flight in old.flights}
    by_task: dict[str, list[float]] = defaultdict(list)
    for flight in new.flights:
        other = before.get((flight.task_id, flight.candidate_id, flight.seed))
        if other is not None:
            by_task[flight.task_id].append(float(getattr(flight, what)) - float(getattr(other, what)))
    if not by_task:
        raise GrpoError("two evaluations have no flight of the same task and seed; evaluate them on the same tasks")
    means = np.array([np.mean(values) for values in by_task.values()])
    error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return PairedDifference(
        mean=float(means.mean()),
        standard_error=error,
        tasks=len(means),
        flights=sum(len(values) for values in by_task.values()),
    )


def write_result(result: HeldOutResult, path: Path) -> None:
    """Write an evaluation, whole or not at all. Raises GrpoError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as building:
            building.write_bytes(msgspec.json.encode(result) + b"\n")
    except OSError as error:
        raise GrpoError(f"{path}: cannot be written ({error}); make room and give the same command again") from error


def read_result(path: Path) -> HeldOutResult | None:
    """What `write_result` wrote, None where there is nothing. Raises GrpoError for another file."""
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=HeldOutResult)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GrpoError(f"{path}: no evaluation of flights ({error}); delete it to evaluate again") from error
