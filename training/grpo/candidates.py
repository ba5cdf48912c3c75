"""Candidates of a collection: which flights are made of which tasks, and with which seeds.

Source: spec/training.md 5.1 (groups, names, seeds), 5.2 (seed of a retry).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worldvln_edge.tasks import Task

FIRST_SEED = 20260320
_TASK_STRIDE, _CANDIDATE_STRIDE, _ATTEMPT_STRIDE = 1_000_003, 65_537, 9_973


def flight_name(group_id: str, candidate_id: int) -> str:
    """Name of a flight within a collection, such as `task_000003_k05`; in name order, groups stay together."""
    return f"{group_id}_k{candidate_id:02d}"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One attempt at one flight of one task."""

    task: Task
    task_index: int
    """Position of the task in the collection."""
    candidate_id: int
    attempt: int = 0
    """0, or how many attempts were lost before."""
    first_seed: int = FIRST_SEED

    @property
    def name(self) -> str:
        """Of the flight, whichever attempt brings it; see `flight_name`."""
        return flight_name(self.group_id, self.candidate_id)

    @property
    def group_id(self) -> str:
        """Candidates of one task share it, and are compared with each other."""
        return f"task_{self.task_index:06d}"

    @property
    def seed(self) -> int:
        """Of the draws of all segments."""
        first = self.first_seed + self.task_index * _TASK_STRIDE + self.candidate_id * _CANDIDATE_STRIDE
        return first + self.attempt * _ATTEMPT_STRIDE


def candidates_of(tasks: Sequence[Task], count: int, *, first_seed: int = FIRST_SEED) -> list[Candidate]:
    """`count` candidates of every task, task by task.

    Raises:
        ValueError: no task, or no candidate of each.
    """
    if not tasks or count < 1:
        raise ValueError(
            f"a collection needs tasks and candidates of each, found {len(tasks)} tasks, {count} candidates"
        )
    return [
        Candidate(task=task, task_index=index, candidate_id=candidate, first_seed=first_seed)
        for index, task in enumerate(tasks)
        for candidate in range(count)
    ]
