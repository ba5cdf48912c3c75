"""The simulator as a service: one drone, one active session; reset it, send it actions, get frames and poses back.

The session is driven as the research rollout drives it. A request is checked as a whole before the drone moves.
Source: spec/session_protocol.md 5.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from worldvln_edge.poses import BodyOrder
from worldvln_edge.tasks import SceneRef, Task, TaskFileError, read_task
from worldvln_edge.training.sim.placed_object import PlacedObject, with_object
from worldvln_edge.training.sim.scene import build_scene
from worldvln_edge.training.sim.scene_model import SceneModel, load_scene_model
from worldvln_edge.training.sim.simulator import Simulator

_TASK_ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_MAX_ACTIONS = 256
_JPEG_QUALITY = 90


class RefusedRequestError(ValueError):
    """A client's mistake. `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class SimulatorServiceConfig:
    image_hw: tuple[int, int] = (256, 256)
    scene: SceneRef = field(default_factory=lambda: SceneRef(family="city", seed=0))
    """Where a flight takes place whose task names no scene."""
    task_root: Path | None = None
    """Folder of `<task_id>.json`; None: requests carry prompt and pose themselves."""
    order: BodyOrder = "trans_first"
    max_frames: int = 49


@dataclass
class _Flight:
    session_id: str
    task_id: str
    max_frames: int
    frame_index: int = 1


