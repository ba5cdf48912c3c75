"""The simulator: setpoint deltas in, frames and poses out.

A step moves a setpoint by `poses.apply_action`; the drone then either stands on it (`kinematic`, as the reference
simulator does) or follows it with a first-order lag and wind (`tracked`). Roll and pitch keep their start values.
Times are seconds; one step is 1/16 s. Poses and actions: cm and deg, orders of `worldvln_edge.poses`.
Source: spec/session_protocol.md 3, 5; spec/training.md 8.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from worldvln_edge.poses import BodyOrder, actions_between, apply_action
from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.camera import CameraConfig, DroneCamera
from worldvln_edge.training.sim.scene import Scene
from worldvln_edge.training.sim.scene_model import SceneModel, load_scene_model

Dynamics = Literal["kinematic", "tracked"]
STEP_S = 1.0 / 16.0


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """First-order lag of the autopilot, per axis: after one time constant 63 % of an error is gone."""

    horizontal_s: float = 0.20
    vertical_s: float = 0.25
    yaw_s: float = 0.12

    @property
    def gains(self) -> np.ndarray:
        """Share of the remaining error (x, y, z, yaw) that one step removes: float64 [4]."""
        constants = np.array([self.horizontal_s, self.horizontal_s, self.vertical_s, self.yaw_s])
        return 1.0 - np.exp(-STEP_S / np.maximum(constants, 1e-6))


@dataclass(frozen=True, kw_only=True)
class WindConfig:
    """Wind that pushes a tracked drone: an Ornstein-Uhlenbeck process per axis. Zero speeds switch it off."""

    horizontal_m_s: float = 0.0  # standard deviation of the push along x and along y
    vertical_m_s: float = 0.0
    time_constant_s: float = 1.0

    @property
    def deviations(self) -> np.ndarray:
        return np.array([self.horizontal_m_s, self.horizontal_m_s, self.vertical_m_s])


@dataclass(frozen=True)
class Observation:
    frame: np.ndarray  # uint8 RGB [H, W, 3]
    pose: np.ndarray  # float64 [6], cm and deg, achieved
    collided: bool  # in this step; the drone is not stopped, the caller ends the flight


class Simulator:
    """One drone in one scene. Same scene, seed and actions give bit-equal frames. Use it from one thread."""

    def __init__(
        self,
        scene: Scene | SceneModel,
        *,
        image_hw: tuple[int, int] = (64, 64),
        dynamics: Dynamics = "kinematic",
        tracking: TrackingConfig | None = None,
        wind: WindConfig | None = None,
        order: BodyOrder = "trans_first",
        camera: CameraConfig | DroneCamera | None = None,
    ):
        """
        Args:
            scene: what to fly in; a `SceneModel` is used as it is, a `Scene` is compiled (about 0.1 s).
            image_hw: rows and columns of the frames; larger ones are for viewing.
            dynamics: `kinematic` or `tracked`.
            tracking, wind: only used by `tracked`.
            order: which heading a step's translation uses.
            camera: lens and tilt; its `image_hw` is replaced by `image_hw`. A `DroneCamera` of this scene model is
                shared with its owner, who closes it; its own `image_hw` counts.

        Raises:
            ValueError: unknown dynamics, or wind without `tracked`.
            RenderingUnavailableError: no offscreen OpenGL on this machine.
        """
        if dynamics not in ("kinematic", "tracked"):
            raise ValueError(f"unknown dynamics {dynamics!r}; known: kinematic, tracked")
        if wind is not None and dynamics == "kinematic":
            raise ValueError("wind moves only a tracked drone; use dynamics='tracked' or leave wind out")
        self.scene_model = scene if isinstance(scene, SceneModel) else SceneModel(scene)
        self.dynamics = dynamics
        self._gains = (tracking or TrackingConfig()).gains
        self._wind_config = wind or WindConfig()
        self._order: BodyOrder = order
        self._owns_camera = not isinstance(camera, DroneCamera)
        self._camera = (
            camera
            if isinstance(camera, DroneCamera)
            else DroneCamera(self.scene_model, replace(camera or CameraConfig(), image_hw=image_hw))
        )
        self._poses: list[np.ndarray] = []
        self._setpoint = np.zeros(6)
        self._wind_m_s = np.zeros(3)
        self._rng = np.random.default_rng(0)

    @classmethod
    def for_task(cls, task: Task, *, image_hw: tuple[int, int] = (64, 64), **options) -> Simulator:
        """A simulator in the task's scene with the task's dynamics; `options` as in the constructor.

        Raises:
            ValueError: the task names no scene (a foreign task file).
        """
        if task.scene is None:
            raise ValueError(
                f"task {task.task_id!r} names no scene, so there is nothing to fly in; "
                'use tasks made by `sim tasks`, or add "scene": {"family": "city", "seed": 0}'
            )
        options.setdefault("dynamics", task.dynamics)
        return cls(load_scene_model(task.scene.family, task.scene.seed), image_hw=image_hw, **options)

    def reset(self, pose_cm_deg: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:
        """Put the drone somewhere and return the first frame: uint8 RGB [H, W, 3].

        Args:
            pose_cm_deg: 6 finite numbers.
            seed: of the wind.

        Raises:
            ValueError: the pose is not 6 finite numbers.
        """
        pose = _six_numbers(pose_cm_deg, "a pose")
        self._poses = [pose]
        self._setpoint = pose.copy()
        self._rng = np.random.default_rng(seed)
        self._wind_m_s = self._wind_config.deviations * self._rng.standard_normal(3)
        return self._camera.render(pose)

    def step(self, action: Sequence[float] | np.ndarray) -> Observation:
        """Fly one action (setpoint delta, body frame, cm and deg) and look.

        Raises:
            ValueError: the action is not 6 finite numbers.
            RuntimeError: `reset` was not called.
        """
        pose, collided = self.fly(action)
        return Observation(self._camera.render(pose), pose, collided)

    def fly(self, action: Sequence[float] | np.ndarray) -> tuple[np.ndarray, bool]:
        """As `step`, without looking: the achieved pose, float64 [6], and whether this step collided."""
        if not self._poses:
            raise RuntimeError("the drone stands nowhere yet; call reset(pose) before step(action)")
        delta = _six_numbers(action, "an action")
        before = self._poses[-1]
        self._setpoint = apply_action(self._setpoint, delta, order=self._order)
        pose = self._setpoint.copy() if self.dynamics == "kinematic" else self._follow(before)
        self._poses.append(pose)
        return pose.copy(), self._hits_something(before, pose)

    def look(self) -> np.ndarray:
        """The frame at the drone's pose: uint8 RGB [H, W, 3]."""
        return self._camera.render(self._poses[-1])

    @property
    def pose(self) -> np.ndarray:
        """Achieved pose: float64 [6]."""
        return self._poses[-1].copy()

    @property
    def poses(self) -> np.ndarray:
        """Achieved poses since `reset`, start included: float64 [T, 6]."""
        return np.array(self._poses, np.float64).reshape(-1, 6)

    @property
    def labels(self) -> np.ndarray:
        """Achieved motion between those poses, the label of each step: float64 [T-1, 6], cm and deg."""
        return actions_between(self.poses)

    def close(self) -> None:
        """Free the camera, unless it is shared; may be called twice."""
        if self._owns_camera:
            self._camera.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self, pose: np.ndarray) -> np.ndarray:
        moved = pose.copy()
        axes = [0, 1, 2, 4]
        moved[axes] += self._gains * (self._setpoint - pose)[axes]
        moved[:3] += 100.0 * STEP_S * self._wind_m_s
        keep = np.exp(-STEP_S / max(self._wind_config.time_constant_s, 1e-6))
        gust = self._wind_config.deviations * self._rng.standard_normal(3)
        self._wind_m_s = keep * self._wind_m_s + np.sqrt(1.0 - keep**2) * gust
        return moved

    def _hits_something(self, before: np.ndarray, after: np.ndarray) -> bool:
        # A long step must not jump through a thin wall: look every 20 cm along it.
        pieces = int(np.clip(np.ceil(np.linalg.norm(after[:3] - before[:3]) / 20.0), 1, 500))
        shares = np.arange(1, pieces + 1) / pieces
        path = before + shares[:, None] * (after - before)
        return self.scene_model.path_clearance_m(path, limit_m=0.5, stop_below_m=0.0) < 0.0


def _six_numbers(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    array = np.array(values, np.float64)
    if array.shape != (6,) or not np.isfinite(array).all():
        raise ValueError(f"{what} must be 6 finite numbers (cm, deg), found {np.array(values).tolist()}")
    return array
