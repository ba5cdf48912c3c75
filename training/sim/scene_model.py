"""A scene as a MuJoCo model: what the camera sees and what the drone can hit.

The model is MJCF text with its textures as PNG bytes in memory; nothing is written to disk.
Legend: G solids of the scene, in the order of `Scene.solids`.
Source: spec/training.md 8.1; spec/session_protocol.md 3 (handedness: `coordinates.py`).
"""

from __future__ import annotations

from functools import lru_cache

import mujoco
import numpy as np

from worldvln_edge.training.sim.coordinates import mirror_y, mujoco_position
from worldvln_edge.training.sim.scene import TILE_M, Scene, build_scene
from worldvln_edge.training.sim.solids import solid_mesh
from worldvln_edge.training.sim.textures import encode_png

DRONE_RADIUS_M = 0.3
_DRONE_GROUP = 3  # MuJoCo does not draw geom groups 3 to 5 unless asked: the camera sits inside the sphere


class SceneModel:
    """Compiled scene with distance and line-of-sight queries. Not thread-safe: it owns one `MjData`."""

    def __init__(self, scene: Scene):
        self.scene = scene
        assets = {f"{name}.png": encode_png(texture) for name, texture in scene.textures.items()}
        self.model = mujoco.MjModel.from_xml_string(scene_mjcf(scene), assets)
        self.data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, self.data)
        self._solid_geoms = [self.model.geom(f"solid{i}").id for i in range(len(scene.solids))]
        self._drone_geom = self.model.geom("drone").id
        self._low_G3 = np.array([solid.low_m for solid in scene.solids])
        self._high_G3 = np.array([solid.high_m for solid in scene.solids])

    def clearance_m(self, pose_cm_deg: np.ndarray, limit_m: float = 1.0) -> float:
        """Free space around the drone's sphere at a pose: m, at most `limit_m`; negative inside something.

        The world's border counts as a wall.
        """
        point = np.asarray(pose_cm_deg, np.float64)[:3] / 100.0
        border = np.array([*(self.scene.half_size_m - np.abs(point[:2])), self.scene.ceiling_m - point[2]]).min()
        free = min(limit_m, float(border) - DRONE_RADIUS_M)
        outside = np.maximum(np.maximum(self._low_G3 - point, point - self._high_G3), 0.0)
        near = np.flatnonzero(np.linalg.norm(outside, axis=1) - DRONE_RADIUS_M < free)
        self.data.geom_xpos[self._drone_geom] = mujoco_position(pose_cm_deg)
        for i in near:
            distance = mujoco.mj_geomDistance(
                self.model, self.data, self._drone_geom, self._solid_geoms[i], limit_m, None
            )
            free = min(free, float(distance))
        return free

    def path_clearance_m(self, poses_T6: np.ndarray, limit_m: float = 1.0, stop_below_m: float = -np.inf) -> float:
        """Smallest clearance over poses; returns early once it falls below `stop_below_m`."""
        smallest = limit_m
        for pose in poses_T6:
            smallest = min(smallest, self.clearance_m(pose, limit_m))
            if smallest < stop_below_m:
                break
        return smallest

    def first_hit(self, from_m: np.ndarray, to_m: np.ndarray) -> int:
        """Index of the first solid on the ray from one point through another (project axes, m); -1 if it hits none."""
        start, direction = mirror_y(from_m), mirror_y(np.asarray(to_m) - np.asarray(from_m))
        drawn_groups = np.array([1, 0, 0, 0, 0, 0], np.uint8)
        hit = np.full(1, -1, np.int32)
        mujoco.mj_ray(
            self.model, self.data, start, direction / np.linalg.norm(direction), drawn_groups, 1, -1, hit, None
        )
        return self._solid_geoms.index(int(hit[0])) if hit[0] >= 0 else -1


@lru_cache(maxsize=4)
def load_scene_model(family: str, seed: int) -> SceneModel:
    """The compiled scene, kept for the last few scenes because several tasks share one."""
    return SceneModel(build_scene(family, seed))


def scene_mjcf(scene: Scene) -> str:
    """MJCF text of a scene; textures are referred to as `<name>.png`."""
    horizon, zenith = (_rgb(colour) for colour in scene.sky)
    assets = [f'<texture type="skybox" builtin="gradient" rgb1="{zenith}" rgb2="{horizon}" width="64" height="64"/>']
    for name in scene.textures:
        emission = 0.25 if name.startswith("landmark") else 0.1
        assets.append(f'<texture name="{name}" type="2d" file="{name}.png"/>')
        assets.append(
            f'<material name="{name}" texture="{name}" specular="0" shininess="0" reflectance="0"'
            f' emission="{emission}"/>'
        )
    geoms = []
    for i, solid in enumerate(scene.solids):
        mesh = solid_mesh(solid.shape, solid.size_m)
        # Every solid starts elsewhere in its tile, so that equal facades do not look equal.
        shift = np.array([0.37 * i % 1.0, 0.0])
        assets.append(
            f'<mesh name="solid{i}" vertex="{_numbers(mesh.vertices)}"'
            f' normal="{_numbers(mesh.normals)}" texcoord="{_numbers(mesh.texcoords_m / TILE_M + shift)}"'
            f' face="{_numbers(mesh.faces)}"/>'
        )
        geoms.append(
            f'<geom name="solid{i}" type="mesh" mesh="solid{i}" material="{solid.texture}" group="0"'
            f' contype="0" conaffinity="0" pos="{_numbers(mirror_y(np.array(solid.base_m)))}"/>'
        )
    newline = "\n    "
    return f"""<mujoco model="{scene.family}-{scene.seed}">
  <compiler balanceinertia="true"/>
  <statistic extent="1" center="0 0 0"/>
  <visual>
    <map znear="0.05" zfar="200"/>
    <quality shadowsize="0" offsamples="0" numslices="8" numstacks="4" numquads="1"/>
    <headlight ambient="0.5 0.5 0.5" diffuse="0.15 0.15 0.15" specular="0 0 0"/>
  </visual>
  <asset>
    {newline.join(assets)}
  </asset>
  <worldbody>
    <light type="directional" dir="0.5 0.35 -0.8" diffuse="0.45 0.45 0.45" specular="0 0 0" castshadow="false"/>
    <camera name="eye" pos="0 0 2"/>
    {newline.join(geoms)}
    <body name="drone" mocap="true">
      <geom name="drone" type="sphere" size="{DRONE_RADIUS_M}" group="{_DRONE_GROUP}" contype="0" conaffinity="0"/>
    </body>
  </worldbody>
</mujoco>
"""


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in np.asarray(values).ravel())


def _rgb(colour: tuple[int, int, int]) -> str:
    return " ".join(f"{channel / 255:.4f}" for channel in colour)
