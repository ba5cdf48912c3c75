"""Rigid motions in three dimensions: labels from poses, paths from labels, and how far two ends lie apart.

A delta is a label [dyaw, dpitch, droll, tx, ty, tz] in rad and m, in the axes of the earlier pose. Angles of a pose
stand in the order roll, yaw, pitch, and R = Rx(roll) @ Ry(pitch) @ Rz(yaw) with right-handed single-axis matrices.
Everything here is computed in float64.

Legend: T poses, N motions.
Source: spec/training.md 0 (convention), 4.1 (labels), 4.7 (integration and metrics).
"""

from __future__ import annotations

import numpy as np

_GIMBAL = 4 * np.finfo(np.float64).eps  # below this cosine of the pitch, roll and yaw turn about one axis


def rotations_of_angles(roll_yaw_pitch_rad: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] of angles [..., 3]."""
    angles = np.asarray(roll_yaw_pitch_rad, np.float64)
    (sr, sy, sp), (cr, cy, cp) = np.moveaxis(np.sin(angles), -1, 0), np.moveaxis(np.cos(angles), -1, 0)
    rows = (
        (cp * cy, -cp * sy, sp),
        (cr * sy + sr * sp * cy, cr * cy - sr * sp * sy, -sr * cp),
        (sr * sy - cr * sp * cy, sr * cy + cr * sp * sy, cr * cp),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


def angles_of_rotations(rotations: np.ndarray) -> np.ndarray:
    """Angles roll, yaw, pitch [..., 3] of rotation matrices [..., 3, 3], each in [-pi, pi].

    Where the pitch is a right angle, roll is 0 and the yaw carries the whole turn.
    """
    r = np.asarray(rotations, np.float64)
    cosine = np.hypot(r[..., 2, 2], r[..., 1, 2])
    is_regular = cosine > _GIMBAL
    yaw = np.where(is_regular, np.arctan2(-r[..., 0, 1], r[..., 0, 0]), np.arctan2(r[..., 1, 0], r[..., 1, 1]))
    roll = np.where(is_regular, np.arctan2(-r[..., 1, 2], r[..., 2, 2]), 0.0)
    return np.stack([roll, yaw, np.arctan2(r[..., 0, 2], cosine)], -1)


def deltas_of_poses(positions_T3_m: np.ndarray, roll_yaw_pitch_T3_rad: np.ndarray) -> np.ndarray:
    """Labels of a path: float64 [T, 6]; row 0 is zero, row t is the motion from pose t-1 to t."""
    positions, rotations = np.asarray(positions_T3_m, np.float64), rotations_of_angles(roll_yaw_pitch_T3_rad)
    deltas = np.zeros((len(positions), 6))
    into_previous = rotations[:-1].swapaxes(-1, -2)
    deltas[1:, :3] = angles_of_rotations(into_previous @ rotations[1:])[:, [1, 2, 0]]
    deltas[1:, 3:] = np.einsum("tij,tj->ti", into_previous, np.diff(positions, axis=0))
    return deltas


def integrate_deltas(
    deltas_N6: np.ndarray, position_m: np.ndarray | None = None, rotation: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Path of a sequence of motions: translate in the old axes, then turn.

    Args:
        deltas_N6: labels, rad and m.
        position_m, rotation: the first pose; None is the origin, looking along x.

    Returns:
        Positions float64 [N+1, 3] in m and rotations float64 [N+1, 3, 3]; row 0 is the first pose.
    """
    deltas = np.asarray(deltas_N6, np.float64)
    turns = rotations_of_angles(deltas[:, [2, 0, 1]])
    positions, rotations = np.zeros((len(deltas) + 1, 3)), np.empty((len(deltas) + 1, 3, 3))
    rotations[0] = np.eye(3) if rotation is None else rotation
    if position_m is not None:
        positions[0] = position_m
    for t, (delta, turn) in enumerate(zip(deltas, turns, strict=True)):
        positions[t + 1] = positions[t] + rotations[t] @ delta[3:]
        rotations[t + 1] = rotations[t] @ turn
    return positions, rotations


def angle_between_deg(rotation: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Angle of the turn between two rotations [..., 3, 3], in degrees, 0 to 180."""
    trace = np.einsum("...ij,...ij->...", np.asarray(rotation, np.float64), np.asarray(other, np.float64))
    return np.degrees(np.arccos(np.clip((trace - 1) / 2, -1.0, 1.0)))


def yaw_error_deg(rotation: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Circular difference of the yaws of two rotations [..., 3, 3], in degrees, 0 to 180."""
    difference = angles_of_rotations(rotation)[..., 1] - angles_of_rotations(other)[..., 1]
    return np.degrees(np.abs(np.arctan2(np.sin(difference), np.cos(difference))))
