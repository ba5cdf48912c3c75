"""Setpoints as poses: where the bounded velocities so far have led, for an autopilot that is told where to be.

The pose moves as the velocities say, so it has no jump at a chunk's border and its acceleration is theirs. It is never
further from the drone than a little, and never outside of the box that the drone has to stay in.

Legend: poses [4] are x, y, z, yaw (ENU; m, rad).
"""

from __future__ import annotations

import numpy as np

from worldvln_edge.ros_bridge.setpoints.limits import LimitsConfig


class PoseReference:
    """
    Args:
        limits: of them, the box.
        max_lead_m, max_lead_rad: how far the pose may run ahead of the drone.
    """

    def __init__(self, limits: LimitsConfig, max_lead_m: float, max_lead_rad: float):
        self._low_3 = np.array(limits.geofence_min_m, np.float64)
        self._low_3[2] = max(self._low_3[2], limits.min_height_m)
        self._high_3 = np.array(limits.geofence_max_m, np.float64)
        self._max_lead_m, self._max_lead_rad = max_lead_m, max_lead_rad
        self._pose_4: np.ndarray | None = None

    @property
    def pose_4(self) -> np.ndarray | None:
        """None before `settle` or `advance`."""
        return self._pose_4

    def settle(self, here_4: np.ndarray) -> None:
        """From now on stay where the drone is."""
        self._pose_4 = np.array(here_4, np.float64)

    def forget(self) -> None:
        """Nothing is published any more: the next pose starts where the drone will be then."""
        self._pose_4 = None

    def advance(self, velocity_4: np.ndarray, seconds: float, here_4: np.ndarray) -> None:
        """Move on for one tick; `here_4` is where the drone is."""
        before_4 = here_4 if self._pose_4 is None else self._pose_4
        lead_4 = before_4 + velocity_4 * seconds - here_4
        length = float(np.linalg.norm(lead_4[:3]))
        if length > self._max_lead_m:
            lead_4[:3] *= self._max_lead_m / length
        lead_4[3] = min(max(lead_4[3], -self._max_lead_rad), self._max_lead_rad)
        pose_4 = here_4 + lead_4
        # A drone that is outside, or still below the least height, is not told to go anywhere by this.
        pose_4[:3] = np.clip(pose_4[:3], np.minimum(self._low_3, here_4[:3]), np.maximum(self._high_3, here_4[:3]))
        self._pose_4 = pose_4
