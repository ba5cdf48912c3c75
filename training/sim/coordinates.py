"""The one place where the project's left-handed world meets MuJoCo's right-handed one.

Project: x forward at yaw 0, y to the RIGHT, z up, yaw turns x towards y (clockwise from above), cm and deg in poses.
MuJoCo: x forward, y to the LEFT, z up, counter-clockwise, m. The two are mirror images: y changes its sign.
Source: spec/session_protocol.md 3.
"""

import numpy as np


def mirror_y(points_m: np.ndarray) -> np.ndarray:
    """Points [..., 3] in m from either world to the other (the map is its own inverse)."""
    return np.asarray(points_m, np.float64) * (1.0, -1.0, 1.0)


def mujoco_position(pose_cm_deg: np.ndarray) -> np.ndarray:
    """Position of a pose in MuJoCo's world: float64 [3], m."""
    return mirror_y(np.asarray(pose_cm_deg, np.float64)[:3] / 100.0)


def heading_axes(yaw_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (forward, right) of a heading in the project's world: float64 [3] each."""
    cos, sin = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    return np.array([cos, sin, 0.0]), np.array([-sin, cos, 0.0])


def mujoco_camera_axes(yaw_deg: float, pitch_down_deg: float) -> np.ndarray:
    """Rotation matrix of a level camera in MuJoCo's world: float64 [3, 3], columns right, up, backward.

    Args:
        yaw_deg: the pose's heading, project convention.
        pitch_down_deg: how far the camera looks below the horizon.
    """
    forward, right = heading_axes(yaw_deg)
    down = np.radians(pitch_down_deg)
    look = mirror_y(forward * np.cos(down) - np.array([0.0, 0.0, np.sin(down)]))
    right = mirror_y(right)
    return np.stack([right, np.cross(right, look), -look], axis=1)
