"""A wave: flights in step, from their creation in the environments to what became of each.

A wave makes no call itself. It hands out calls of the environments, whoever makes them brings the answer back, and
between the two the networks plan; so several waves can take turns.
Source: spec/training.md 5.2; spec/seed_systems.md 3.4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from worldvln_edge.training.environments.environment import (
    CapacityError,
    EnvironmentFault,
    EnvironmentResult,
    Environments,
)
from worldvln_edge.training.grpo.candidates import Candidate
from worldvln_edge.training.grpo.early_stopping import AnyRule, FlightSoFar, actions_allowed, rule_that_ends
from worldvln_edge.training.grpo.rollout_policy import FlightBatch, PlannedSegment, RolloutPolicy
from worldvln_edge.training.grpo.trace import HORIZON, FlightTrace, SegmentTrace


@dataclass(frozen=True, kw_only=True)
class LostFlight:
    """One attempt that brought no flight."""

    candidate: Candidate
    code: str
    """`EnvironmentFault.code`, `not_finite` (actions or log-probabilities) or `bad_answer` (of the environment)."""
    message: str


Outcome: TypeAlias = "FlightTrace | LostFlight"
EnvironmentCall: TypeAlias = Callable[[], Any]
_ROOM_WITHIN_S, _ROOM_PAUSE_S = 660.0, 0.25
"""How long to wait for room: longer than a server's lease, which frees what a client left that was killed."""


@dataclass
class _Flight:
    """One candidate of a wave while it flies."""

    candidate: Candidate
    row: int
    id: str
    poses: list[np.ndarray] = field(default_factory=list)
    segments: list[SegmentTrace] = field(default_factory=list)
    collided: bool = False

    def so_far(self) -> FlightSoFar:
        return FlightSoFar(task=self.candidate.task, poses=np.concatenate(self.poses), collided=self.collided)

    @property
    def steps(self) -> int:
        return sum(len(segment.actions) for segment in self.segments)


