"""A policy that flies several instructions one after the other, as chained sessions.

An instruction (a leg) ends when its time, one horizon, is over: the next one is said at the start of the next horizon
of the same session. It may also end when the drone has settled: then the newest frame is the first one of a session
for the instructions that are left, and what time it did not need is left over at the end of the mission.
Source: spec/session_protocol.md 2.6.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worldvln_edge.runtime.sessions.chained_session import ChainedSession, SettledRule, chained_horizon
from worldvln_edge.runtime.sessions.policy import Policy
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.closed_loop import FlightError, PolicyPilot
from worldvln_edge.training.evaluation.mission_tasks import THEN


class MissionPilot(PolicyPilot):
    """A policy in this process, for missions of so many legs.

    Args:
        policy: what flies.
        legs: instructions of a mission; it lasts that many horizons.
        ends_when_settled: an instruction ends when the drone has settled, not only when its time is over. After the
            last one the drone stands still.
        settled: when it has; UAV-Flow's rule.
    """

    def __init__(
        self, policy: Policy, legs: int, *, ends_when_settled: bool = False, settled: SettledRule | None = None
    ):
        super().__init__(policy)
        self._legs, self._ends_when_settled, self._settled = legs, ends_when_settled, settled or SettledRule()
        self._horizon = policy.info.horizon
        self.points = chained_horizon(self._horizon, legs).points
        self.settled_legs = 0
        """Of all missions so far, legs in which the drone settled."""
        self.steps_flown = 0
        """Of all missions so far, actions up to the end of the last instruction."""
        self._texts: list[str] = []
        self._seed, self._leg, self._leg_segments, self._still_steps, self._has_settled = 0, 0, 0, 0, False

    def start(self, task: Task, seed: int) -> None:
        """See `Pilot.start`. Raises FlightError: a mission of another number of legs."""
        self._texts = task.instruction.split(THEN)
        if len(self._texts) != self._legs:
            raise FlightError(f"task {task.task_id!r} has {len(self._texts)} legs, this pilot flies {self._legs}")
        self._seed = seed
        self._begin_leg(0)
        self._fly(self._session_of_legs_left())

    def observe(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """See `Pilot.observe`."""
        if self._session is not None and self._is_leg_over():
            if self._leg + 1 == self._legs:
                return np.zeros((self._horizon.step, 6))
            frames = self._next_leg(frames)
        actions = super().observe(frames)
        self._leg_segments += 1
        self.steps_flown += len(actions)
        self._still_steps = self._settled.still_steps(self._still_steps, actions)
        if not self._has_settled and self._still_steps >= self._settled.steps:
            self._has_settled = True
            self.settled_legs += 1
        return actions

    def _session_of_legs_left(self) -> ChainedSession:
        left = self._legs - self._leg
        return ChainedSession(self._policy, self._texts[self._leg], horizons=left, seed=self._seed)

    def _is_leg_over(self) -> bool:
        return self._is_time_over() or (self._ends_when_settled and self._has_settled)

    def _is_time_over(self) -> bool:
        return self._leg_segments == self._horizon.segments

    def _next_leg(self, frames: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Say the next instruction; what its session has to be given of the frames seen since the last call."""
        is_time_over = self._is_time_over()
        self._begin_leg(self._leg + 1)
        if is_time_over:
            assert self._session is not None  # it flew the leg
            self._session.set_prompt(self._texts[self._leg])  # the next horizon begins by itself
            return frames
        self._fly(self._session_of_legs_left())
        return frames[-1:]

    def _begin_leg(self, leg: int) -> None:
        self._leg, self._leg_segments, self._still_steps, self._has_settled = leg, 0, 0, False
