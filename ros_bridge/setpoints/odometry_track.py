"""Where the drone was during the last seconds: odometry is checked, and kept so that a chunk can start at its frame.

Legend: poses [4] are x, y, z, yaw (ENU; m, rad). Times are monotonic seconds.
"""

from __future__ import annotations

from bisect import bisect_left

import msgspec
import numpy as np

from worldvln_edge.ros_bridge.conversions import wrap_rad

_JUMP_RAD, _TURNING_RAD_S = 0.5, 4.0
"""A heading that changes by more than the first and what a drone turns by hand in between, was reset by the estimator:
the world of the chunk that is flown is another one."""


class OdometryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    stale_after_s: float = 0.2
    """Without odometry for so long the drone holds."""
    max_jump_m: float = 1.0
    """A pose that lies further from the last than the drone can have flown, by this much, is a latched fault."""
    memory_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("stale_after_s", "max_jump_m", "memory_s"):
            if not 0 < getattr(self, name) < 60:
                raise ValueError(f"odometry.{name} must be over 0 and below 60, found {getattr(self, name):g}")


class OdometryTrack:
    def __init__(self, config: OdometryConfig, max_speed_m_s: float):
        self.config = config
        self._max_speed_m_s = max_speed_m_s
        self._times: list[float] = []
        self._poses: list[np.ndarray] = []
        self._is_finite = True

    def push(self, position_3: np.ndarray, yaw_rad: float, now_s: float) -> bool:
        """Take a pose in; False if it lies further off than the drone can have flown or turned (it is taken all the
        same)."""
        pose = np.array([*position_3, yaw_rad], np.float64)
        self._is_finite = bool(np.isfinite(pose).all())
        if not self._is_finite or (self._times and now_s < self._times[-1]):
            return True
        is_plausible = True
        if self._times:
            last, seconds = self._poses[-1], now_s - self._times[-1]
            # Twice the speed limit: an overshoot is the autopilot's, and no fault of the odometry.
            reach = 2 * self._max_speed_m_s * seconds + self.config.max_jump_m
            turned = float(wrap_rad(pose[3] - last[3]))
            is_plausible = bool(np.linalg.norm(pose[:3] - last[:3]) <= reach)
            is_plausible = is_plausible and abs(turned) <= _JUMP_RAD + _TURNING_RAD_S * seconds
            pose[3] = last[3] + turned
            if not is_plausible:
                self._times.clear()  # nothing is interpolated across a jump
                self._poses.clear()
        self._times.append(now_s)
        self._poses.append(pose)
        keep = bisect_left(self._times, now_s - self.config.memory_s)
        del self._times[:keep], self._poses[:keep]
        return is_plausible

    def why_unusable(self, now_s: float) -> str | None:
        """What is wrong with the odometry now; None if nothing is."""
        if not self._is_finite:
            return "odometry is not finite"
        if not self._times:
            return "no odometry yet"
        age_s = now_s - self._times[-1]
        return f"odometry is {age_s:.2f} s old" if age_s > self.config.stale_after_s else None

    @property
    def has_pose(self) -> bool:
        """Whether a finite pose has come yet."""
        return bool(self._times)

    @property
    def newest(self) -> np.ndarray:
        """The last finite pose [4]; there must be one (`has_pose`)."""
        return self._poses[-1]

    def at(self, time_s: float) -> np.ndarray | None:
        """Pose [4] at a past time, between the two that enclose it; None if it is not covered.

        Up to `stale_after_s` behind the newest, that one counts.
        """
        after = bisect_left(self._times, time_s)
        if after == len(self._times):
            is_recent = bool(self._times) and time_s - self._times[-1] <= self.config.stale_after_s
            return self._poses[-1] if is_recent else None
        if after == 0:
            return self._poses[0] if self._times[0] - time_s <= self.config.stale_after_s else None
        share = (time_s - self._times[after - 1]) / (self._times[after] - self._times[after - 1])
        return self._poses[after - 1] + share * (self._poses[after] - self._poses[after - 1])
