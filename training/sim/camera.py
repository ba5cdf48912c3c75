"""Offscreen camera on the drone: frames of a `SceneModel` at a pose.

Renders with MuJoCo and EGL, which works without a display and without a GPU (Mesa). Two settings make it fast: the
offscreen buffer has exactly the frame's size, and multisampling is off.

MuJoCo's library chooses its OpenGL loader by the environment variable MUJOCO_GL, once, when it makes the first context.
`make_gl_context` therefore sets MUJOCO_GL=egl for this process if the user has not set it; a user's own choice
(`osmesa`, `glfw`) is kept.

Source: spec/training.md 8.6 (forward camera, pitched 25 degrees down, fovy 80).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from worldvln_edge.training.sim.coordinates import mirror_y, mujoco_camera_axes, mujoco_position
from worldvln_edge.training.sim.scene_model import SceneModel


class RenderingUnavailableError(RuntimeError):
    """No offscreen OpenGL here. The message says what to install."""


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """A camera at the drone's centre. It keeps level: roll and pitch of a pose do not turn it (a gimbal)."""

    image_hw: tuple[int, int] = (64, 64)
    fovy_deg: float = 80.0  # vertical; the horizontal one follows from the image's shape
    pitch_down_deg: float = 25.0

    def __post_init__(self) -> None:
        if min(self.image_hw) < 1 or max(self.image_hw) > 4096:
            raise ValueError(f"image_hw must be (rows, columns) of 1..4096 pixels, found {self.image_hw}")
        if not 1 <= self.fovy_deg <= 170:
            raise ValueError(f"fovy_deg must be 1..170, found {self.fovy_deg}")

    def project(self, pose_cm_deg: np.ndarray, point_m: np.ndarray) -> tuple[float, float] | None:
        """Where a point appears in the frame: (right, up), each -1..1 inside the frame; None if it lies behind."""
        axes = mujoco_camera_axes(float(pose_cm_deg[4]), self.pitch_down_deg)
        right, up, backward = (mirror_y(point_m) - mujoco_position(pose_cm_deg)) @ axes
        if backward >= -1e-6:
            return None
        scale = -backward * np.tan(np.radians(self.fovy_deg / 2))
        rows, columns = self.image_hw
        return float(right / (scale * columns / rows)), float(up / scale)


class DroneCamera:
    """Renders one scene. Owns an OpenGL context: make, use and close it in one thread."""

    def __init__(self, scene_model: SceneModel, config: CameraConfig | None = None):
        """
        Raises:
            RenderingUnavailableError: no offscreen OpenGL on this machine.
        """
        self.config = config or CameraConfig()
        model = scene_model.model
        rows, columns = self.config.image_hw
        model.vis.global_.offheight, model.vis.global_.offwidth = rows, columns
        self._scene_model = scene_model
        self._gl: Any = make_gl_context(columns, rows)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._view = mujoco.MjvScene(model, maxgeom=len(scene_model.scene.solids) + 16)
        self._view.flags[:] = 0  # no shadows, reflections, haze
        for flag in (mujoco.mjtRndFlag.mjRND_SKYBOX, mujoco.mjtRndFlag.mjRND_CULL_FACE):
            self._view.flags[flag.value] = 1
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
        self._camera.fixedcamid = 0
        self._rect = mujoco.MjrRect(0, 0, columns, rows)

    def render(self, pose_cm_deg: np.ndarray) -> np.ndarray:
        """Frame seen from a pose: uint8 RGB [H, W, 3]."""
        model, data = self._scene_model.model, self._scene_model.data
        model.cam_fovy[0] = self.config.fovy_deg  # the model may be shared with a camera of another lens
        data.cam_xpos[0] = mujoco_position(pose_cm_deg)
        data.cam_xmat[0] = mujoco_camera_axes(float(pose_cm_deg[4]), self.config.pitch_down_deg).ravel()
        self._gl.make_current()  # another simulator of this process may have been current
        mujoco.mjv_updateScene(
            model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._view
        )
        mujoco.mjr_render(self._rect, self._view, self._context)
        rows, columns = self.config.image_hw
        frame = np.empty((rows, columns, 3), np.uint8)
        mujoco.mjr_readPixels(frame, None, self._rect, self._context)
        return frame[::-1].copy()  # OpenGL counts rows from the bottom

    def close(self) -> None:
        """Free the OpenGL context; may be called twice."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None


def make_gl_context(columns: int, rows: int) -> Any:
    """An offscreen OpenGL context of MuJoCo.

    Raises:
        RenderingUnavailableError: EGL (or the backend the user chose) does not work here.
    """
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        if backend == "egl":
            # By name, because `mujoco.GLContext` was bound when mujoco was first imported, before the line above.
            from mujoco.egl import GLContext
        else:
            from mujoco import GLContext
        return GLContext(columns, rows)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise RenderingUnavailableError(
            f"cannot render offscreen with MUJOCO_GL={backend} ({type(error).__name__}: {error}); install Mesa's EGL: "
            "apt-get install libegl1 libgl1-mesa-dri"
        ) from error
