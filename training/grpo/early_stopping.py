"""Rules that end a flight before its horizon, to save environment steps.

What a stopped flight is worth is defined, not guessed: it stands where it was stopped until the horizon is over
(`FlightTrace.completed_poses`), which is what a kinematic drone does that gets no more actions. So
- its return is the one that the simulator would have given for standing still, at no cost;
- it stays a member of its group: mean and deviation are taken over all candidates, so what the others are compared
  with is not the survivors alone;
- flights that were not stopped are the same bit for bit with a rule and without one, and so are their returns and
  their order within the group.
A rule is a part of the episode: it looks at the task and at what was flown, never at the other candidates.

Poses and actions: cm and deg (`worldvln_edge.poses`).
Source: spec/seed_systems.md 2.4, 2.6 (budget), 2.9 (stall).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from worldvln_edge.config import ConfigError
from worldvln_edge.poses import wrap_deg
from worldvln_edge.tasks import Task

_FORWARD_CM, _TURN_DEG = 25.0, 15.0
"""The primitive actions of the world that the budget rule was written for."""


@dataclass(frozen=True, kw_only=True)
class FlightSoFar:
    """A flight at the end of a segment."""

    task: Task
    poses: np.ndarray
    """float64 [n+1, 6] achieved, start included."""
    collided: bool


class StoppingRule(Protocol):
    """Says when how a flight goes on is settled."""

    @property
    def name(self) -> str:
        """`end_reason` of the flights that it stops."""
        ...

    def check(self, task: Task) -> None:
        """Raise ConfigError when the task lacks what the rule looks at."""
        ...

    def allowed(self, flight: FlightSoFar, actions: np.ndarray) -> int:
        """How many of the next segment's actions [n, 6] may be flown: 1..n; fewer than n end the flight there."""
        ...

    def is_over(self, flight: FlightSoFar) -> bool:
        """Whether the flight ends here, between two segments."""
        ...


class BudgetRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="budget", tag_field="rule"):
    """Motion budget: a flight that has moved more than `tolerance` times as much as the expert ends.

    Motion is counted in the primitive actions of the published rule: 25 cm of way or 15 deg of turn are one. There, as
    here, the action that exceeds the budget is flown.
    """

    tolerance: float = 2.0
    least: float = 8.0
    """Smallest budget, in primitive actions: small movements of a flight that only turns add up to a way, too."""
    most: float = 120.0

    def __post_init__(self) -> None:
        for field in ("tolerance", "least", "most"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(
                    f"early stopping: budget {field} must be finite and > 0, found {getattr(self, field)}"
                )

    @property
    def name(self) -> str:
        return "budget"

    def check(self, task: Task) -> None:
        if len(task.reference_path_raw) < 2:
            raise ConfigError(
                f'early stopping: task {task.task_id!r} has no "reference_path_raw", so the budget rule knows no '
                "expert; leave the rule out, or use tasks with an expert's path"
            )

    def budget(self, task: Task) -> float:
        """In primitive actions."""
        expert = float(_motion(np.array(task.reference_path_raw)).sum())
        return min(max(expert * self.tolerance, self.least), self.most)

    def allowed(self, flight: FlightSoFar, actions: np.ndarray) -> int:
        spent = _motion(flight.poses).sum() + np.cumsum(_actions_motion(actions))
        within = int((spent <= self.budget(flight.task)).sum())
        return min(within + 1, len(actions))

    def is_over(self, flight: FlightSoFar) -> bool:
        return bool(_motion(flight.poses).sum() > self.budget(flight.task))


class StallRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stall", tag_field="rule"):
    """No progress: over the last `steps` steps the distance to the goal and the heading error have not changed."""

    steps: int = 16
    position_cm: float = 5.0
    """A change of the distance to the goal below this is none, and"""
    yaw_deg: float = 1.0
    """a change of the heading error below this."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"early stopping: stall steps must be >= 1, found {self.steps}")
        for field in ("position_cm", "yaw_deg"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"early stopping: stall {field} must be finite and > 0, found {getattr(self, field)}")

    @property
    def name(self) -> str:
        return "stall"

    def check(self, task: Task) -> None:
        if task.end_pos is None:
            raise ConfigError(
                f'early stopping: task {task.task_id!r} has no "end_pos", so the stall rule knows no goal; leave the '
                "rule out, or use tasks with an end"
            )

    def allowed(self, flight: FlightSoFar, actions: np.ndarray) -> int:
        return len(actions)

    def is_over(self, flight: FlightSoFar) -> bool:
        if len(flight.poses) <= self.steps:
            return False
        goal, recent = np.array(flight.task.end_pos), flight.poses[-self.steps - 1 :]
        distance_cm = np.linalg.norm(recent[:, :3] - goal[:3], axis=1)
        error_deg = wrap_deg(recent[:, 4] - goal[4])
        turned_deg = wrap_deg(error_deg - error_deg[0])  # no jump where the error passes 180
        return bool(np.ptp(distance_cm) < self.position_cm and np.ptp(turned_deg) < self.yaw_deg)


class CollisionRule(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="collision", tag_field="rule"
):
    """A flight that touched something has failed and ends with that segment; the simulator would fly on."""

    @property
    def name(self) -> str:
        return "collision"

    def check(self, task: Task) -> None:
        """Needs nothing."""

    def allowed(self, flight: FlightSoFar, actions: np.ndarray) -> int:
        return len(actions)

    def is_over(self, flight: FlightSoFar) -> bool:
        return flight.collided


AnyRule = BudgetRule | StallRule | CollisionRule
"""The rules that a collection may be written with."""


def early_stopping_rules() -> tuple[AnyRule, ...]:
    """Budget and stall, with their defaults."""
    return (BudgetRule(), StallRule())


def actions_allowed(rules: Sequence[StoppingRule], flight: FlightSoFar, actions: np.ndarray) -> tuple[int, str]:
    """The fewest that any rule allows, and that rule's name ("" when all actions may be flown)."""
    least, name = len(actions), ""
    for rule in rules:
        allowed = rule.allowed(flight, actions)
        if allowed < least:
            least, name = allowed, rule.name
    return least, name


def rule_that_ends(rules: Sequence[StoppingRule], flight: FlightSoFar) -> str:
    """Name of the first rule by which the flight is over, "" when it goes on."""
    return next((rule.name for rule in rules if rule.is_over(flight)), "")


def _motion(poses_T6: np.ndarray) -> np.ndarray:
    """Primitive actions that each step is worth: float64 [T-1]."""
    moved = np.diff(poses_T6, axis=0)
    return np.linalg.norm(moved[:, :3], axis=1) / _FORWARD_CM + np.abs(wrap_deg(moved[:, 4])) / _TURN_DEG


def _actions_motion(actions_N6: np.ndarray) -> np.ndarray:
    return np.linalg.norm(actions_N6[:, :3], axis=1) / _FORWARD_CM + np.abs(actions_N6[:, 4]) / _TURN_DEG
