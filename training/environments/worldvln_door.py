"""`/reset` and `/step_actions`: the published WorldVLN rollout drives its simulator by these, unmodified.

One flight at a time: `/reset` replaces the active session. A request is checked as a whole before the drone moves.
Source: spec/session_protocol.md 5.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from PIL import Image

from worldvln_edge.tasks import Pose6, SceneRef, Task
from worldvln_edge.training.environments.env_messages import Encoding
from worldvln_edge.training.environments.environment import EnvironmentFault, EnvironmentResult, Environments
from worldvln_edge.training.environments.http_calls import RefusedRequestError
from worldvln_edge.training.environments.task_files import TaskFiles

MAX_ACTIONS = 256
"""Of one call."""
_ID = "worldvln"  # of the one environment that sessions take turns in
_JPEG_QUALITY = 90
ImageFormat: TypeAlias = Literal["jpeg", "png"]
"""How frames are sent: jpeg as the published simulator does, png exactly."""


@dataclass(frozen=True, kw_only=True)
class _Flight:
    session_id: str
    task_id: str
    frame_index: int


class WorldVLNDoor:
    """The published simulator service, on one environment of a pool.

    Args:
        environments: where the flight takes place.
        tasks: task files that a request may name.
        scene: of flights whose task names none.
        image_hw: rows and columns of the frames.
        max_frames: of a session that does not say.
        image_format: of the frames.
    """

    def __init__(
        self,
        environments: Environments,
        tasks: TaskFiles,
        *,
        scene: SceneRef,
        image_hw: tuple[int, int],
        max_frames: int,
        image_format: ImageFormat = "jpeg",
    ):
        self._environments, self._tasks = environments, tasks
        self._scene, self._image_hw, self._max_frames = scene, image_hw, max_frames
        self._image_format: ImageFormat = image_format
        self._turn = threading.Lock()
        self._flight: _Flight | None = None

    def health(self) -> dict[str, object]:
        """What GET /health says about the session; may be called from any thread."""
        flight = self._flight
        return {
            "status": "ok",
            "active_session": "" if flight is None else flight.session_id,
            "frame_index": 0 if flight is None else flight.frame_index,
        }

    def reset(self, payload: Mapping[str, Any], encoding: Encoding) -> dict[str, object]:
        """Body of POST /reset: the active session is replaced, and the drone stands at its start.

        Raises:
            RefusedRequestError: a field is missing or wrong; the active session goes on.
            CapacityError: every environment is lent to others.
        """
        session_id = _session_id(payload)
        task_id = _text(payload, "task_id")
        task, task_file = self._tasks.find(task_id, _text(payload, "task_json_path"))
        instruction = _text(payload, "prompt") or _text(payload, "instruction") or (task.instruction if task else "")
        if not instruction:
            raise RefusedRequestError("prompt or instruction is required")
        max_frames = _whole_number(payload.get("max_frames"), "max_frames") or self._max_frames
        flown = _with_object(
            Task(
                instruction=instruction,
                initial_pos=_start_pose(payload.get("initial_pose"), task),
                task_id=task_id,
                scene=task.scene if task and task.scene else self._scene,
                use_obj=task.use_obj if task else None,
                obj_id=task.obj_id if task else None,
                target_pos=task.target_pos if task else None,
            ),
            payload.get("obj_info"),
        )
        with self._turn:
            failed = self._environments.create({_ID: flown}, image_hw=self._image_hw, max_frames=max_frames)
            seen = failed.get(_ID) or self._environments.reset([_ID])[_ID]
            if isinstance(seen, EnvironmentFault):
                raise _refusal(seen)
            self._flight = flight = _Flight(session_id=session_id, task_id=task_id, frame_index=seen.frame_index)
        return {
            "session_id": session_id,
            "task_id": task_id,
            "task_json_name": task_file,
            "instruction": instruction,
            **self._shown(seen, first=flight.frame_index),
        }

    def step_actions(self, payload: Mapping[str, Any], encoding: Encoding) -> dict[str, object]:
        """Body of POST /step_actions: one frame and pose for every action.

        Raises:
            RefusedRequestError: a field is missing or wrong; the drone has not moved.
        """
        session_id = _session_id(payload)
        with self._turn:
            flight = self._flight
            if flight is None:
                raise RefusedRequestError("no active session; call /reset first")
            if session_id != flight.session_id:
                raise RefusedRequestError(
                    f"active session mismatch: expected {flight.session_id}, got {session_id}", 409
                )
            seen = self._environments.step({_ID: _actions(payload.get("actions"))})[_ID]
            if isinstance(seen, EnvironmentFault):
                if seen.code != "bad_action":
                    self._flight = None
                raise _refusal(seen)
            self._flight = replace(flight, frame_index=seen.frame_index)
        return {"session_id": session_id, "task_id": flight.task_id, **self._shown(seen, first=flight.frame_index + 1)}

    def forget(self, ids: Iterable[str]) -> None:
        """These environments of the pool are gone."""
        if _ID in ids:
            self._flight = None

    def _shown(self, seen: EnvironmentResult, *, first: int) -> dict[str, object]:
        return {
            "images_base64": [_data_url(frame, self._image_format) for frame in seen.frames],
            "frame_indices": list(range(first, first + len(seen.poses))),
            "world_poses": seen.poses.tolist(),
            "collided": seen.collided.tolist(),
            "done": seen.done,
        }


def _refusal(fault: EnvironmentFault) -> RefusedRequestError:
    if fault.code in ("unknown_environment", "not_reset"):  # its lease ran out
        return RefusedRequestError("no active session; call /reset first")
    if fault.code in ("bad_task", "bad_action"):
        return RefusedRequestError(fault.message)
    return RefusedRequestError(f"{fault.message} (call /reset)", 500)


def _session_id(payload: Mapping[str, Any]) -> str:
    session_id = _text(payload, "session_id")
    if not session_id:
        raise RefusedRequestError("session_id is required")
    return session_id


def _text(payload: Mapping[str, Any], name: str) -> str:
    value = payload.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RefusedRequestError(f"{name} must be text")
    return value.strip()


def _whole_number(value: Any, name: str) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**6:
        raise RefusedRequestError(f"{name} must be an integer from 0 to 1000000")
    return value


def _numbers(value: Any, count: int) -> list[float] | None:
    """As floats, or None when it is not a list of that many finite numbers of sensible size."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return None
    return [float(number) for number in value] if all(abs(number) < 1e12 for number in value) else None