class Wave:
    """Flights in step. Calls of the environments are handed out to be made elsewhere, their answers come back."""

    def __init__(
        self,
        policy: RolloutPolicy,
        environments: Environments,
        rules: tuple[AnyRule, ...],
        candidates: Sequence[Candidate],
        run: str,
    ):
        self._policy, self._environments, self._rules = policy, environments, rules
        flights = [
            _Flight(candidate, row, f"{run}-{candidate.name}-{candidate.attempt}")
            for row, candidate in enumerate(candidates)
        ]
        self.ids = [flight.id for flight in flights]
        self._flights = {flight.id: flight for flight in flights}  # those that still fly
        self._batch = self._begin(flights)
        self._outcomes: list[Outcome] = []
        self._walk = self._fly()

    def first_call(self) -> EnvironmentCall:
        return next(self._walk)

    def next_call(self, answer: Any) -> EnvironmentCall | None:
        """What to ask the environments next, None when the wave is over."""
        try:
            return self._walk.send(answer)
        except StopIteration:
            return None

    def take_outcomes(self) -> list[Outcome]:
        """What became known since the last call."""
        found, self._outcomes = self._outcomes, []
        return found

    def _begin(self, flights: Sequence[_Flight]) -> FlightBatch:
        instructions = [flight.candidate.task.instruction for flight in flights]
        return self._policy.begin(instructions, [flight.candidate.seed for flight in flights])

    def _fly(self) -> Generator[EnvironmentCall, Any, None]:
        horizon, environments = self._policy.config.horizon, self._environments
        tasks = {id: flight.candidate.task for id, flight in self._flights.items()}
        create = partial(
            environments.create, tasks, image_hw=self._policy.config.image_hw, max_frames=horizon.num_frames
        )
        for id, fault in (yield partial(_once_there_is_room, create)).items():
            self._lose(id, fault.code, fault.message)
        seen = self._seen((yield partial(environments.reset, list(self._flights))), {id: 1 for id in self._flights})
        for segment in range(horizon.segments):
            if not self._flights:
                break
            self._batch.observe({self._flights[id].row: result.frames for id, result in seen.items()})
            plans, flown, stopped = self._planned(self._batch.plan())
            if not flown:
                break
            seen = self._seen((yield partial(environments.step, flown)), {id: len(own) for id, own in flown.items()})
            for id, result in seen.items():
                self._record(self._flights[id], plans[id], flown[id], result)
            is_last = segment == horizon.segments - 1
            for id in list(seen):
                flight = self._flights[id]
                rule = stopped[id] or rule_that_ends(self._rules, flight.so_far())
                if is_last and len(flown[id]) == horizon.step:
                    self._finish(id, HORIZON)
                elif rule:
                    self._finish(id, rule)
                    del seen[id]
        yield partial(environments.close, self.ids)

    def _planned(
        self, planned: Sequence[PlannedSegment]
    ) -> tuple[dict[str, PlannedSegment], dict[str, np.ndarray], dict[str, str]]:
        """Plans of the flights that go on, the actions that they fly, and by which rule they end with those."""
        plans, flown, stopped = {}, {}, {}
        for id, flight in list(self._flights.items()):
            plan = planned[flight.row]
            if not plan.is_finite:
                self._lose(
                    id,
                    "not_finite",
                    f"actions or log-probabilities of segment {len(flight.segments)} hold NaN or infinity; with every "
                    "seed that means broken weights: look at the loss of the last steps",
                )
                continue
            count, stopped[id] = actions_allowed(self._rules, flight.so_far(), plan.actions)
            plans[id], flown[id] = plan, plan.actions[:count]
        return plans, flown, stopped

    def _seen(self, answers: Mapping[str, Any], wanted: Mapping[str, int]) -> dict[str, EnvironmentResult]:
        """Answers that can be used; the flights of the others are lost."""
        good: dict[str, EnvironmentResult] = {}
        for id, count in wanted.items():
            answer = answers.get(id)
            if isinstance(answer, EnvironmentFault):
                self._lose(id, answer.code, answer.message)
            elif answer is None or not self._fits(answer, count):
                h, w = self._policy.config.image_hw
                self._lose(id, "bad_answer", f"the environment answered without {count} frames of {h}x{w} and poses")
            elif not np.isfinite(answer.poses).all():
                self._lose(id, "bad_answer", "the environment answered poses with NaN or infinity")
            else:
                good[id] = answer
                self._flights[id].poses.append(answer.poses)
        return good

    def _fits(self, answer: EnvironmentResult, count: int) -> bool:
        frames = answer.frames
        has_frames = frames.dtype == np.uint8 and frames.shape == (count, *self._policy.config.image_hw, 3)
        return has_frames and answer.poses.shape == (count, 6) and answer.collided.shape == (count,)

    def _record(self, flight: _Flight, plan: PlannedSegment, actions: np.ndarray, result: EnvironmentResult) -> None:
        before = flight.poses[-2][-1:]
        flight.collided = flight.collided or bool(result.collided.any())
        flight.segments.append(
            SegmentTrace(
                bits=plan.bits,
                log_probs=plan.log_probs,
                actions=np.array(actions, np.float64),
                poses=np.concatenate([before, result.poses]),
            )
        )

    def _finish(self, id: str, end_reason: str) -> None:
        flight, policy = self._flights.pop(id), self._policy
        candidate = flight.candidate
        self._outcomes.append(
            FlightTrace(
                task_id=candidate.task.task_id,
                group_id=candidate.group_id,
                candidate_id=candidate.candidate_id,
                seed=candidate.seed,
                attempt=candidate.attempt,
                prompt=policy.prompt(candidate.task.instruction),
                checkpoint_digest=policy.digest,
                policy_scales=policy.policy_scales,
                repetitions=policy.repetitions,
                latents=self._batch.latents(flight.row),
                segments=tuple(flight.segments),
                end_reason=end_reason,
                collided=flight.collided,
                environment_steps=flight.steps,
                horizon_steps=policy.config.horizon.num_frames - 1,
            )
        )

    def _lose(self, id: str, code: str, message: str) -> None:
        flight = self._flights.pop(id)
        self._outcomes.append(LostFlight(candidate=flight.candidate, code=code, message=message))


def _once_there_is_room(create: EnvironmentCall) -> Any:
    """Create, or wait while others hold the environments.

    A wave asks for all of its environments at once and holds none before, so no two waves wait for each other.

    Raises:
        CapacityError: more than there are in all, or nobody gave any back for too long.
    """
    give_up_s = time.monotonic() + _ROOM_WITHIN_S
    while True:
        try:
            return create()
        except CapacityError as error:
            if error.asked > error.capacity or time.monotonic() > give_up_s:
                raise
        time.sleep(_ROOM_PAUSE_S)
