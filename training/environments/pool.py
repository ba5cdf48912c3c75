"""Environments in simulator processes of this machine.

Every process has a thread that talks to it, so a call runs on all processes at once and calls of several threads take
turns. A process that dies or does not answer in time loses the episode that it was asked for (`lost`) and is started
again. Its other episodes are flown again there, to where they were, once they are asked for: the same requests give the
same bits.

Source: spec/seed_systems.md 2.2 (pool, all-or-nothing, warm-up), 3.4.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from worldvln_edge.poses import BodyOrder
from worldvln_edge.tasks import SceneRef, Task
from worldvln_edge.training.environments.environment import (
    MAX_FRAMES,
    CapacityError,
    EnvironmentAnswer,
    EnvironmentFault,
    FrameChoice,
    FrameSizeError,
    check_actions,
    without_reference,
)
from worldvln_edge.training.environments.simulator_messages import (
    SPARE_VIEWS,
    Close,
    Create,
    Look,
    Refused,
    Reset,
    SimulatorRequest,
    Step,
    WarmUp,
)
from worldvln_edge.training.environments.simulator_process import SimulatorLostError, SimulatorProcess

_SCENE_WORTH = 8
"""A process that has a task's scene may hold this many more environments than the emptiest before it is passed over."""
_ACTIONS_IN_TIME = 16
"""The time limit is for this many actions; a longer step gets more in proportion."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    processes: int = 1  # one per core renders fastest
    per_process: int = 64  # environments; a process holds 20 MB for every scene that they fly in
    answer_within_s: float = 30.0  # per environment, of a creation, a reset or 16 actions; then the process is killed
    max_side: int = 1024  # pixels of a frame's longer side
    order: BodyOrder = "trans_first"  # heading of an action's translation; the research simulator uses yaw_first

    def __post_init__(self) -> None:
        if self.processes < 1 or self.per_process < 1:
            raise ValueError(f"a pool has >= 1 processes of >= 1 environments, found {self}")
        if not self.answer_within_s > 0:
            raise ValueError(f"answer_within_s must be positive, found {self.answer_within_s}")


class LocalEnvironments:
    """`Environments` of this machine. A context manager: leaving it ends the processes.

    Args:
        processes: how many simulators render at once.
        config: instead of `processes`, when more is to be chosen.

    Raises:
        SimulatorStartError: the simulator cannot run here.
    """

    def __init__(self, processes: int | None = None, config: PoolConfig | None = None):
        self.config = config or PoolConfig(processes=1 if processes is None else processes)
        if config is not None and processes is not None:
            raise ValueError("give processes, or a config that holds them, not both")
        self._lock = threading.Lock()
        self._seats = [_Seat(SimulatorProcess(), i) for i in range(self.config.processes)]
        self._seat_of: dict[str, _Seat] = {}
        self._scene_of: dict[str, SceneRef | None] = {}
        self._lost: dict[str, str] = {}
        try:
            _gather(seat.thread.submit(seat.process.start) for seat in self._seats)
        except BaseException:
            self.shut_down()
            raise

    @property
    def capacity(self) -> int:
        return self.config.processes * self.config.per_process

    @property
    def in_use(self) -> int:
        """Environments that exist now."""
        return len(self._seat_of)

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Of the simulator processes; None: it is down and starts with the next request."""
        return tuple(seat.process.pid for seat in self._seats)

    def create(
        self, tasks: Mapping[str, Task], *, image_hw: tuple[int, int], max_frames: int = MAX_FRAMES
    ) -> Mapping[str, EnvironmentFault]:
        """See `Environments.create`."""
        self._check_size(image_hw)
        new = self._reserve(tasks)
        requests = {
            id: Create(id, without_reference(task), image_hw, max_frames, self.config.order)
            for id, task in tasks.items()
        }
        replies = self._ask_all(requests)
        failed = {id: reply for id, reply in replies.items() if isinstance(reply, EnvironmentFault)}
        with self._lock:
            for id in failed:
                if id in new:
                    self._forget(id)
            for id, task in tasks.items():
                if id not in failed and id in self._seat_of and task.scene is not None:
                    self._scene_of[id] = task.scene
                    self._seat_of[id].scenes.add(task.scene)
        return failed

    def reset(self, ids: Sequence[str]) -> Mapping[str, EnvironmentAnswer]:
        """See `Environments.reset`."""
        return _looks(self._ask_all({id: Reset(id) for id in ids}))

    def step(
        self, actions: Mapping[str, np.ndarray], *, frames: FrameChoice = "each"
    ) -> Mapping[str, EnvironmentAnswer]:
        """See `Environments.step`."""
        requests: dict[str, SimulatorRequest] = {}
        refused: dict[str, EnvironmentAnswer] = {}
        for id, rows in actions.items():
            checked = check_actions(rows)
            if isinstance(checked, EnvironmentFault):
                refused[id] = checked
            else:
                requests[id] = Step(id, checked.tobytes(), frames)
        return refused | _looks(self._ask_all(requests))

    def warm_up(self, tasks: Sequence[Task], *, image_hw: tuple[int, int]) -> None:
        """See `Environments.warm_up`. A scene that cannot be loaded is found out by `create`."""
        self._check_size(image_hw)
        chosen: dict[SceneRef, tuple[_Seat, Task]] = {}
        most = SPARE_VIEWS * len(self._seats)  # of more, the first would be gone again before they are needed
        with self._lock:
            for task in tasks:
                if len(chosen) < most and task.scene is not None and task.scene not in chosen:
                    seat = min(self._seats, key=lambda seat: (task.scene not in seat.scenes, len(seat.ids), seat.index))
                    seat.scenes.add(task.scene)
                    chosen[task.scene] = seat, task
        for seat, task in chosen.values():
            seat.thread.submit(self._ask, seat, "", WarmUp(task, image_hw))

    def close(self, ids: Sequence[str]) -> None:
        """See `Environments.close`."""
        with self._lock:
            for id in ids:
                self._lost.pop(id, None)
            known = {id: Close(id) for id in ids if id in self._seat_of}
        self._ask_all(known)
        with self._lock:
            for id in known:
                self._forget(id)
                self._lost.pop(id, None)

    def shut_down(self) -> None:
        """End the processes; may be called twice."""
        for seat in self._seats:
            seat.thread.shutdown(wait=True, cancel_futures=True)
        for seat in self._seats:
            seat.process.stop()

    def __enter__(self) -> LocalEnvironments:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def _check_size(self, image_hw: tuple[int, int]) -> None:
        rows, columns = image_hw
        if not (1 <= rows <= self.config.max_side and 1 <= columns <= self.config.max_side):
            raise FrameSizeError(
                f"frames of {rows}x{columns} were asked for; this pool renders 1 to {self.config.max_side} pixels a "
                "side (--max-frame-side)"
            )

    def _reserve(self, tasks: Mapping[str, Task]) -> set[str]:
        """Give every new id a seat, or none of them. Returns the new ids."""
        with self._lock:
            new = [id for id in tasks if id not in self._seat_of]
            if self.in_use + len(new) > self.capacity:
                raise CapacityError(len(new), self.in_use, self.capacity)
            for id in new:
                scene = tasks[id].scene
                free = [seat for seat in self._seats if len(seat.ids) < self.config.per_process]
                seat = min(
                    free, key=lambda seat: (len(seat.ids) + _SCENE_WORTH * (scene not in seat.scenes), seat.index)
                )
                seat.ids.add(id)
                if scene is not None:
                    seat.scenes.add(scene)
                self._seat_of[id], self._scene_of[id] = seat, scene
                self._lost.pop(id, None)
            return set(new)

    def _forget(self, id: str) -> None:
        seat = self._seat_of.pop(id, None)
        scene = self._scene_of.pop(id, None)
        if seat is not None:
            seat.ids.discard(id)
            if scene is not None and all(self._scene_of[other] != scene for other in seat.ids):
                seat.scenes.discard(scene)

    def _ask_all(self, requests: Mapping[str, SimulatorRequest]) -> dict[str, EnvironmentAnswer | None]:
        """All processes at once; on each, one environment after the other. None: done, with nothing to see."""
        by_seat: dict[_Seat, list[str]] = {}
        replies: dict[str, EnvironmentAnswer | None] = {}
        with self._lock:
            for id in requests:
                seat = self._seat_of.get(id)
                if seat is None:
                    replies[id] = self._absent(id)
                else:
                    by_seat.setdefault(seat, []).append(id)

        def ask_each(seat: _Seat, ids: list[str]) -> dict[str, EnvironmentAnswer | None]:
            return {id: self._ask(seat, id, requests[id]) for id in ids}

        jobs = [seat.thread.submit(ask_each, seat, ids) for seat, ids in by_seat.items()]
        for answered in _gather(jobs):
            replies |= answered
        return {id: replies[id] for id in requests}

    def _ask(self, seat: _Seat, id: str, request: SimulatorRequest) -> EnvironmentAnswer | None:
        """Runs on the seat's thread."""
        if isinstance(request, Reset | Step | Close) and id not in seat.flown:
            with self._lock:
                return self._absent(id)
        if isinstance(request, Close) and id in seat.fallen:
            seat.forget(id)
            return None
        try:
            if isinstance(request, Reset | Step) and id in seat.fallen:
                for earlier in seat.flown[id][: 1 if isinstance(request, Reset) else None]:
                    reply = seat.process.ask(earlier, self._within_s(earlier))
                    if isinstance(reply, Refused):
                        return self._refused(seat, id, reply)
                seat.fallen.discard(id)
            reply = seat.process.ask(request, self._within_s(request))
        except SimulatorLostError as error:
            return self._lose(seat, id, str(error))
        if isinstance(reply, Refused):
            return self._refused(seat, id, reply)
        seat.note(request)
        return reply.result(seat.process.memory) if isinstance(reply, Look) else None

    def _refused(self, seat: _Seat, id: str, reply: Refused) -> EnvironmentFault:
        if reply.code == "simulator_failed" and id:
            seat.forget(id)
            with self._lock:
                self._forget(id)
        return EnvironmentFault(code=reply.code, message=reply.message)

    def _lose(self, seat: _Seat, id: str, why: str) -> EnvironmentFault:
        """A process died over a request for this environment; id "": for none."""
        message = f"{why}; this episode is lost, create the environment again"
        seat.forget(id)
        seat.fallen = set(seat.flown)
        _log.warning("%s; %d other episodes were in it and are flown again to where they were", why, len(seat.fallen))
        if id:
            with self._lock:
                self._forget(id)
                self._lost[id] = message
        return EnvironmentFault(code="lost", message=message)

    def _absent(self, id: str) -> EnvironmentFault:
        if id in self._lost:
            return EnvironmentFault(code="lost", message=self._lost[id])
        return EnvironmentFault(
            code="unknown_environment",
            message=f"there is no environment {id!r}: it was never created, was closed, or was left idle too long",
        )

    def _within_s(self, request: SimulatorRequest) -> float:
        count = len(request.actions) / 48 if isinstance(request, Step) else 0  # 6 float64 an action
        return self.config.answer_within_s * max(1.0, count / _ACTIONS_IN_TIME)