class SimulatorService:
    """Answers requests with dictionaries for JSON. Use `reset`, `step_actions` and `close` from one thread."""

    def __init__(self, config: SimulatorServiceConfig | None = None):
        self._config = config or SimulatorServiceConfig()
        self._simulator: Simulator | None = None
        self._in_simulator: tuple[SceneRef, PlacedObject | None] | None = None
        self._flight: _Flight | None = None

    def health(self) -> dict[str, object]:
        """Body of GET /health; may be called from any thread."""
        flight = self._flight
        return {
            "status": "ok",
            "active_session": "" if flight is None else flight.session_id,
            "frame_index": 0 if flight is None else flight.frame_index,
        }

    def reset(self, payload: Mapping[str, Any]) -> dict[str, object]:
        """Body of POST /reset: the active session is replaced, and the drone stands at its start.

        Raises:
            RefusedRequestError: a field is missing or wrong; the active session goes on.
        """
        session_id = _text(payload, "session_id")
        if not session_id:
            raise RefusedRequestError("session_id is required")
        task_id = _text(payload, "task_id")
        task, task_file = self._find_task(task_id, _text(payload, "task_json_path"))
        instruction = _text(payload, "prompt") or _text(payload, "instruction") or (task.instruction if task else "")
        if not instruction:
            raise RefusedRequestError("prompt or instruction is required")
        pose = _start_pose(payload.get("initial_pose"), task)
        placed = _placed_object(payload.get("obj_info"), task)
        max_frames = _whole_number(payload.get("max_frames"), "max_frames") or self._config.max_frames
        simulator = self._simulator_for(task.scene if task and task.scene else self._config.scene, placed)
        frame = simulator.reset(pose)
        self._flight = flight = _Flight(session_id, task_id, max_frames)
        return {
            "session_id": session_id,
            "task_id": task_id,
            "task_json_name": task_file,
            "instruction": instruction,
            "images_base64": [_data_url(frame)],
            "frame_indices": [flight.frame_index],
            "world_poses": [simulator.pose.tolist()],
            "done": flight.frame_index >= flight.max_frames,
        }

    def step_actions(self, payload: Mapping[str, Any]) -> dict[str, object]:
        """Body of POST /step_actions: one frame and pose for every action.

        Raises:
            RefusedRequestError: a field is missing or wrong; the drone has not moved.
        """
        session_id = _text(payload, "session_id")
        if not session_id:
            raise RefusedRequestError("session_id is required")
        flight, simulator = self._flight, self._simulator
        if flight is None or simulator is None:
            raise RefusedRequestError("no active session; call /reset first")
        if session_id != flight.session_id:
            raise RefusedRequestError(f"active session mismatch: expected {flight.session_id}, got {session_id}", 409)
        actions = _actions(payload.get("actions"))
        first = flight.frame_index + 1
        observations = [simulator.step(action) for action in actions]
        flight.frame_index += len(observations)
        return {
            "session_id": session_id,
            "task_id": flight.task_id,
            "images_base64": [_data_url(observation.frame) for observation in observations],
            "frame_indices": list(range(first, first + len(observations))),
            "world_poses": [observation.pose.tolist() for observation in observations],
            "done": flight.frame_index >= flight.max_frames,
        }

    def close(self) -> None:
        """Free the camera."""
        self._flight, self._in_simulator = None, None
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None

    def _simulator_for(self, scene: SceneRef, placed: PlacedObject | None) -> Simulator:
        if self._simulator is None or self._in_simulator != (scene, placed):
            try:
                model = load_scene_model(scene.family, scene.seed)
            except ValueError as error:
                raise RefusedRequestError(str(error)) from None
            if placed is not None:
                model = SceneModel(with_object(build_scene(scene.family, scene.seed), placed))
            self.close()
            self._simulator = Simulator(model, image_hw=self._config.image_hw, order=self._config.order)
            self._in_simulator = (scene, placed)
        return self._simulator

    def _find_task(self, task_id: str, json_path: str) -> tuple[Task | None, str]:
        """The task file that a request names, and its name; (None, "") if there is none of that id."""
        root = None if self._config.task_root is None else self._config.task_root.resolve()
        if task_id and not _TASK_ID.fullmatch(task_id):
            raise RefusedRequestError("task_id must be 1 to 128 of A-Z a-z 0-9 . _ - and not start with a dot")
        if json_path:
            path = Path(json_path).resolve()
            if root is None or not path.is_relative_to(root):
                raise RefusedRequestError("task_json_path is outside of the folder of tasks")
        elif task_id and root is not None:
            path = root / f"{task_id}.json"
            if not path.is_file():
                return None, ""
        else:
            return None, ""
        try:
            return read_task(path), path.name
        except TaskFileError as error:
            raise RefusedRequestError(str(error).replace(f"{path.parent}/", "")) from None


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
    """Exactly so many finite numbers; None if it is anything else."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return None
    return [float(number) for number in value] if all(abs(number) < 1e12 for number in value) else None


def _start_pose(value: Any, task: Task | None) -> list[float]:
    if value is None:
        if task is None:
            raise RefusedRequestError("initial_pose is required when task json is unavailable")
        return list(task.initial_pos)
    pose = _numbers(value[:6], 6) if isinstance(value, list) else None
    if pose is None:
        raise RefusedRequestError("initial_pose must be 6 finite numbers (cm, deg)")
    return pose


def _placed_object(info: Any, task: Task | None) -> PlacedObject | None:
    """From the request, else from the task file; None without both `use_obj` and `obj_id`."""
    if info is None:
        if task is None or task.use_obj is None or task.obj_id is None or task.target_pos is None:
            return None
        use_obj, look, place, turn = task.use_obj, task.obj_id, list(task.target_pos[:3]), list(task.target_pos[3:])
    else:
        if not isinstance(info, dict):
            raise RefusedRequestError("obj_info must be an object")
        if info.get("use_obj") is None or info.get("obj_id") is None:
            return None
        use_obj, look = _whole_number(info["use_obj"], "use_obj"), _whole_number(info["obj_id"], "obj_id")
        place_or_none, turn_or_none = _numbers(info.get("obj_pos"), 3), _numbers(info.get("obj_rot", [0, 0, 0]), 3)
        if place_or_none is None or turn_or_none is None:
            raise RefusedRequestError("obj_pos and obj_rot must be 3 finite numbers each")
        place, turn = place_or_none, turn_or_none
    if use_obj == 0:
        return None
    try:
        return PlacedObject(kind=use_obj, look=look, position_cm=(place[0], place[1], place[2]), yaw_deg=turn[1])
    except ValueError as error:
        raise RefusedRequestError(str(error)) from None


def _actions(value: Any) -> list[list[float]]:
    if not isinstance(value, list) or not value:
        raise RefusedRequestError("actions must be a non-empty list")
    if len(value) > _MAX_ACTIONS:
        raise RefusedRequestError(f"at most {_MAX_ACTIONS} actions a call, found {len(value)}")
    actions = [_numbers(action, 6) for action in value]
    if any(action is None for action in actions):
        raise RefusedRequestError("each action must be a 6D list")
    return [action for action in actions if action is not None]


def _data_url(frame_HW3: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame_HW3).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
