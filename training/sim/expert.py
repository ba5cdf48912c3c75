"""The expert: where it flies for a task, as 49 poses (48 steps at 16 Hz).

Motions that the text describes alone (forward, turn, climb) are one body-frame total spread over the steps; motions
around a landmark are drawn in the world. All use the same smooth profile: ease in, cruise, ease out at the last step.
Source: spec/training.md 8.6; spec/session_protocol.md 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldvln_edge.poses import integrate_actions, wrap_deg
from worldvln_edge.training.sim.coordinates import heading_axes

EXPERT_STEPS = 48
APPROACH_STANDOFF_M = 3.0
"""An approach ends this far from the landmark's centre, measured on the ground."""
PASS_OFFSET_M = 2.6
"""A pass goes by at this distance from the landmark's centre."""
PASS_BEYOND_M = 2.5
"""A pass ends this far behind the landmark."""

_EASE_IN, _EASE_OUT = 4, 7

# Sign of (x, y, z, yaw) per kind; the first number multiplies the distance, the last the angle.
_BODY_MOTIONS: dict[str, tuple[float, float, float, float]] = {
    "forward": (1, 0, 0, 0),
    "backward": (-1, 0, 0, 0),
    "strafe_left": (0, -1, 0, 0),
    "strafe_right": (0, 1, 0, 0),
    "climb": (0, 0, 1, 0),
    "descend": (0, 0, -1, 0),
    "turn_left": (0, 0, 0, -1),
    "turn_right": (0, 0, 0, 1),
    "forward_turn_left": (1, 0, 0, -1),
    "forward_turn_right": (1, 0, 0, 1),
    "climb_turn_left": (0, 0, 1, -1),
    "climb_turn_right": (0, 0, 1, 1),
}


@dataclass(frozen=True)
class Goal:
    """What the expert flies: a kind, the text's numbers, and the landmark's centre where the kind has one."""

    kind: str
    magnitude: tuple[float, ...] = ()
    landmark_m: np.ndarray | None = None  # float64 [3]


def motion_profile(steps: int = EXPERT_STEPS) -> np.ndarray:
    """Share of the motion done after each step, 0 at the start and 1 at the end: float64 [steps + 1]."""
    speed = np.ones(steps)
    speed[:_EASE_IN] = np.sin(np.pi / 2 * (np.arange(_EASE_IN) + 0.5) / _EASE_IN)
    speed[-_EASE_OUT:] = np.sin(np.pi / 2 * (np.arange(_EASE_OUT)[::-1] + 0.5) / _EASE_OUT)
    return np.concatenate([[0.0], np.cumsum(speed)]) / speed.sum()


def expert_path(start_cm_deg: np.ndarray, goal: Goal) -> np.ndarray:
    """Poses of the expert, start included: float64 [49, 6], cm and deg; yaw is not wrapped.

    Raises:
        ValueError: an unknown kind, a missing landmark, or numbers that the kind does not take.
    """
    start = np.asarray(start_cm_deg, np.float64)
    if goal.kind in _BODY_MOTIONS:
        return _body_path(start, goal)
    if goal.landmark_m is None:
        raise ValueError(f"a task of kind {goal.kind!r} needs the position of its landmark")
    if goal.kind == "approach":
        return _approach(start, goal.landmark_m)
    if goal.kind == "face":
        return _face(start, goal.landmark_m)
    if goal.kind in ("pass_left", "pass_right"):
        return _pass(start, goal.landmark_m, side=-1.0 if goal.kind == "pass_left" else 1.0)
    if goal.kind in ("circle_clockwise", "circle_counterclockwise"):
        (angle,) = goal.magnitude
        return _circle(start, goal.landmark_m, angle if goal.kind == "circle_clockwise" else -angle)
    raise ValueError(f"the expert cannot fly a task of kind {goal.kind!r}")


def _body_path(start: np.ndarray, goal: Goal) -> np.ndarray:
    signs = np.array(_BODY_MOTIONS[goal.kind])
    numbers = list(goal.magnitude)
    if len(numbers) != int(signs[:3].any()) + int(signs[3] != 0):
        raise ValueError(f"a task of kind {goal.kind!r} cannot have the magnitude {goal.magnitude}")
    angle = signs[3] * numbers.pop() if signs[3] else 0.0
    total = np.zeros(6)
    total[:3] = signs[:3] * 100.0 * (numbers[0] if numbers else 0.0)
    total[4] = angle
    actions = np.diff(motion_profile())[:, None] * total
    return np.concatenate([start[None], integrate_actions(start, actions)])


def _approach(start: np.ndarray, landmark_m: np.ndarray) -> np.ndarray:
    share = motion_profile()
    to_landmark = 100.0 * landmark_m[:2] - start[:2]
    distance = np.linalg.norm(to_landmark)
    path = np.repeat(start[None], len(share), axis=0)
    path[:, :2] += share[:, None] * to_landmark * (1.0 - 100.0 * APPROACH_STANDOFF_M / distance)
    # Turned towards it after two thirds of the way: the landmark comes to the middle while there is still way to go.
    path[:, 4] += _smoothstep(1.5 * share) * _turn_towards(start, landmark_m)
    return path


def _face(start: np.ndarray, landmark_m: np.ndarray) -> np.ndarray:
    share = motion_profile()
    path = np.repeat(start[None], len(share), axis=0)
    path[:, 4] += share * _turn_towards(start, landmark_m)
    return path


def _pass(start: np.ndarray, landmark_m: np.ndarray, side: float) -> np.ndarray:
    share = motion_profile()
    turn = _turn_towards(start, landmark_m)
    along, right = heading_axes(start[4] + turn)
    distance = float(np.linalg.norm(100.0 * landmark_m[:2] - start[:2]))
    forward = share * (distance + 100.0 * PASS_BEYOND_M)
    # Fully to the side when still a little before the landmark, so that the widest place is beside it.
    sideways = side * 100.0 * PASS_OFFSET_M * _smoothstep(forward / (0.85 * distance))
    path = np.repeat(start[None], len(share), axis=0)
    path[:, :2] += forward[:, None] * along[:2] + sideways[:, None] * right[:2]
    path[:, 4] += _smoothstep(1.5 * share) * turn
    return path


def _circle(start: np.ndarray, landmark_m: np.ndarray, angle_deg: float) -> np.ndarray:
    turned = motion_profile() * angle_deg
    centre = 100.0 * landmark_m[:2]
    arm = start[:2] - centre
    # Yaw grows clockwise seen from above, so a clockwise orbit turns arm and heading by the same positive angle.
    cos, sin = np.cos(np.radians(turned)), np.sin(np.radians(turned))
    path = np.repeat(start[None], len(turned), axis=0)
    path[:, 0] = centre[0] + arm[0] * cos - arm[1] * sin
    path[:, 1] = centre[1] + arm[0] * sin + arm[1] * cos
    path[:, 4] += turned
    return path


def _turn_towards(pose: np.ndarray, landmark_m: np.ndarray) -> float:
    """Degrees to turn until the landmark is straight ahead, -180..180."""
    x, y = 100.0 * landmark_m[:2] - pose[:2]
    return float(wrap_deg(np.degrees(np.arctan2(y, x)) - pose[4]))


def _smoothstep(share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 0.0, 1.0)
    return share * share * (3.0 - 2.0 * share)
