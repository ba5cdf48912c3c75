"""How well motions are predicted: per column, and where a path of them ends.

A route is a sequence of motions [dyaw, dpitch, droll, tx, ty, tz] in rad and m; paths start at a common pose, so
errors do not depend on it.

Legend: N motions of a route.
Source: spec/training.md 4.7, 8.4 (row `action`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.rigid_motion import angle_between_deg, angles_of_rotations, integrate_deltas, yaw_error_deg

COLUMNS = ("yaw", "pitch", "roll", "x", "y", "z")
QUALIFIED_M, QUALIFIED_DEG = 3.0, 10.0
_STANDING = 1e-4  # a column with a smaller deviation does not move (roll and pitch in the simulator)


@dataclass(frozen=True, kw_only=True)
class RouteError:
    """How far a predicted path lies from the true one."""

    distance_m: float  # of the ends
    angle_deg: float  # of the turn between the last rotations
    yaw_deg: float  # between the last headings, the short way round
    rmse_xyz_m: float  # over the route, without its common start
    rmse_rpy_rad: float

    @property
    def is_qualified(self) -> bool:
        return self.distance_m <= QUALIFIED_M and self.angle_deg <= QUALIFIED_DEG


def route_error(predicted_N6: np.ndarray, true_N6: np.ndarray) -> RouteError:
    """Integrate both routes from one pose and compare.

    Raises:
        ValueError: routes of different length, or without a motion.
    """
    if np.shape(predicted_N6) != np.shape(true_N6) or len(true_N6) == 0:
        raise ValueError(f"routes must have the same N >= 1 rows, found {np.shape(predicted_N6)}, {np.shape(true_N6)}")
    (path, rotations), (true_path, true_rotations) = integrate_deltas(predicted_N6), integrate_deltas(true_N6)
    turned = angles_of_rotations(rotations[1:]) - angles_of_rotations(true_rotations[1:])
    turned = np.arctan2(np.sin(turned), np.cos(turned))  # the short way round
    return RouteError(
        distance_m=float(np.linalg.norm(path[-1] - true_path[-1])),
        angle_deg=float(angle_between_deg(rotations[-1], true_rotations[-1])),
        yaw_deg=float(yaw_error_deg(rotations[-1], true_rotations[-1])),
        rmse_xyz_m=float(np.sqrt(np.mean((path[1:] - true_path[1:]) ** 2))),
        rmse_rpy_rad=float(np.sqrt(np.mean(turned**2))),
    )


def column_errors(predicted: Sequence[np.ndarray], true: Sequence[np.ndarray], stats: LabelStats) -> dict[str, float]:
    """Error of every column that moves: `mae_*` in rad and m, and `nmse_*`.

    `nmse_*` is the mean squared error over that of always saying the mean of the training labels: 1 is no learning.
    """
    found, wanted = np.concatenate(list(predicted)).astype(np.float64), np.concatenate(list(true)).astype(np.float64)
    absolute, squared = np.abs(found - wanted).mean(0), ((found - wanted) ** 2).mean(0)
    of_mean = ((stats.mean - wanted) ** 2).mean(0)
    moving = [i for i in range(6) if stats.std[i] > _STANDING and of_mean[i] > 0]
    return {f"nmse_{COLUMNS[i]}": float(squared[i] / of_mean[i]) for i in moving} | {
        f"mae_{COLUMNS[i]}": float(absolute[i]) for i in moving
    }


def route_metrics(predicted: Sequence[np.ndarray], true: Sequence[np.ndarray], stats: LabelStats) -> dict[str, float]:
    """Errors over many routes.

    Args:
        predicted, true: routes of the same lengths, rad and m.
        stats: of the training labels.

    Returns:
        `endpoint_m`, `angle_deg`, `yaw_deg` (means, and `_p50`, `_p90`, `_max`), `qualified` (share), `rmse_xyz_m`,
        `rmse_rpy_rad`, `mean_endpoint_m` and `mean_yaw_deg` (of integrating the training mean), and `column_errors`.

    Raises:
        ValueError: no route, or routes that do not fit each other.
    """
    if not predicted or len(predicted) != len(true):
        raise ValueError(f"expected as many predicted as true routes, at least one: {len(predicted)} and {len(true)}")
    errors = [route_error(*pair) for pair in zip(predicted, true, strict=True)]
    of_mean = [route_error(np.tile(stats.mean, (len(route), 1)), route) for route in true]
    metrics: dict[str, float] = {}
    for name, values in (
        ("endpoint_m", [error.distance_m for error in errors]),
        ("angle_deg", [error.angle_deg for error in errors]),
        ("yaw_deg", [error.yaw_deg for error in errors]),
    ):
        metrics[name] = float(np.mean(values))
        metrics |= {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 90)}
        metrics[f"{name}_max"] = float(np.max(values))
    metrics["qualified"] = float(np.mean([error.is_qualified for error in errors]))
    metrics["rmse_xyz_m"] = float(np.mean([error.rmse_xyz_m for error in errors]))
    metrics["rmse_rpy_rad"] = float(np.mean([error.rmse_rpy_rad for error in errors]))
    metrics["mean_endpoint_m"] = float(np.mean([error.distance_m for error in of_mean]))
    metrics["mean_yaw_deg"] = float(np.mean([error.yaw_deg for error in of_mean]))
    return metrics | column_errors(predicted, true, stats)
