"""The closed loop: the simulator shows frames, a pilot answers a segment of actions, the simulator flies them.

A pilot is whatever chooses actions: a server through the client SDK, a policy in this process, or a fixed table. The
number of frames and segments always comes from the pilot.
Legend: T poses and frames (num_frames, 49), N = T-1 actions. Poses and actions: cm and deg (`worldvln_edge.poses`).
Source: spec/session_protocol.md 3, 7.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from worldvln_edge.client import SessionClient
from worldvln_edge.poses import actions_between
from worldvln_edge.runtime.sessions.policy import Policy, PolicySession
from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.scene import FAMILIES
from worldvln_edge.training.sim.simulator import Simulator
from worldvln_edge.training.sim.tasks import FlightScore, score_flight


class FlightError(ValueError):
    """A flight that cannot be made, or a pilot that broke its promise. The message says which task and why."""


class Pilot(Protocol):
    """Chooses the actions of one flight at a time."""

    @property
    def points(self) -> tuple[int, ...]:
        """Segment borders as 1-based frame indices, such as (1, 17, 33, 49)."""
        ...

    @property
    def image_hw(self) -> tuple[int, int]:
        """Size of the frames that it wants to see."""
        ...

    @property
    def profile(self) -> str | None:
        """Generation profile of the last segment; None before the first one, and where nothing is generated."""
        ...

    def start(self, task: Task, seed: int) -> None:
        """Begin a flight; a policy reads nothing of the task but its instruction."""
        ...

    def observe(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Take the frames seen since the last call, uint8 [H, W, 3], and give the next segment: [step, 6]."""
        ...

    def end(self) -> None:
        """Finish the flight, also one that was broken off."""
        ...


