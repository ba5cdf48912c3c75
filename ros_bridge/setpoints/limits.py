"""Limits that no setpoint may break, as the set of velocities that are allowed at a place.

Applied last, to whatever was wanted. The set is convex and always holds the zero velocity, so a setpoint can be moved
into it, and towards another one inside it, without leaving it.

Legend: velocities and positions [3] are x, y, z of the odometry's world (ENU, m), yaw rates rad/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

_BRAKING_SHARE = 0.5
"""Of the acceleration limit, for stopping in front of a wall. On each of three axes the allowed speed falls by this
share: sqrt(3) * 0.5 = 0.87 of the limit, which is never needed in full."""
_REACTION_S = 0.1
"""The longest time between two setpoints: nothing is allowed that reaches the wall before the next one."""


class LimitsError(ValueError):
    """Limits under which nothing can fly. The message says which, what was found and what is allowed."""


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that bounds a setpoint. Positions are those of the odometry; heights are its z."""

    geofence_min_m: tuple[float, float, float]
    geofence_max_m: tuple[float, float, float]
    """Corners of the box that the drone stays in."""
    min_height_m: float = 1.0
    """Nothing descends below; a drone that is below may not descend further."""
    max_speed_m_s: float = 2.0
    """Horizontal."""
    max_climb_m_s: float = 1.0
    max_descent_m_s: float = 0.7
    max_yaw_rate_rad_s: float = 0.8
    max_acceleration_m_s2: float = 2.0
    max_yaw_acceleration_rad_s2: float = 2.0
    geofence_tolerance_m: float = 0.5
    """A drone that lies further outside has been moved by something else: a latched fault."""

    def __post_init__(self) -> None:
        for name in (
            "max_speed_m_s",
            "max_climb_m_s",
            "max_descent_m_s",
            "max_yaw_rate_rad_s",
            "max_acceleration_m_s2",
            "max_yaw_acceleration_rad_s2",
            "geofence_tolerance_m",
        ):
            value = getattr(self, name)
            if not 0 < value < 100:
                raise LimitsError(f"limits.{name} must be over 0 and below 100, found {value:g}")
        corners = (*self.geofence_min_m, *self.geofence_max_m, self.min_height_m)
        if not all(math.isfinite(value) for value in corners):
            raise LimitsError("limits: geofence corners and min_height_m must be finite numbers")
        for axis, low, high in zip("xyz", self.geofence_min_m, self.geofence_max_m, strict=True):
            if not low < high:
                raise LimitsError(f"limits: the geofence is empty along {axis}: from {low:g} to {high:g} m")
        if self.min_height_m >= self.geofence_max_m[2]:
            raise LimitsError(
                f"limits.min_height_m {self.min_height_m:g} must lie below the geofence's top, "
                f"{self.geofence_max_m[2]:g} m"
            )

    def is_beyond_geofence(self, position_3: np.ndarray) -> bool:
        """Whether a place lies outside of the box by more than the tolerance."""
        low = np.array(self.geofence_min_m) - self.geofence_tolerance_m
        high = np.array(self.geofence_max_m) + self.geofence_tolerance_m
        return bool(np.any(position_3 < low) or np.any(position_3 > high))


@dataclass(frozen=True)
class AllowedVelocities:
    """A box of velocities, cut by the horizontal speed limit."""

    low_3: np.ndarray
    high_3: np.ndarray
    max_speed_m_s: float

    @classmethod
    def at(cls, position_3: np.ndarray, limits: LimitsConfig) -> AllowedVelocities:
        """What is allowed at a place: towards a wall of the box only what can still stop in front of it."""
        braking = _BRAKING_SHARE * limits.max_acceleration_m_s2
        floor = np.array(limits.geofence_min_m)
        floor[2] = max(floor[2], limits.min_height_m)
        room_below = np.maximum(position_3 - floor, 0.0)
        room_above = np.maximum(np.array(limits.geofence_max_m) - position_3, 0.0)
        largest = np.array([limits.max_speed_m_s, limits.max_speed_m_s, limits.max_climb_m_s])
        smallest = np.array([limits.max_speed_m_s, limits.max_speed_m_s, limits.max_descent_m_s])
        return cls(
            low_3=-np.minimum(smallest, _stoppable(room_below, braking)),
            high_3=np.minimum(largest, _stoppable(room_above, braking)),
            max_speed_m_s=limits.max_speed_m_s,
        )

    def confine(self, velocity_3: np.ndarray) -> np.ndarray:
        """The velocity if it is allowed, else one that is: each axis is cut, then the horizontal speed."""
        confined = np.clip(velocity_3, self.low_3, self.high_3)
        speed = math.hypot(confined[0], confined[1])
        if speed > self.max_speed_m_s:
            confined[:2] *= self.max_speed_m_s / speed
        return confined

    def contains(self, velocity_3: np.ndarray, tolerance: float = 1e-9) -> bool:
        return bool(
            np.all(velocity_3 >= self.low_3 - tolerance)
            and np.all(velocity_3 <= self.high_3 + tolerance)
            and math.hypot(velocity_3[0], velocity_3[1]) <= self.max_speed_m_s + tolerance
        )


def _stoppable(room_m: np.ndarray, braking_m_s2: float) -> np.ndarray:
    """Speed from which a drone that reacts late still stops within `room_m`: v reaction + v**2 / (2 braking) = room."""
    late = braking_m_s2 * _REACTION_S
    return np.sqrt(2 * braking_m_s2 * room_m + late * late) - late


def approach_velocity(
    now_3: np.ndarray, wanted_3: np.ndarray, allowed: AllowedVelocities, max_change: float
) -> np.ndarray:
    """The velocity that comes next: towards what is wanted, by at most `max_change`, and always allowed.

    Where the set has shrunk past the present velocity, entering it comes first and uses up the change.
    """
    inside, goal = allowed.confine(now_3), allowed.confine(wanted_3)
    left = max_change - float(np.linalg.norm(inside - now_3))
    step = goal - inside
    length = float(np.linalg.norm(step))
    if length <= max(left, 0.0):
        return goal
    return inside + step * (max(left, 0.0) / length)


def approach_rate(now: float, wanted: float, limit: float, max_change: float) -> float:
    """The same for a yaw rate."""
    goal = min(max(wanted, -limit), limit)
    return min(max(goal, now - max_change), now + max_change)
