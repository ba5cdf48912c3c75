"""What rules of early stopping would have saved in flights that were flown to their end, and what it would have cost.

Nothing is flown for it: a flight is the same bit for bit with a rule and without one until the rule ends it, and a
flight that was ended stands still (`early_stopping.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np

from worldvln_edge.config import ConfigError
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.early_stopping import (
    AnyRule,
    CollisionRule,
    FlightSoFar,
    actions_allowed,
    rule_that_ends,
)
from worldvln_edge.training.grpo.held_out import HeldOutResult, PairedDifference, paired_difference
from worldvln_edge.training.grpo.trace import FlightTrace


class StoppingSaving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of all flights of a policy; differences are stopped minus whole, paired by flight."""

    rules: tuple[str, ...]
    stopped: int
    """Flights."""
    saved: float
    """Share of the environment steps."""
    success_difference: PairedDifference
    reward_difference: PairedDifference


def rules_made_for(tasks: Iterable[Task], rules: Sequence[AnyRule]) -> tuple[AnyRule, ...]:
    """Those of the rules that every one of the tasks has what they look at for."""

    def is_made_for(rule: AnyRule, task: Task) -> bool:
        try:
            rule.check(task)
        except ConfigError:
            return False
        return True

    every = list(tasks)
    return tuple(rule for rule in rules if all(is_made_for(rule, task) for task in every))


def stopping_saving(
    flights: Iterable[FlightTrace],
    whole: HeldOutResult,
    tasks: Mapping[str, Task],
    rules: Sequence[AnyRule],
    judge: Callable[[Iterable[FlightTrace]], HeldOutResult],
) -> StoppingSaving:
    """Stop flights that were flown to their end, and compare what both are worth.

    Args:
        flights: whole ones, of which one at a time is needed.
        whole: what they are worth.
        tasks: by id.
        rules: of early stopping.
        judge: what flights are worth.

    Raises:
        ConfigError: a rule that looks at collisions, of whose moment a trace says nothing, or that a task is not made
            for.
    """
    flown = kept = stopped = 0

    def ended() -> Iterator[FlightTrace]:
        nonlocal flown, kept, stopped
        for flight in flights:
            found = stopped_flight(flight, tasks[flight.task_id], rules)
            flown, kept = flown + flight.environment_steps, kept + found.environment_steps
            stopped += found is not flight
            yield found

    result = judge(ended())
    return StoppingSaving(
        rules=tuple(rule.name for rule in rules),
        stopped=stopped,
        saved=1 - kept / flown,
        success_difference=paired_difference(result, whole, "succeeded"),
        reward_difference=paired_difference(result, whole),
    )


def stopped_flight(flight: FlightTrace, task: Task, rules: Sequence[AnyRule]) -> FlightTrace:
    """A flight as it would have been flown under the rules; itself, if they would not have ended it.

    Raises:
        ConfigError: see `stopping_saving`.
    """
    for rule in rules:
        if isinstance(rule, CollisionRule):
            raise ConfigError(
                "early stopping: a trace does not say when the flight touched something, so the collision rule cannot "
                "be applied to it; fly with the rule"
            )
        rule.check(task)
    poses, flown = [flight.segments[0].poses[:1]], 0
    for index, segment in enumerate(flight.segments):
        so_far = FlightSoFar(task=task, poses=np.concatenate(poses), collided=False)
        count, reason = actions_allowed(rules, so_far, segment.actions)
        poses.append(segment.poses[1 : count + 1])
        flown += count
        if flown == flight.horizon_steps:
            return flight
        so_far = FlightSoFar(task=task, poses=np.concatenate(poses), collided=False)
        reason = reason or rule_that_ends(rules, so_far)
        if reason:
            last = dataclasses.replace(segment, actions=segment.actions[:count], poses=segment.poses[: count + 1])
            return dataclasses.replace(
                flight,
                segments=(*flight.segments[:index], last),
                end_reason=reason,
                environment_steps=flown,
            )
    return flight
