"""The path of one action chunk in the world, by how much of it was consumed.

Progress counts actions: 0 at the pose at which the chunk's last frame was taken, N when all N actions are flown; it may
lie between. A path is straight from one pose to the next.

Legend: N actions; poses and velocities [4] are x, y, z, yaw (ENU; m, rad; m/s, rad/s).
"""

from __future__ import annotations

import numpy as np

from worldvln_edge.ros_bridge.conversions import actions_to_steps, integrate_steps

_SEARCH_PER_ACTION = 8


class ChunkPath:
    """
    Args:
        start_4: pose at progress 0.
        actions_N6: cm, deg (spec/session_protocol.md 3).
        fps: actions a second at full speed.
    """

    def __init__(self, start_4: np.ndarray, actions_N6: np.ndarray, fps: float):
        self.poses_N4 = integrate_steps(start_4, actions_to_steps(actions_N6))
        self.length = len(self.poses_N4) - 1
        self.fps = fps
        self._steps_N4 = np.diff(self.poses_N4, axis=0)
        self._metres_N = np.linalg.norm(self._steps_N4[:, :3], axis=1)
        self._turns_N = np.abs(self._steps_N4[:, 3])

    def pose_at(self, progress: float) -> np.ndarray:
        """[4]; progress outside of 0..N counts as the nearer end."""
        index, share = self._place(progress)
        return self.poses_N4[index] + share * self._steps_N4[index]

    def velocity_at(self, progress: float) -> np.ndarray:
        """[4] at full speed."""
        index, _ = self._place(progress)
        return self._steps_N4[index] * self.fps

    def remaining(self, progress: float) -> tuple[float, float]:
        """Metres and radians from here to the end, along the path."""
        index, share = self._place(progress)
        metres = float(self._metres_N[index] * (1 - share) + self._metres_N[index + 1 :].sum())
        turns = float(self._turns_N[index] * (1 - share) + self._turns_N[index + 1 :].sum())
        return metres, turns

    def nearest_progress(self, position_3: np.ndarray, at_most: float) -> float:
        """Where on the path, up to progress `at_most`, a drone at `position_3` is; the earliest of equal ones."""
        end = min(max(at_most, 0.0), float(self.length))
        candidates = np.linspace(0.0, end, max(2, int(end * _SEARCH_PER_ACTION) + 1))
        places = np.array([self.pose_at(candidate)[:3] for candidate in candidates])
        distances = np.linalg.norm(places - position_3, axis=1)
        return float(candidates[int(np.argmin(distances.round(6)))])

    def _place(self, progress: float) -> tuple[int, float]:
        progress = min(max(progress, 0.0), float(self.length))
        index = min(int(progress), self.length - 1)
        return index, progress - index
