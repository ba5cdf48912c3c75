"""A drone, chunks and a loop for the tests of the setpoint logic; every tick is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from worldvln_edge.ros_bridge.setpoints.limits import LimitsConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_logic import Setpoint, SetpointLogic

LIMITS = LimitsConfig(geofence_min_m=(-20, -20, 0), geofence_max_m=(20, 20, 12))


def forward_chunk(cm: float = 5.0, *, count: int = 16, turn_deg: float = 0.0) -> np.ndarray:
    """Equal actions ahead: float64 [count, 6]."""
    actions = np.zeros((count, 6))
    actions[:, 0], actions[:, 4] = cm, turn_deg
    return actions


@dataclass
class Flight:
    """A drone that flies every setpoint exactly, with a policy that beats at every tick unless told otherwise."""

    limits: LimitsConfig = LIMITS
    config: SetpointConfig = field(default_factory=SetpointConfig)
    position: np.ndarray = field(default_factory=lambda: np.array([0.0, 0.0, 3.0]))
    yaw: float = 0.0
    now_s: float = 100.0
    effort: float = 1.0
    """Share of every velocity that the drone reaches."""

    def __post_init__(self) -> None:
        self.logic = SetpointLogic(self.config, self.limits)
        self.logic.odometry(self.position, self.yaw, self.now_s)
        self.ticks: list[tuple[float, Setpoint, np.ndarray]] = []
        """Time, setpoint, and where the drone was."""
        self._chunks = 0

    def send(self, actions: np.ndarray, *, age_s: float = 0.0, fps: float = 16.0) -> str | None:
        self._chunks += 1
        return self.logic.chunk(self._chunks, actions, fps=fps, seen_s=self.now_s - age_s, now_s=self.now_s)

    def tick(self, seconds: float = 0.025, *, alive: bool = True, odometry: bool = True) -> Setpoint:
        self.now_s += seconds
        if self.ticks and self.ticks[-1][1].mode != "silent":
            last = self.ticks[-1][1]
            self.position = self.position + self.effort * np.array(last.velocity_m_s) * seconds
            self.yaw += last.yaw_rate_rad_s * seconds
        if odometry:
            self.logic.odometry(self.position, self.yaw, self.now_s)
        if alive:
            self.logic.policy_alive(self.now_s, self.now_s)
        setpoint = self.logic.tick(self.now_s)
        self.ticks.append((self.now_s, setpoint, self.position.copy()))
        return setpoint

    def fly(self, seconds: float, period_s: float = 0.025, **options: bool) -> list[Setpoint]:
        return [self.tick(period_s, **options) for _ in range(round(seconds / period_s))]

    def accelerations(self) -> np.ndarray:
        """Between each two setpoints that follow each other, m/s2; a hold that came at once counts as none."""
        result = []
        for (before_s, before, _), (now_s, now, _) in zip(self.ticks, self.ticks[1:], strict=False):
            is_brake = now.mode != "fly" and now.reason != "the chunk is used up"
            change = np.linalg.norm(np.subtract(now.velocity_m_s, before.velocity_m_s))
            result.append(0.0 if is_brake else change / min(now_s - before_s, 0.1))
        return np.array(result)
