"""What a flown segment is worth, term by term: action cost and task score.

Legend: n rows of a segment, T rows of a flight. Poses [x, y, z, roll, yaw, pitch]: cm and deg.
Source: spec/training.md 5.5.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from worldvln_edge.config import ConfigError
from worldvln_edge.poses import wrap_deg


class ActionCosts(NamedTuple):
    """Mean squared differences of a segment, in m and rad."""

    xyz: float
    yaw: float
    all6: float


class TaskScore(NamedTuple):
    """How near a pose is to where it should be."""

    position_error_m: float
    yaw_error_deg: float
    dense: float
    """1 on the spot, falling with the square of both errors."""
    success: float


class TermConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights and scales of the terms; the defaults are the published ones."""

    alpha_xyz: float = 1.0
    alpha_yaw: float = 1.0
    alpha_all6: float = 0.2
    position_scale_m: float = 2.0
    """Position error that counts as much in the dense score as `yaw_scale_deg`."""
    yaw_scale_deg: float = 10.0
    near_m: float = 0.6
    """Success of a segment: end within this of the reference's end of the segment, and"""
    near_deg: float = 2.5
    success_bonus: float = 0.15
    """Share of success in the task score; the rest is the dense score."""

    def __post_init__(self) -> None:
        for name in ("alpha_xyz", "alpha_yaw", "alpha_all6", "near_m", "near_deg"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"grpo.terms.{name} must be finite and >= 0, found {getattr(self, name)}")
        for name in ("position_scale_m", "yaw_scale_deg"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"grpo.terms.{name} must be finite and > 0, found {getattr(self, name)}")
        if not 0 <= self.success_bonus <= 1:
            raise ConfigError(f"grpo.terms.success_bonus must be in [0, 1], found {self.success_bonus}")

    def action_cost(self, costs: ActionCosts) -> float:
        """The weighted sum, called a in 5.5."""
        return self.alpha_xyz * costs.xyz + self.alpha_yaw * costs.yaw + self.alpha_all6 * costs.all6

    def task_score(self, score: TaskScore) -> float:
        """Dense score with the bonus of success."""
        return (1 - self.success_bonus) * score.dense + self.success_bonus * score.success


def action_costs(poses_n6: np.ndarray, reference_n6: np.ndarray, *, wraps_angles: bool = True) -> ActionCosts:
    """Mean squared differences of two runs of poses, over the rows that both have.

    Args:
        poses_n6, reference_n6: float64, rows that belong to the same moments.
        wraps_angles: False: `all6` takes angles as numbers, as published; `yaw` is wrapped always.

    Raises:
        ValueError: no common row: what was not flown has no cost (spec/training.md 7, Q13).
    """
    rows = min(len(poses_n6), len(reference_n6))
    if rows == 0:
        raise ValueError("a segment without poses has no action cost")
    difference = np.asarray(poses_n6[:rows], np.float64) - np.asarray(reference_n6[:rows], np.float64)
    position_m, angles_deg = difference[:, :3] / 100, difference[:, 3:]
    yaw = np.radians(wrap_deg(angles_deg[:, 1]))
    angles = np.radians(wrap_deg(angles_deg) if wraps_angles else angles_deg)
    return ActionCosts(
        xyz=float(np.square(position_m).mean()),
        yaw=float(np.square(yaw).mean()),
        all6=float(np.square(np.concatenate([position_m, angles], 1)).mean()),
    )


def score_pose(pose_6: np.ndarray, reference_6: np.ndarray, config: TermConfig) -> TaskScore:
    """Compare a pose with the one that it should be; `config` has the scales, and the limits of success."""
    position_m = float(np.linalg.norm(pose_6[:3] - reference_6[:3])) / 100
    yaw_deg = abs(float(wrap_deg(pose_6[4] - reference_6[4])))
    dense = 1 / (1 + (position_m / config.position_scale_m) ** 2 + (yaw_deg / config.yaw_scale_deg) ** 2)
    return TaskScore(position_m, yaw_deg, dense, float(position_m <= config.near_m and yaw_deg <= config.near_deg))
