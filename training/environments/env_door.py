"""`/v1/env/...`: batches of environments, for rollouts. The server simulates; rewards and budgets are the client's.

Bodies are JSON, or msgpack (`Content-Type: application/msgpack`), and answers come the same way. Frames are PNG data
URLs in JSON, raw pixels in msgpack. A call is refused as a whole with `{"error": {code, message}}` and a status of 4xx;
an environment that fails has `{"error": {code, message}}` in place of its result, and the others go on.
Source: spec/seed_systems.md 3.4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from worldvln_edge.tasks import Task, TaskFileError, task_from_json
from worldvln_edge.training.environments.env_messages import ACTION_KIND, Encoding, answer_body, fault_body
from worldvln_edge.training.environments.environment import (
    MAX_FRAMES,
    EnvironmentAnswer,
    EnvironmentFault,
    Environments,
    FrameChoice,
)
from worldvln_edge.training.environments.http_calls import RefusedRequestError
from worldvln_edge.training.environments.task_files import TaskFiles

MAX_ANSWER_BYTES = 512 * 2**20
_MAX_ENVIRONMENTS = 4096
_MAX_ACTIONS = 4096
"""Of one environment in a call: its process answers nobody else meanwhile."""
_MAX_ID_CHARS = 256
_OTHER_DOORS = ("worldvln", "activevln/")
"""Beginnings of the ids that the server's other doors use in the same pool."""
T = TypeVar("T")


class _Env(msgspec.Struct):
    task: str | dict[str, Any]
    """A task, or the name of a task file of the server."""


class _Create(msgspec.Struct):
    envs: dict[str, _Env]
    image_hw: tuple[int, int]
    max_frames: int = MAX_FRAMES


class _Ids(msgspec.Struct):
    ids: list[str]


class _Rows(msgspec.Struct):
    values: list[list[float]]
    kind: str = ACTION_KIND


class _Step(msgspec.Struct):
    actions: dict[str, _Rows]
    frames: FrameChoice = "each"


class _WarmUp(msgspec.Struct):
    tasks: list[str | dict[str, Any]]
    image_hw: tuple[int, int]


