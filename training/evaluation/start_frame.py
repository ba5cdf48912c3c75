"""The frame that plots are drawn in: the drone starts at (0, 0) and looks up; right is right.

Legend: world positions in m (x forward at yaw 0, y right); plot positions in m to the right of the start and ahead.
"""

from __future__ import annotations

import numpy as np

from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.coordinates import heading_axes
from worldvln_edge.training.sim.scene import Scene

_SMALLEST_HALF_M, _MARGIN_M = 6.0, 3.0


class StartFrame:
    """World to plot, for one task."""

    def __init__(self, task: Task):
        self.yaw_deg = float(task.initial_pos[4])
        self._origin_m = np.array(task.initial_pos[:2]) / 100.0
        forward, right = heading_axes(self.yaw_deg)
        self._axes = np.stack([right[:2], forward[:2]], axis=1)

    def metres(self, points_m: np.ndarray) -> np.ndarray:
        """World positions [..., 2 or more] in m to the plot: float64 [..., 2]."""
        return (np.asarray(points_m, np.float64)[..., :2] - self._origin_m) @ self._axes

    def poses(self, poses: np.ndarray) -> np.ndarray:
        """Poses [T, 2 or more], cm first, to the plot: float64 [T, 2]."""
        return self.metres(np.asarray(poses, np.float64)[:, :2] / 100.0)


def plot_window(paths: list[np.ndarray], frame: StartFrame, task: Task, scene: Scene) -> tuple[np.ndarray, float]:
    """Centre and half side of a square that holds all paths and the landmark that the text is about.

    Args:
        paths: plot positions [T, 2] each.
    """
    points = list(paths)
    if task.landmark is not None and any(mark.name == task.landmark for mark in scene.landmarks):
        points.append(frame.metres(scene.landmark_centre_m(task.landmark))[None])
    everything = np.concatenate(points)
    low, high = everything.min(0), everything.max(0)
    return (low + high) / 2, max(_SMALLEST_HALF_M, float((high - low).max()) / 2 + _MARGIN_M)
