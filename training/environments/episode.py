"""Episodes inside a simulator process: drones that share the cameras of their scenes.

Building a scene and its OpenGL context costs 0.4 s and 20 MB, a drone costs nothing: so candidates of one task, and
tasks of one scene, look through one camera. What a drone sees does not depend on who else looks.
Source: spec/session_protocol.md 4.2, 5.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from worldvln_edge.poses import BodyOrder
from worldvln_edge.tasks import SceneRef, Task
from worldvln_edge.training.environments.environment import FrameChoice
from worldvln_edge.training.sim.camera import CameraConfig, DroneCamera
from worldvln_edge.training.sim.placed_object import PlacedObject, with_object
from worldvln_edge.training.sim.scene import build_scene
from worldvln_edge.training.sim.scene_model import SceneModel
from worldvln_edge.training.sim.simulator import Simulator

ViewKey: TypeAlias = tuple[SceneRef, PlacedObject | None, tuple[int, int]]


class BadTaskError(ValueError):
    """A task that cannot be flown here."""


class SceneViews:
    """Scenes with their cameras; those that no episode uses are kept up to a number, least recently used first out."""

    def __init__(self, *, spare: int):
        self._spare = spare
        self._views: OrderedDict[ViewKey, tuple[SceneModel, DroneCamera]] = OrderedDict()
        self._users: dict[ViewKey, int] = {}

    def take(self, task: Task, image_hw: tuple[int, int]) -> tuple[SceneModel, DroneCamera, Callable[[], None]]:
        """The task's scene, a camera in it, and what to call when they are no longer needed.

        Raises:
            BadTaskError: no scene, an unknown one, or an object that cannot stand in it.
        """
        key = _view_key(task, image_hw)
        if key not in self._views:
            self._views[key] = _build(*key)
        self._views.move_to_end(key)
        self._users[key] = self._users.get(key, 0) + 1

        def give_back() -> None:
            self._users[key] -= 1
            self._drop_spare()

        return *self._views[key], give_back

    def close(self) -> None:
        """Free every camera."""
        for _, camera in self._views.values():
            camera.close()
        self._views.clear()

    def _drop_spare(self) -> None:
        unused = [key for key in self._views if not self._users.get(key)]
        for key in unused[: max(0, len(unused) - self._spare)]:
            self._users.pop(key, None)
            self._views.pop(key)[1].close()


class Episode:
    """One drone on one task.

    Args:
        task: `dynamics` and `seed` (of the wind) are its own.
        views: where its scene comes from.
        image_hw: rows and columns of the frames.
        order: which heading a step's translation uses.

    Raises:
        BadTaskError: as `SceneViews.take`.
    """

    def __init__(self, task: Task, views: SceneViews, *, image_hw: tuple[int, int], order: BodyOrder):
        self._task = task
        model, camera, self._give_back = views.take(task, image_hw)
        self._simulator = Simulator(model, dynamics=task.dynamics, order=order, camera=camera)
        self.frame_index = 0
        """1-based index of the last frame; 0 before the first reset."""

    def reset(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Frames uint8 [1, H, W, 3], poses float64 [1, 6], collided bool [1]."""
        frame = self._simulator.reset(self._task.initial_pos, self._task.seed)
        self.frame_index = 1
        return frame[None], self._simulator.pose[None], np.zeros(1, bool)

    def step(self, actions_N6: np.ndarray, frames: FrameChoice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Frames uint8 [N or 1, H, W, 3], poses float64 [N, 6], collided bool [N]."""
        seen, poses, collided = [], [], []
        for number, action in enumerate(actions_N6, 1):
            pose, hit = self._simulator.fly(action)
            poses.append(pose)
            collided.append(hit)
            if frames == "each" or number == len(actions_N6):
                seen.append(self._simulator.look())
        self.frame_index += len(actions_N6)
        return np.stack(seen), np.stack(poses), np.array(collided, bool)

    def close(self) -> None:
        """Give the camera back; call once."""
        self._give_back()


def placed_object(task: Task) -> PlacedObject | None:
    """The object that a task puts into its scene (UAV-Flow), if any.

    Raises:
        BadTaskError: a kind of object that there is not.
    """
    if not task.use_obj or task.obj_id is None or task.target_pos is None:
        return None
    x, y, z, _, yaw, _ = task.target_pos
    try:
        return PlacedObject(kind=task.use_obj, look=task.obj_id, position_cm=(x, y, z), yaw_deg=yaw)
    except ValueError as error:
        raise BadTaskError(str(error)) from None


def _view_key(task: Task, image_hw: tuple[int, int]) -> ViewKey:
    if task.scene is None:
        raise BadTaskError(
            f'task {task.task_id!r} names no scene, so there is nothing to fly in; add "scene": '
            '{"family": "city", "seed": 0}'
        )
    return task.scene, placed_object(task), image_hw


def _build(scene: SceneRef, placed: PlacedObject | None, image_hw: tuple[int, int]) -> tuple[SceneModel, DroneCamera]:
    try:
        solids = build_scene(scene.family, scene.seed)
    except ValueError as error:
        raise BadTaskError(str(error)) from None
    model = SceneModel(solids if placed is None else with_object(solids, placed))
    return model, DroneCamera(model, CameraConfig(image_hw=image_hw))
