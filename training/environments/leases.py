"""Environments that are given back when their client has gone: each has a lease that every use renews.

Source: spec/seed_systems.md 2.2 (a dead client leaks simulators; product: lease with idle timeout).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.environment import (
    MAX_FRAMES,
    EnvironmentAnswer,
    EnvironmentFault,
    Environments,
    FrameChoice,
)

_log = logging.getLogger(__name__)


class LeasedEnvironments:
    """`Environments` in front of others. `expire` has to be called now and then.

    Args:
        environments: what is lent.
        idle_s: how long an environment may be left alone.
        clock: seconds that only grow.
    """

    def __init__(self, environments: Environments, *, idle_s: float, clock: Callable[[], float] = time.monotonic):
        self._environments, self.idle_s, self._clock = environments, idle_s, clock
        self._lock = threading.Lock()
        self._used_s: dict[str, float] = {}
        self._in_call: dict[str, int] = {}

    @property
    def capacity(self) -> int:
        return self._environments.capacity

    @property
    def in_use(self) -> int:
        """Environments that are lent now."""
        return len(self._used_s)

    def create(
        self, tasks: Mapping[str, Task], *, image_hw: tuple[int, int], max_frames: int = MAX_FRAMES
    ) -> Mapping[str, EnvironmentFault]:
        """See `Environments.create`."""
        with self._renewing(tasks):
            failed = self._environments.create(tasks, image_hw=image_hw, max_frames=max_frames)
            with self._lock:
                self._used_s |= dict.fromkeys((id for id in tasks if id not in failed), self._clock())
        return failed

    def reset(self, ids: Sequence[str]) -> Mapping[str, EnvironmentAnswer]:
        """See `Environments.reset`."""
        with self._renewing(ids):
            return self._known(self._environments.reset(ids))

    def step(
        self, actions: Mapping[str, np.ndarray], *, frames: FrameChoice = "each"
    ) -> Mapping[str, EnvironmentAnswer]:
        """See `Environments.step`."""
        with self._renewing(actions):
            return self._known(self._environments.step(actions, frames=frames))

    def warm_up(self, tasks: Sequence[Task], *, image_hw: tuple[int, int]) -> None:
        """See `Environments.warm_up`."""
        self._environments.warm_up(tasks, image_hw=image_hw)

    def close(self, ids: Sequence[str]) -> None:
        """See `Environments.close`."""
        with self._lock:
            for id in ids:
                self._used_s.pop(id, None)
        self._environments.close(ids)

    def expire(self) -> list[str]:
        """Close what was left alone for too long; returns their ids."""
        with self._lock:
            now_s = self._clock()
            idle = [
                id for id, used_s in self._used_s.items() if now_s - used_s > self.idle_s and not self._in_call.get(id)
            ]
        if idle:
            _log.warning("%d environments were not used for %g s and are closed", len(idle), self.idle_s)
            self.close(idle)
        return idle

    @contextmanager
    def _renewing(self, ids: Mapping[str, object] | Sequence[str]) -> Iterator[None]:
        """Nothing of a call in progress expires, however long it takes."""
        names = list(ids)
        with self._lock:
            for id in names:
                self._in_call[id] = self._in_call.get(id, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                now_s = self._clock()
                for id in names:
                    self._in_call[id] -= 1
                    if not self._in_call[id]:
                        del self._in_call[id]
                    if id in self._used_s:
                        self._used_s[id] = now_s

    def _known(self, answers: Mapping[str, EnvironmentAnswer]) -> Mapping[str, EnvironmentAnswer]:
        """Forget the leases of environments that are gone."""
        gone = ("lost", "simulator_failed", "unknown_environment")
        with self._lock:
            for id, answer in answers.items():
                if isinstance(answer, EnvironmentFault) and answer.code in gone:
                    self._used_s.pop(id, None)
        return answers