class EnvDoor:
    """Handlers of the routes. The frame sizes of environments are remembered to bound an answer before it is made."""

    def __init__(self, environments: Environments, tasks: TaskFiles):
        self._environments, self._tasks = environments, tasks
        self._frame_bytes: dict[str, int] = {}

    def create(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """`{envs: {id: {task}}, image_hw, max_frames}` -> `{failed: {id: {error}}, instructions: {id: text}}`."""
        body = _convert(payload, _Create)
        if not 1 <= body.max_frames <= 10**6:
            raise RefusedRequestError(f"max_frames must be 1 to 1000000, found {body.max_frames}")
        _check_ids(body.envs)
        tasks: dict[str, Task] = {}
        failed: dict[str, EnvironmentFault] = {}
        for id, env in body.envs.items():
            task = self._task(env.task)
            if isinstance(task, EnvironmentFault):
                failed[id] = task
            else:
                tasks[id] = task
        if tasks:
            failed |= self._environments.create(tasks, image_hw=body.image_hw, max_frames=body.max_frames)
        rows, columns = body.image_hw
        self._frame_bytes |= {id: 3 * rows * columns for id in tasks if id not in failed}
        return {
            "failed": {id: fault_body(fault) for id, fault in failed.items()},
            "instructions": {id: task.instruction for id, task in tasks.items() if id not in failed},
        }

    def reset(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """`{ids}` -> `{results: {id: result or {error}}}`."""
        ids = _convert(payload, _Ids).ids
        _check_ids(ids)
        self._bound_answer(dict.fromkeys(ids, 1))
        return self._results(self._environments.reset(ids), encoding)

    def step(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """`{actions: {id: {values, kind}}, frames}` -> `{results: {id: result or {error}}}`."""
        body = _convert(payload, _Step)
        _check_ids(body.actions)
        self._bound_answer({id: len(rows.values) if body.frames == "each" else 1 for id, rows in body.actions.items()})
        actions: dict[str, np.ndarray] = {}
        answers: dict[str, EnvironmentAnswer] = {}
        for id, rows in body.actions.items():
            if rows.kind != ACTION_KIND:
                answers[id] = EnvironmentFault(
                    code="bad_action", message=f"actions of kind {rows.kind!r} are not known; send {ACTION_KIND!r}"
                )
            elif len(rows.values) > _MAX_ACTIONS:
                answers[id] = EnvironmentFault(
                    code="bad_action", message=f"at most {_MAX_ACTIONS} actions a call, found {len(rows.values)}"
                )
            elif any(len(row) != 6 for row in rows.values):
                answers[id] = EnvironmentFault(code="bad_action", message="each action must be 6 numbers (cm, deg)")
            else:
                actions[id] = np.array(rows.values, np.float64).reshape(-1, 6)
        answers |= self._environments.step(actions, frames=body.frames)
        return self._results(answers, encoding)

    def warm_up(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """`{tasks, image_hw}` -> `{}` at once; tasks that cannot be flown are found out by create."""
        body = _convert(payload, _WarmUp)
        _check_count(len(body.tasks), "tasks")
        tasks = [task for name in body.tasks if isinstance(task := self._task(name), Task)]
        self._environments.warm_up(tasks, image_hw=body.image_hw)
        return {}

    def close(self, payload: dict[str, Any], encoding: Encoding) -> dict[str, object]:
        """`{ids}` -> `{}`; unknown ids are ignored."""
        ids = _convert(payload, _Ids).ids
        _check_ids(ids)
        self._environments.close(ids)
        self.forget(ids)
        return {}

    def forget(self, ids: Iterable[str]) -> None:
        """These environments are gone."""
        for id in ids:
            self._frame_bytes.pop(id, None)

    def _task(self, task: str | dict[str, Any]) -> Task | EnvironmentFault:
        try:
            if isinstance(task, dict):
                return task_from_json(task)
            found, _ = self._tasks.find(task)
        except (TaskFileError, RefusedRequestError) as error:
            return EnvironmentFault(code="bad_task", message=str(error))
        if found is None:
            return EnvironmentFault(code="bad_task", message=f"this server has no task file {task!r}.json")
        return found

    def _bound_answer(self, frames: dict[str, int]) -> None:
        size = sum(count * self._frame_bytes.get(id, 0) for id, count in frames.items())
        if size > MAX_ANSWER_BYTES:
            raise RefusedRequestError(
                f"the answer would hold {size} bytes of frames, at most {MAX_ANSWER_BYTES} are sent; ask for fewer "
                'environments or actions at once, or for frames "last"',
                413,
                "too_large",
            )

    def _results(self, answers: Mapping[str, EnvironmentAnswer], encoding: Encoding) -> dict[str, object]:
        self.forget(id for id, answer in answers.items() if _is_gone(answer))
        return {"results": {id: answer_body(answer, encoding) for id, answer in answers.items()}}


def _is_gone(answer: EnvironmentAnswer) -> bool:
    gone = ("lost", "simulator_failed", "unknown_environment")
    return isinstance(answer, EnvironmentFault) and answer.code in gone


def _convert(payload: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as error:
        raise RefusedRequestError(str(error)) from None


def _check_ids(ids: Collection[str]) -> None:
    _check_count(len(ids), "environments")
    if any(not 0 < len(id) <= _MAX_ID_CHARS for id in ids):
        raise RefusedRequestError(f"ids must be 1 to {_MAX_ID_CHARS} characters")
    if any(id.startswith(_OTHER_DOORS) for id in ids):
        raise RefusedRequestError(f"ids must not begin with {' or '.join(map(repr, _OTHER_DOORS))}")


def _check_count(count: int, what: str) -> None:
    if count > _MAX_ENVIRONMENTS:
        raise RefusedRequestError(f"at most {_MAX_ENVIRONMENTS} {what} a call, found {count}", 413, "too_large")