def _start_pose(value: Any, task: Task | None) -> Pose6:
    if value is None:
        if task is None:
            raise RefusedRequestError("initial_pose is required when task json is unavailable")
        return task.initial_pos
    pose = _numbers(value[:6], 6) if isinstance(value, list) else None
    if pose is None:
        raise RefusedRequestError("initial_pose must be 6 finite numbers (cm, deg)")
    x, y, z, roll, yaw, pitch = pose
    return x, y, z, roll, yaw, pitch


def _with_object(task: Task, info: Any) -> Task:
    """The request's object in place of the task file's; without both `use_obj` and `obj_id` there is none."""
    if info is None:
        return task
    if not isinstance(info, dict):
        raise RefusedRequestError("obj_info must be an object")
    if info.get("use_obj") is None or info.get("obj_id") is None:
        return msgspec.structs.replace(task, use_obj=None, obj_id=None, target_pos=None)
    place, turn = _numbers(info.get("obj_pos"), 3), _numbers(info.get("obj_rot", [0, 0, 0]), 3)
    if place is None or turn is None:
        raise RefusedRequestError("obj_pos and obj_rot must be 3 finite numbers each")
    return msgspec.structs.replace(
        task,
        use_obj=_whole_number(info["use_obj"], "use_obj"),
        obj_id=_whole_number(info["obj_id"], "obj_id"),
        target_pos=(place[0], place[1], place[2], turn[0], turn[1], turn[2]),
    )


def _actions(value: Any) -> np.ndarray:
    if not isinstance(value, list) or not value:
        raise RefusedRequestError("actions must be a non-empty list")
    if len(value) > MAX_ACTIONS:
        raise RefusedRequestError(f"at most {MAX_ACTIONS} actions a call, found {len(value)}")
    actions = [_numbers(action, 6) for action in value]
    if any(action is None for action in actions):
        raise RefusedRequestError("each action must be a 6D list")
    return np.array(actions, np.float64)


def _data_url(frame_HW3: np.ndarray, image_format: ImageFormat) -> str:
    buffer = io.BytesIO()
    options: dict[str, int] = {"quality": _JPEG_QUALITY} if image_format == "jpeg" else {"compress_level": 1}
    Image.fromarray(frame_HW3).save(buffer, image_format, **options)
    return f"data:image/{image_format};base64," + base64.b64encode(buffer.getvalue()).decode()
