"""The rows of an evaluation, and how one task is flown under each of them.

A flight of the policy that breaks off (NaN, an error of the server that is about this flight, actions that are none)
is a failure that ends where the drone is; it is never left out. A server that is gone, or refuses everybody, ends the
evaluation instead: that says nothing about the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from worldvln_edge.client import ServerError
from worldvln_edge.runtime.sessions.policy import NonFiniteActionsError
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.baselines import ActionTables
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    Pilot,
    ReplayPilot,
    SceneSimulators,
    expert_actions,
    flight_seed,
    fly_task,
)
from worldvln_edge.training.evaluation.flight_log import FlightLog, LoggedFlight, path_points
from worldvln_edge.training.evaluation.flight_outcome import flight_outcome

POLICY, SHUFFLED, EXPERT = "policy", "shuffled text", "expert"
TEACHER_FORCED, RGB = "teacher-forced policy", "teacher-forced rgb head"
ZERO, MEAN, MEAN_KIND, MEAN_MAGNITUDE = "zero", "mean", "mean per kind", "mean per kind and magnitude"
ROWS = (POLICY, SHUFFLED, TEACHER_FORCED, RGB, EXPERT, ZERO, MEAN, MEAN_KIND, MEAN_MAGNITUDE)
POLICY_ROWS = (POLICY, SHUFFLED, TEACHER_FORCED)
"""Rows whose actions the policy chooses."""

_ABOUT_THE_FLIGHT = frozenset({"nonfinite_actions", "internal", "deadline"})
"""Errors of a server (spec/session_protocol.md 7.7) that a flight can have while others fly on."""


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """What is to be flown of one task."""

    task: Task
    told: str | None
    """Instruction of the shuffled row; None where there is none."""
    digests: dict[str, str]
    """Row -> digest of its flight."""


def blind_choices(tables: ActionTables) -> dict[str, Callable[[Task], np.ndarray]]:
    """Rows that fly actions which are fixed beforehand."""
    return {
        EXPERT: expert_actions,
        ZERO: tables.zero_action,
        MEAN: tables.mean_action,
        MEAN_KIND: tables.mean_of_kind,
        MEAN_MAGNITUDE: tables.mean_of_kind_and_magnitude,
    }


@dataclass(frozen=True, kw_only=True)
class RowFlyer:
    """Neighbouring tasks of one scene with the rows that are to be flown. Picklable."""

    tasks: tuple[TaskRows, ...]
    tables: ActionTables | None
    rgb_bundle: Path | None
    seed: int
    log: FlightLog | None

    def fly(self, pilot: Pilot) -> Iterator[LoggedFlight]:
        """Flights as they are finished; each is in the log by then.

        Raises:
            FlightError: tables of another flight length.
            FlightLogError: the log cannot be written.
            ServerError, ServerUnreachableError, AnswerTimeoutError: the server's, where they are not about one flight.
        """
        num_actions = pilot.points[-1] - 1
        with ExitStack() as opened:
            seeing = opened.enter_context(SceneSimulators(pilot.image_hw))
            unseeing = opened.enter_context(SceneSimulators(ReplayPilot.image_hw))
            choices = self._choices(num_actions) | {
                TEACHER_FORCED: self._policy_on_experts_frames(pilot, seeing),
                RGB: self._head_on_experts_frames(opened, pilot, seeing),
            }
            for rows in self.tasks:
                for name in rows.digests:
                    if name in (POLICY, SHUFFLED):
                        told = rows.told if name == SHUFFLED else None
                        logged = self._fly(name, rows, pilot, seeing, told)
                    else:
                        replay = ReplayPilot(choices[name], num_actions=num_actions)
                        logged = self._fly(name, rows, replay, unseeing)
                    if self.log is not None:
                        self.log.append(logged)
                    yield logged

    def _choices(self, num_actions: int) -> dict[str, Callable[[Task], np.ndarray]]:
        if self.tables is None:
            return {}
        if self.tables.num_actions != num_actions:
            raise FlightError(
                f"the training flights have {self.tables.num_actions} actions each, the policy flies {num_actions}; "
                "give flights of the policy's length, or --no-baselines"
            )
        return blind_choices(self.tables)

    def _policy_on_experts_frames(self, pilot: Pilot, simulators: SceneSimulators) -> Callable[[Task], np.ndarray]:
        """The policy's actions where its own mistakes change nothing of what it sees: what is left is no drift."""

        def actions(task: Task) -> np.ndarray:
            frames = _experts_frames(task, pilot, simulators)
            pilot.start(task, flight_seed(task, self.seed))
            try:
                shown = pairwise((0, *pilot.points[:-1]))
                return np.concatenate([pilot.observe(list(frames[first:last])) for first, last in shown])
            finally:
                pilot.end()

        return actions

    def _head_on_experts_frames(
        self, opened: ExitStack, pilot: Pilot, simulators: SceneSimulators
    ) -> Callable[[Task], np.ndarray]:
        """Actions that the RGB head reads from the frames of the expert's flight."""
        if self.rgb_bundle is None or all(RGB not in rows.digests for rows in self.tasks):
            return expert_actions  # nobody asks for that row
        # Imported here: flying through a server needs no inference engine.
        from worldvln_edge.training.evaluation.rgb_replay import open_rgb_replay

        head, points = opened.enter_context(open_rgb_replay(self.rgb_bundle)), pilot.points

        return lambda task: head.actions(_experts_frames(task, pilot, simulators), points)

    def _fly(
        self, name: str, rows: TaskRows, pilot: Pilot, simulators: SceneSimulators, told: str | None = None
    ) -> LoggedFlight:
        task, simulator = rows.task, simulators.for_task(rows.task)
        is_of_policy = name in POLICY_ROWS
        collided, error, latency_ms, profiles = False, None, (), ()
        try:
            flight = fly_task(task, pilot, simulator, seed=flight_seed(task, self.seed), instruction=told)
            collided, latency_ms, profiles = flight.score.collided, flight.latency_ms, flight.profiles
        except (FlightError, NonFiniteActionsError, ServerError) as broken:
            if not is_of_policy or (isinstance(broken, ServerError) and broken.code not in _ABOUT_THE_FLIGHT):
                raise
            error = str(broken)
        outcome = flight_outcome(
            name,
            task,
            simulator.poses,
            collided=collided,
            instruction=task.instruction if told is None else told,
            error=error,
            latency_ms=latency_ms if name in (POLICY, SHUFFLED) else (),
            profiles=profiles,
        )
        return LoggedFlight(digest=rows.digests[name], flight=outcome, path=path_points(simulator.poses))


def _experts_frames(task: Task, pilot: Pilot, simulators: SceneSimulators) -> np.ndarray:
    """What the pilot's camera sees on the expert's flight: uint8 [T, H, W, 3]."""
    expert = ReplayPilot(expert_actions, num_actions=pilot.points[-1] - 1)
    return fly_task(task, expert, simulators.for_task(task)).frames
