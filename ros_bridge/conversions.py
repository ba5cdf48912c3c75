"""WorldVLN's poses and actions, and the frames and units that ROS and PX4 use.

    WorldVLN   cm, deg    world: x forward at yaw 0, y right, z up; yaw turns x towards y (clockwise seen from above)
    ROS        m, rad     world (REP-105 map, odom): x east, y north, z up; body (REP-103): forward, left, up;
                          yaw counter-clockwise, 0 looks east
    PX4        m, rad     world: north, east, down; body: forward, right, down; yaw clockwise, 0 looks north

WorldVLN's world is ROS's seen in a mirror: x stays, y changes its sign. So WorldVLN's yaw 0 looks along ROS's x. Every
function takes arrays with any leading axes. The sketch that goes with this: docs/ros.md, "Frames and units".
Source: spec/session_protocol.md 3; REP-103; REP-105.
"""

from __future__ import annotations

import math

import numpy as np

from worldvln_edge.rigid_motion import angles_of_rotations, rotations_of_angles

_M_PER_CM = 0.01
_MIRROR = np.array([1.0, -1.0, 1.0])
_FLIP_FRD = np.array([1.0, -1.0, -1.0])
_ENU_OF_NED = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
# Rows: optical right, down, forward in a body of forward, left, up.
_OPTICAL_OF_FLU = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])


def wrap_rad(angle_rad):
    """Wrap radians to [-pi, pi). Takes a number or an array."""
    return (np.asarray(angle_rad) + math.pi) % (2 * math.pi) - math.pi


def position_to_ros(position_cm: np.ndarray) -> np.ndarray:
    """Position [..., 3] (cm, WorldVLN's world) as ROS's x, y, z in m: float64 [..., 3]."""
    return np.asarray(position_cm, np.float64) * _MIRROR * _M_PER_CM


def position_from_ros(position_m: np.ndarray) -> np.ndarray:
    """Inverse of `position_to_ros`: cm."""
    return np.asarray(position_m, np.float64) * _MIRROR / _M_PER_CM


def yaw_to_ros(yaw_deg):
    """WorldVLN's yaw or yaw step (deg, clockwise) as ROS's (rad, counter-clockwise). Not wrapped."""
    return -np.radians(yaw_deg)


def yaw_from_ros(yaw_rad):
    """Inverse of `yaw_to_ros`: deg."""
    return -np.degrees(yaw_rad)


