"""Poses, actions and how an action moves a pose.

A pose is [x, y, z, roll, yaw, pitch] in cm and deg: x forward at yaw 0, y right, z up; yaw turns x towards y.
An action is [dx, dy, dz, droll, dyaw, dpitch] in cm and deg: dx, dy in the body's axes, dz up.
A delta is the network's label [dyaw, dpitch, droll, tx, ty, tz] in rad and m, in the axes of the earlier pose.
Source: spec/session_protocol.md 3; spec/action_decoder.md 5; spec/training.md 0, 4.1, 4.7.
"""

from typing import Literal

import numpy as np

POSE_ORDER = ("x", "y", "z", "roll", "yaw", "pitch")
ACTION_ORDER = ("dx", "dy", "dz", "droll", "dyaw", "dpitch")
ACTION_UNITS = ("cm", "cm", "cm", "deg", "deg", "deg")

BodyOrder = Literal["trans_first", "yaw_first", "midpoint"]
_HEADING_SHARE = {"trans_first": 0.0, "midpoint": 0.5, "yaw_first": 1.0}


def wrap_deg(angle_deg):
    """Wrap degrees to [-180, 180). Takes a number or an array."""
    return (np.asarray(angle_deg) + 180.0) % 360.0 - 180.0


def apply_action(pose: np.ndarray, action: np.ndarray, *, order: BodyOrder = "trans_first") -> np.ndarray:
    """Pose after one flown action: x, y, z and yaw move, roll and pitch keep their values; yaw is not wrapped.

    Args:
        pose: [6] cm, deg.
        action: [6] cm, deg, body frame.
        order: which heading the translation uses. `trans_first` (the labels' own rule) the one before the turn.

    Returns:
        float64 [6].
    """
    x, y, z, roll, yaw, pitch = (float(v) for v in pose)
    dx, dy, dz, _, dyaw, _ = (float(v) for v in action)
    heading = np.radians(yaw + _HEADING_SHARE[order] * dyaw)
    cos, sin = np.cos(heading), np.sin(heading)
    return np.array([x + dx * cos - dy * sin, y + dx * sin + dy * cos, z + dz, roll, yaw + dyaw, pitch])


def integrate_actions(pose: np.ndarray, actions_N6: np.ndarray, *, order: BodyOrder = "trans_first") -> np.ndarray:
    """Poses after each action: float64 [N, 6]; the start pose is not included."""
    poses = []
    for action in actions_N6:
        pose = apply_action(pose, action, order=order)
        poses.append(pose)
    return np.array(poses, np.float64).reshape(-1, 6)


def actions_between(poses_T6: np.ndarray) -> np.ndarray:
    """Actions that lead from each pose to the next (inverse of `integrate_actions`): float64 [T-1, 6]."""
    poses = np.asarray(poses_T6, np.float64)
    step = np.diff(poses, axis=0)
    heading = np.radians(poses[:-1, 4])
    cos, sin = np.cos(heading), np.sin(heading)
    actions = np.empty((len(step), 6))
    actions[:, 0] = step[:, 0] * cos + step[:, 1] * sin
    actions[:, 1] = -step[:, 0] * sin + step[:, 1] * cos
    actions[:, 2] = step[:, 2]
    actions[:, 3:] = wrap_deg(step[:, 3:])
    return actions


def deltas_to_actions(deltas_N6: np.ndarray) -> np.ndarray:
    """Network deltas [dyaw, dpitch, droll, tx, ty, tz] (rad, m) to actions (cm, deg): float32 [N, 6]."""
    deltas = np.asarray(deltas_N6, np.float32)
    translation = np.float32(100.0) * deltas[..., 3:6]
    return np.concatenate([translation, np.degrees(deltas[..., [2, 0, 1]])], axis=-1).astype(np.float32)


def actions_to_deltas(actions_N6: np.ndarray) -> np.ndarray:
    """Actions (cm, deg) to network deltas (rad, m): float32 [N, 6]."""
    actions = np.asarray(actions_N6, np.float64)
    return np.concatenate([np.radians(actions[..., [4, 5, 3]]), actions[..., :3] / 100.0], axis=-1).astype(np.float32)
