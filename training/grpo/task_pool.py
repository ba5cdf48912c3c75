"""Which tasks a collection flies: the simulator's own without end, or a list in an order that changes every time.

Source: spec/training.md 5.1.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import msgspec

from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.tasks import Split, generate_task
from worldvln_edge.training.trainer.stage import epoch_order


class TaskPoolError(ValueError):
    """Tasks that cannot be flown as asked."""


class TaskPool(Protocol):
    """Tasks of a run, by collection."""

    @property
    def fingerprint(self) -> str:
        """Of all tasks."""
        ...

    def take(self, collection: int, count: int) -> list[Task]:
        """Distinct tasks of a collection, always the same."""
        ...


class GeneratedTasks:
    """The simulator's tasks of a split, one behind the other: no task comes twice."""

    def __init__(self, split: Split):
        self._split: Split = split

    @property
    def fingerprint(self) -> str:
        return f"generated {self._split}"

    def take(self, collection: int, count: int) -> list[Task]:
        """See `TaskPool.take`."""
        return [generate_task(self._split, collection * count + index) for index in range(count)]


class ListedTasks:
    """Tasks of a file: shuffled, flown to the end of the list, and shuffled anew.

    Args:
        tasks: with distinct ids.
        seed: of the order.
        source: where they are from, for messages.

    Raises:
        TaskPoolError: no tasks, or two of one id.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, source: str):
        if not tasks:
            raise TaskPoolError(f"{source}: no tasks")
        name, times = Counter(task.task_id for task in tasks).most_common(1)[0]
        if times > 1:
            raise TaskPoolError(f"{source}: {times} tasks have the id {name!r}; ids tell flights apart, so change them")
        self._tasks, self._seed, self._source = list(tasks), seed, source

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self._tasks)).hexdigest()

    def take(self, collection: int, count: int) -> list[Task]:
        """See `TaskPool.take`.

        Raises:
            TaskPoolError: the list is shorter than a collection.
        """
        if count > len(self._tasks):
            raise TaskPoolError(f"{self._source}: {len(self._tasks)} tasks, and {count} are wanted; give more tasks")
        epoch, place = divmod(collection, len(self._tasks) // count)
        order = epoch_order(self._seed, epoch, len(self._tasks))
        return [self._tasks[index] for index in order[place * count : (place + 1) * count]]