def pose_to_ros(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A pose [6] (cm, deg; roll, yaw, pitch) as position and orientation of ROS.

    Returns:
        Position float64 [3] in m and unit quaternion float64 [4], order x, y, z, w, with w >= 0.
    """
    pose = np.asarray(pose, np.float64)
    rotation = rotations_of_angles(np.radians(pose[3:])) * np.outer(_MIRROR, _MIRROR)
    return position_to_ros(pose[:3]), _quaternion_of_rotation(rotation)


def pose_from_ros(position_m: np.ndarray, orientation_xyzw: np.ndarray) -> np.ndarray:
    """Inverse of `pose_to_ros`: float64 [6], cm and deg, angles in [-180, 180].

    Raises:
        ValueError: the quaternion is no orientation (zero or not finite).
    """
    rotation = rotation_of_quaternion(orientation_xyzw) * np.outer(_MIRROR, _MIRROR)
    return np.concatenate([position_from_ros(position_m), np.degrees(angles_of_rotations(rotation))])


def yaw_of_quaternion(orientation_xyzw: np.ndarray) -> float:
    """ROS's yaw (rad) of an orientation: where its forward axis points, seen from above.

    Raises:
        ValueError: the quaternion is no orientation (zero or not finite).
    """
    rotation = rotation_of_quaternion(orientation_xyzw)
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def quaternion_of_yaw(yaw_rad: float) -> np.ndarray:
    """Orientation of a level body: float64 [4], order x, y, z, w."""
    return np.array([0.0, 0.0, math.sin(yaw_rad / 2), math.cos(yaw_rad / 2)])


def rotation_of_quaternion(orientation_xyzw: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a quaternion, which need not have length 1.

    Raises:
        ValueError: the quaternion is no orientation (zero or not finite).
    """
    x, y, z, w = (float(value) for value in orientation_xyzw)
    length = math.sqrt(x * x + y * y + z * z + w * w)
    if not math.isfinite(length) or length < 1e-6:
        raise ValueError(f"orientation {(x, y, z, w)} is no quaternion of a rotation; publish one of length 1")
    x, y, z, w = x / length, y / length, z / length, w / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def actions_to_steps(actions_N6: np.ndarray) -> np.ndarray:
    """Actions (cm, deg, body forward-right, world up) as body steps of ROS.

    Roll and pitch are not flown (spec/session_protocol.md 3), so they have no place in a step.

    Args:
        actions_N6: order dx, dy, dz, droll, dyaw, dpitch.

    Returns:
        float64 [N, 4]: forward, left, up in m, in the heading before the step, and the turn in rad that follows.
    """
    actions = np.asarray(actions_N6, np.float64)
    return np.concatenate([position_to_ros(actions[..., :3]), yaw_to_ros(actions[..., 4:5])], axis=-1)


def steps_to_actions(steps_N4: np.ndarray) -> np.ndarray:
    """Inverse of `actions_to_steps`: float64 [N, 6] with roll and pitch 0."""
    steps = np.asarray(steps_N4, np.float64)
    actions = np.zeros((*steps.shape[:-1], 6))
    actions[..., :3] = position_from_ros(steps[..., :3])
    actions[..., 4] = yaw_from_ros(steps[..., 3])
    return actions


def integrate_steps(start_4: np.ndarray, steps_N4: np.ndarray) -> np.ndarray:
    """Path of body steps: translate in the old heading, then turn.

    Args:
        start_4: x, y, z in m and yaw in rad, in ROS's world.
        steps_N4: see `actions_to_steps`.

    Returns:
        float64 [N+1, 4]: x, y, z, yaw; row 0 is the start. Yaw is not wrapped.
    """
    steps = np.asarray(steps_N4, np.float64).reshape(-1, 4)
    path = np.empty((len(steps) + 1, 4))
    path[0] = start_4
    path[1:, 3] = path[0, 3] + np.cumsum(steps[:, 3])
    cos, sin = np.cos(path[:-1, 3]), np.sin(path[:-1, 3])
    moves = np.stack([steps[:, 0] * cos - steps[:, 1] * sin, steps[:, 0] * sin + steps[:, 1] * cos, steps[:, 2]], -1)
    path[1:, :3] = path[0, :3] + np.cumsum(moves, axis=0)
    return path


def enu_to_ned(vector: np.ndarray) -> np.ndarray:
    """East, north, up as north, east, down [..., 3]; positions and velocities alike. Its own inverse."""
    return np.asarray(vector, np.float64)[..., [1, 0, 2]] * np.array([1.0, 1.0, -1.0])


def yaw_enu_to_ned(yaw_rad):
    """Yaw from east, counter-clockwise, as yaw from north, clockwise; in [-pi, pi). Its own inverse."""
    return wrap_rad(math.pi / 2 - np.asarray(yaw_rad))


def attitude_of_px4(q_wxyz: np.ndarray) -> np.ndarray:
    """PX4's attitude (forward-right-down body in NED; order w, x, y, z) as ROS's (forward-left-up body in ENU).

    Returns:
        Unit quaternion float64 [4], order x, y, z, w, with w >= 0.

    Raises:
        ValueError: the quaternion is no orientation (zero or not finite).
    """
    w, x, y, z = (float(value) for value in q_wxyz)
    rotation = rotation_of_quaternion(np.array([x, y, z, w]))
    return _quaternion_of_rotation(_ENU_OF_NED @ rotation @ np.diag(_FLIP_FRD))


def flu_to_frd(vector: np.ndarray) -> np.ndarray:
    """Forward, left, up as forward, right, down [..., 3]; turning rates too. Its own inverse."""
    return np.asarray(vector, np.float64) * _FLIP_FRD


def flu_to_optical(vector: np.ndarray) -> np.ndarray:
    """Forward, left, up as right, down, forward [..., 3]: the `_optical` frame of a camera that looks ahead."""
    return np.asarray(vector, np.float64) @ _OPTICAL_OF_FLU.T


def optical_to_flu(vector: np.ndarray) -> np.ndarray:
    """Inverse of `flu_to_optical`."""
    return np.asarray(vector, np.float64) @ _OPTICAL_OF_FLU


def _quaternion_of_rotation(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion x, y, z, w with w >= 0; the largest of the four is divided by, so none is lost to rounding."""
    r = rotation
    squares = np.array(
        [
            1 + r[0, 0] - r[1, 1] - r[2, 2],
            1 - r[0, 0] + r[1, 1] - r[2, 2],
            1 - r[0, 0] - r[1, 1] + r[2, 2],
            1 + r[0, 0] + r[1, 1] + r[2, 2],
        ]
    )
    columns = np.array(
        [
            [squares[0], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[2, 1] - r[1, 2]],
            [r[0, 1] + r[1, 0], squares[1], r[1, 2] + r[2, 1], r[0, 2] - r[2, 0]],
            [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], squares[2], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], squares[3]],
        ]
    )
    quaternion = columns[int(np.argmax(squares))]
    quaternion = quaternion / np.linalg.norm(quaternion)
    return -quaternion if quaternion[3] < 0 else quaternion