class _Seat:
    """A process, its thread, and what is in it. `ids` and `scenes` belong to the pool's lock, the rest to the thread.

    `ids` have their place here. `flown` are those that have been made, each with the requests that bring it to where it
    is; of `fallen`, the process that did so has died.
    """

    def __init__(self, process: SimulatorProcess, index: int):
        self.process, self.index = process, index
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"simulator-{index}")
        self.ids: set[str] = set()
        self.scenes: set[SceneRef] = set()
        self.flown: dict[str, list[Create | Reset | Step]] = {}
        self.fallen: set[str] = set()

    def note(self, request: SimulatorRequest) -> None:
        """It was answered."""
        if isinstance(request, Create):
            self.flown[request.id] = [request]
            self.fallen.discard(request.id)
        elif isinstance(request, Reset):
            self.flown[request.id][1:] = [request]
        elif isinstance(request, Step):
            self.flown[request.id].append(Step(request.id, request.actions, "last"))  # renders least
        elif isinstance(request, Close):
            self.forget(request.id)

    def forget(self, id: str) -> None:
        self.flown.pop(id, None)
        self.fallen.discard(id)

    def cost(self, scene: SceneRef | None) -> int:
        """Of one more environment here, in environments."""
        return len(self.ids) + _SCENE_WORTH * (scene not in self.scenes)


def _gather(jobs: Iterable[Future[T]]) -> list[T]:
    """Results of all, once all have ended; the first error is raised then."""
    started = list(jobs)
    for job in started:
        job.exception()
    return [job.result() for job in started]


def _looks(answers: Mapping[str, EnvironmentAnswer | None]) -> dict[str, EnvironmentAnswer]:
    return {id: answer for id, answer in answers.items() if answer is not None}