class ServerPilot:
    """A server, through an open `SessionClient`."""

    def __init__(self, client: SessionClient):
        """
        Raises:
            ValueError: the client is not connected.
        """
        if client.welcome is None:
            raise ValueError("the client is not connected; use it as a context manager")
        self._client = client
        self.points, self.image_hw = tuple(client.welcome.points), tuple(client.welcome.image.hw)
        self.profile: str | None = None

    def start(self, task: Task, seed: int) -> None:
        self._client.start(task.instruction, seed=seed)

    def observe(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        answer = self._client.observe(frames)
        if answer.segment < 0:
            raise FlightError(
                f"the server holds {answer.frames} frames and gave no actions; it wants {answer.need} more"
            )
        self.profile = answer.profile
        return answer.actions

    def end(self) -> None:
        if self._client.session is not None and self._client.welcome is not None:
            self._client.end()


class PolicyPilot:
    """A policy in this process."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._session: PolicySession | None = None
        self.points, self.image_hw = policy.info.horizon.points, policy.info.image_hw
        self.profile: str | None = None

    def start(self, task: Task, seed: int) -> None:
        self._fly(self._policy.new_session(task.instruction, seed=seed))

    def _fly(self, session: PolicySession) -> None:
        """Go on with this session in place of the one flown so far."""
        self.end()
        self._session = session

    def observe(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        if self._session is None:
            raise RuntimeError("no flight; call start(task, seed) before observe(frames)")
        chunk = self._session.observe(frames)
        if chunk is None:
            raise FlightError(f"the policy holds {self._session.frames} frames and gave no actions")
        self.profile = chunk.profile
        return chunk.actions

    def end(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


class ReplayPilot:
    """Flies actions that were fixed before the flight, whatever it sees: experts and baselines."""

    image_hw = (16, 16)  # nobody looks
    profile = None

    def __init__(self, actions_of_task: Callable[[Task], np.ndarray], *, num_actions: int):
        """
        Args:
            actions_of_task: task -> [num_actions, 6].
            num_actions: length of a flight.
        """
        self._actions_of_task = actions_of_task
        self._actions = np.zeros((0, 6))
        self.points = (1, num_actions + 1)

    def start(self, task: Task, seed: int) -> None:
        self._actions = self._actions_of_task(task)

    def observe(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        return self._actions

    def end(self) -> None:
        """Nothing is held."""


def expert_actions(task: Task) -> np.ndarray:
    """The expert's actions: float64 [N, 6]. Raises FlightError when the task has no reference path."""
    if len(task.reference_path_raw) < 2:
        raise FlightError(f'task {task.task_id!r} has no "reference_path_raw", so there is no expert to replay')
    return actions_between(np.array(task.reference_path_raw))


@dataclass(frozen=True, kw_only=True)
class FlownFlight:
    """One flight as it was flown."""

    task: Task
    instruction: str  # what the pilot was told; the task's own except in shuffled-text runs
    seed: int
    points: tuple[int, ...]
    frames: np.ndarray  # uint8 [T, H, W, 3], as the pilot saw them; the last segment's are never sent
    poses: np.ndarray  # float64 [T, 6], achieved
    actions: np.ndarray  # float64 [N, 6], commanded
    latency_ms: tuple[float, ...]  # per segment, wall time of `observe` on the client's side
    profiles: tuple[str, ...]  # generation profiles that were flown, each once; empty where nothing was generated
    score: FlightScore

    @property
    def segments(self) -> int:
        return len(self.latency_ms)

    def segment_actions(self, segment: int) -> np.ndarray:
        """Actions of one segment: float64 [step, 6]."""
        return self.actions[self.points[segment] - 1 : self.points[segment + 1] - 1]


def fly_task(
    task: Task,
    pilot: Pilot,
    simulator: Simulator,
    *,
    seed: int = 0,
    instruction: str | None = None,
    on_segment: Callable[[int], None] | None = None,
) -> FlownFlight:
    """Fly one task to its end. A collision does not end the flight (the ghost drone flies on), it only fails it.

    Args:
        task: must have `end_pos`.
        pilot: what chooses the actions.
        simulator: stands in the task's scene and renders `pilot.image_hw`.
        seed: of the pilot; that of the wind is the task's.
        instruction: told instead of the task's own (shuffled text); the task is scored all the same.
        on_segment: called with the segment's index after each flown segment.

    Raises:
        FlightError: the task cannot be scored, or the pilot gave not as many finite actions as a segment has.
        ServerError, ServerUnreachableError, AnswerTimeoutError: the server's, unchanged.
    """
    check_task(task)
    told = task.instruction if instruction is None else instruction
    heard = task if instruction is None else msgspec.structs.replace(task, instruction=instruction)
    frames = [simulator.reset(task.initial_pos, task.seed)]
    flown: list[np.ndarray] = []
    latency_ms: list[float] = []
    profiles: dict[str, None] = {}
    collided, unseen = False, 0
    try:
        pilot.start(heard, seed)
        for segment in range(len(pilot.points) - 1):
            began = time.perf_counter()
            actions = np.asarray(pilot.observe(frames[unseen:]), np.float64)
            latency_ms.append((time.perf_counter() - began) * 1e3)
            if pilot.profile is not None:
                profiles[pilot.profile] = None
            unseen = len(frames)
            wanted = pilot.points[segment + 1] - pilot.points[segment]
            if actions.shape != (wanted, 6) or not np.isfinite(actions).all():
                raise FlightError(
                    f"task {task.task_id!r}, segment {segment}: expected {wanted} actions of 6 finite numbers, got an "
                    f"array {list(actions.shape)}"
                )
            for action in actions:
                seen = simulator.step(action)
                frames.append(seen.frame)
                collided |= seen.collided
            flown.append(actions)
            if on_segment is not None:
                on_segment(segment)
    finally:
        pilot.end()
    return FlownFlight(
        task=task,
        instruction=told,
        seed=seed,
        points=tuple(pilot.points),
        frames=np.stack(frames),
        poses=simulator.poses,
        actions=np.concatenate(flown),
        latency_ms=tuple(latency_ms),
        profiles=tuple(profiles),
        score=score_flight(task, simulator.poses, collided),
    )


def check_task(task: Task) -> None:
    """Raise FlightError unless the task can be flown and scored here: a scene that we can build, and an end."""
    if task.scene is None:
        raise FlightError(
            f"task {task.task_id!r} names no scene, so there is nothing to fly in; use tasks made by "
            '`worldvln-edge sim tasks`, or add "scene": {"family": "city", "seed": 0}'
        )
    if task.scene.family not in FAMILIES or task.scene.seed < 0:
        raise FlightError(
            f"task {task.task_id!r}: no scene {task.scene.family!r} {task.scene.seed}; families are "
            f"{', '.join(FAMILIES)}, seeds are >= 0"
        )
    if task.end_pos is None:
        raise FlightError(f'task {task.task_id!r} has no "end_pos", so its flight cannot be scored')


def flight_seed(task: Task, seed: int) -> int:
    """Seed of a task's flight: different for every task, and the same in whatever order or list it is flown."""
    return (task.seed + seed) % 2**63


class SceneSimulators:
    """Simulators for a row of tasks: tasks that follow each other in one scene share one, since making it costs more
    than a flight. A context manager; use it from one thread."""

    def __init__(self, image_hw: tuple[int, int]):
        if min(image_hw) < 1 or max(image_hw) > 4096:
            raise FlightError(
                f"the pilot wants frames of {image_hw[0]}x{image_hw[1]}; the camera gives 1 to 4096 a side"
            )
        self._image_hw = image_hw
        self._key: tuple[str, int, str] | None = None
        self._simulator: Simulator | None = None

    def for_task(self, task: Task) -> Simulator:
        """A simulator in the task's scene; the one given before is closed when the scene differs.

        Raises:
            FlightError: a task that cannot be flown here.
            RenderingUnavailableError: no offscreen OpenGL on this machine.
        """
        check_task(task)
        assert task.scene is not None  # it was checked
        key = (task.scene.family, task.scene.seed, task.dynamics)
        if self._simulator is None or key != self._key:
            self.close()
            self._simulator, self._key = Simulator.for_task(task, image_hw=self._image_hw), key
        return self._simulator

    def close(self) -> None:
        """Free the camera; may be called twice."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None

    def __enter__(self) -> SceneSimulators:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
