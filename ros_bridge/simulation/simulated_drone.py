"""A drone in the simulator that flies velocity setpoints exactly, one step of time after another.

Legend: velocities [4] are x, y, z, yaw rate of the odometry's world (ENU; m/s, rad/s).
"""

from __future__ import annotations

import math

import numpy as np

from worldvln_edge.ros_bridge.conversions import steps_to_actions, yaw_to_ros
from worldvln_edge.ros_bridge.simulation.simulator_client import SimulatedView, SimulatorClient
from worldvln_edge.tasks import Task

STILL = np.zeros(4)


class SimulatedDrone:
    """
    Attributes:
        view: what it sees, where it is; only after `reset`.
        velocity_4: flown in the last step.
        has_collided: since `reset`.
    """

    view: SimulatedView

    def __init__(self, client: SimulatorClient):
        self._client = client
        self.velocity_4 = STILL
        self.has_collided = False

    def reset(self, task: Task) -> None:
        """Stand still at the start of a task. Raises SimulatorError."""
        self.view, self.velocity_4, self.has_collided = self._client.reset(task), STILL, False

    def fly(self, velocity_4: np.ndarray, seconds: float) -> None:
        """Move for a time with a constant velocity. Raises SimulatorError."""
        yaw = float(yaw_to_ros(self.view.pose[4]))
        x, y, z, turn = (float(value) * seconds for value in velocity_4)
        ahead = x * math.cos(yaw) + y * math.sin(yaw)
        left = y * math.cos(yaw) - x * math.sin(yaw)
        self.view = self._client.step(steps_to_actions(np.array([ahead, left, z, turn])))
        self.velocity_4 = np.asarray(velocity_4, np.float64)
        self.has_collided |= self.view.has_collided
