"""What a policy has to beat: tables of mean actions, and instructions that belong to another task.

The tables are means over training flights, step by step, so that they keep the expert's speed profile: the strongest
answer that an agent without eyes can give. They know nothing / the kind / the kind and the numbers in the text.
Legend: N actions of a flight (48). Actions: cm and deg.
Source: spec/training.md 8.6, last paragraph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.shards import FlightDataError, list_shards, read_shard

Magnitude = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ActionTables:
    """Mean actions of training flights, each float64 [N, 6]."""

    flights: int
    mean: np.ndarray
    by_kind: dict[str, np.ndarray]
    by_kind_and_magnitude: dict[tuple[str, Magnitude], np.ndarray]

    @property
    def num_actions(self) -> int:
        return len(self.mean)

    def zero_action(self, task: Task) -> np.ndarray:
        return np.zeros_like(self.mean)

    def mean_action(self, task: Task) -> np.ndarray:
        return self.mean

    def mean_of_kind(self, task: Task) -> np.ndarray:
        """The kind's mean; that of all flights for a kind that was never flown."""
        return self.by_kind.get(task.kind, self.mean)

    def mean_of_kind_and_magnitude(self, task: Task) -> np.ndarray:
        """The mean of flights of the same kind and numbers; the kind's where there were none."""
        found = self.by_kind_and_magnitude.get((task.kind, _rounded(task.magnitude)))
        return self.mean_of_kind(task) if found is None else found


def read_action_tables(folder: Path) -> ActionTables:
    """Tables from the shards that `worldvln-edge sim flights` wrote. Frames are not read.

    Raises:
        FlightDataError: no shards, a broken one, or flights of different lengths.
    """
    actions: list[np.ndarray] = []
    kinds: list[str] = []
    magnitudes: list[Magnitude] = []
    for shard in list_shards(folder):
        part, names, numbers = read_shard(shard, ("actions", "kinds", "magnitudes")).values()
        if part.ndim != 3 or part.shape[2] != 6 or (actions and part.shape[1] != actions[0].shape[1]):
            raise FlightDataError(
                f"{shard}: actions {list(part.shape)}; expected [flights, steps, 6], as in the others"
            )
        if not len(part) == len(names) == len(numbers):
            raise FlightDataError(
                f"{shard}: {len(part)} actions, {len(names)} kinds and {len(numbers)} magnitudes; delete it and "
                "generate again"
            )
        if not np.isfinite(part).all():
            raise FlightDataError(f"{shard}: actions that are not finite; delete it and generate again")
        actions.append(part.astype(np.float64))
        kinds += [str(name) for name in names]
        magnitudes += [_rounded(row[np.isfinite(row)].tolist()) for row in numbers]
    flights = np.concatenate(actions)
    by_kind = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds))}
    both = list(zip(kinds, magnitudes, strict=True))
    by_both: dict[tuple[str, Magnitude], list[int]] = {}
    for i, key in enumerate(both):
        by_both.setdefault(key, []).append(i)
    return ActionTables(
        flights=len(flights),
        mean=flights.mean(0),
        by_kind={kind: flights[rows].mean(0) for kind, rows in by_kind.items()},
        by_kind_and_magnitude={key: flights[rows].mean(0) for key, rows in by_both.items()},
    )


def shuffled_instructions(tasks: Sequence[Task]) -> tuple[str, ...] | None:
    """For every task the instruction of another task of a different kind: one fixed permutation of a list of tasks.

    Returns:
        None when there is none, because one kind makes up more than half of the tasks.
    """
    count = Counter(task.kind for task in tasks)
    most = max(count.values(), default=0)
    if not tasks or 2 * most > len(tasks):
        return None
    # Ordered by kind, a shift by the size of the largest kind never lands in the same kind. The order of the kinds is
    # drawn, so that neighbours in the alphabet (turn_left, turn_right) are not paired.
    kinds = sorted(count)
    rank = dict(zip(kinds, np.random.default_rng([5, len(tasks)]).permutation(len(kinds)), strict=True))
    order = sorted(range(len(tasks)), key=lambda i: (rank[tasks[i].kind], i))
    donors = order[most:] + order[:most]
    told = {task: tasks[donor].instruction for task, donor in zip(order, donors, strict=True)}
    return tuple(told[i] for i in range(len(tasks)))


def _rounded(magnitude: Sequence[float]) -> Magnitude:
    return tuple(round(float(value), 3) for value in magnitude)
