"""One flown task as a line of an evaluation: the numbers that `flight_statistics.py` takes means of.

Success, position and heading are those of the task's own rule (1.5 m and 15 degrees of the expert's end, no
collision). Oracle success: the same rule, had the flight ended at its best pose. SPL, nDTW and sDTW are in 3-D, with
the rule's distance as radius and the expert's path as reference.
Legend: T flown poses, cm and deg; distances in m.
Source: spec/seed_systems.md 2.8 (last paragraph: drones); spec/training.md 8.6.
"""

from __future__ import annotations

import numpy as np

from worldvln_edge.poses import wrap_deg
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight
from worldvln_edge.training.evaluation.navigation_metrics import navigation_metrics
from worldvln_edge.training.sim.tasks import score_flight


def flight_outcome(
    row: str,
    task: Task,
    poses_T6: np.ndarray,
    *,
    collided: bool,
    instruction: str,
    error: str | None = None,
    latency_ms: tuple[float, ...] = (),
    profiles: tuple[str, ...] = (),
) -> EvalFlight:
    """Measure one flight.

    Args:
        row: of the evaluation.
        task: needs `end_pos`; without a reference path, start and end stand for it.
        poses_T6: flown poses, the start first; as far as the flight came.
        collided: whether any step did.
        instruction: what was told.
        error: why the flight broke off; then it failed, wherever the drone is.
        latency_ms: wall time of every segment.
        profiles: generation profiles that were flown.

    Raises:
        ValueError: the task has no end, or there are no poses.
    """
    poses = np.asarray(poses_T6, np.float64).reshape(-1, 6)
    score = score_flight(task, poses, collided)
    assert task.end_pos is not None  # score_flight checked it
    success = score.success and error is None
    end = np.array(task.end_pos)
    is_near = np.linalg.norm(poses[:, :3] - end[:3], axis=1) <= 100 * task.success.position_m
    is_aligned = np.abs(wrap_deg(poses[:, 4] - end[4])) <= task.success.yaw_deg
    reference = np.array(task.reference_path_raw or (task.initial_pos, task.end_pos), np.float64)
    measured = navigation_metrics(
        poses[:, :3] / 100,
        reference[:, :3] / 100,
        end[:3] / 100,
        radius_m=task.success.position_m,
        succeeded=success,
    )
    return EvalFlight(
        row=row,
        task=task.task_id,
        kind=task.kind,
        landmark=task.landmark,
        instruction=instruction,
        success=success,
        collided=score.collided,
        oracle_success=bool((is_near & is_aligned).any()) and not score.collided,
        final_distance_m=round(score.final_distance_m, 4),
        final_yaw_error_deg=round(score.final_yaw_error_deg, 3),
        oracle_distance_m=round(measured.oracle_error_m, 4),
        path_length_m=round(measured.path_length_m, 4),
        spl=round(measured.spl, 4),
        ndtw=round(measured.ndtw, 4),
        sdtw=round(measured.sdtw, 4),
        error=error,
        latency_ms=tuple(round(ms, 2) for ms in latency_ms),
        profiles=profiles,
    )
