"""Task generator: the same split and index always give the same task; splits share neither tasks nor scenes.

Scene seeds: train 0 .. 9,999,999; validation 10,000,000 .. 19,999,999; test 20,000,000 .. 29,999,999. Eight tasks in
a row share one scene (building it costs more than a flight), and kinds take turns, so 18 tasks hold every kind.
A task is kept only if the expert's path is free of collisions and, where it has a landmark, the landmark is visible in
the first frame.
Source: spec/training.md 8.6; spec/session_protocol.md 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from worldvln_edge.poses import wrap_deg
from worldvln_edge.tasks import SceneRef, SuccessRule, Task
from worldvln_edge.training.sim.camera import CameraConfig
from worldvln_edge.training.sim.coordinates import heading_axes
from worldvln_edge.training.sim.expert import APPROACH_STANDOFF_M, Goal, expert_path
from worldvln_edge.training.sim.instructions import TASK_KINDS, TaskKind
from worldvln_edge.training.sim.scene import FAMILIES
from worldvln_edge.training.sim.scene_model import SceneModel, load_scene_model

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TASKS_PER_SCENE = 8
_SEEDS_PER_SPLIT = 10_000_000
_SPARE_SCENES = 5_000_000  # seeds past this one within a split replace scenes in which a task finds no room
_DRAWS_PER_SCENE = 300
_MAX_SCENES = 16
_EXPERT_CLEARANCE_M = 0.7  # leaves a perturbed flight room to err
_VIEW_MARGIN = 0.85  # a landmark's centre must lie within this share of the frame


@dataclass(frozen=True)
class FlightScore:
    success: bool
    final_distance_m: float
    final_yaw_error_deg: float
    collided: bool


def generate_task(split: Split, index: int, *, dynamics: Literal["kinematic", "tracked"] = "kinematic") -> Task:
    """Task number `index` of a split.

    Args:
        split: train, validation or test.
        index: 0-based; the kind is `TASK_KINDS[index % 18]`.
        dynamics: how the drone follows; written into the task.

    Raises:
        ValueError: an unknown split or an index out of range.
        RuntimeError: no scene had room for it.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 0 <= index < _SPARE_SCENES:
        raise ValueError(f"a task index must be 0..{_SPARE_SCENES - 1}, found {index}")
    kind = TASK_KINDS[index % len(TASK_KINDS)]
    number = index // TASKS_PER_SCENE
    first_seed = SPLITS.index(split) * _SEEDS_PER_SPLIT
    rng = np.random.default_rng([3, SPLITS.index(split), index])
    for attempt in range(_MAX_SCENES):
        # The first scene is shared with the neighbours; spare ones are this task's own.
        offset = number if attempt == 0 else _SPARE_SCENES + (index * _MAX_SCENES + attempt) % _SPARE_SCENES
        scene = SceneRef(family=FAMILIES[number % len(FAMILIES)], seed=first_seed + offset)
        model = load_scene_model(scene.family, scene.seed)
        for _ in range(_DRAWS_PER_SCENE):
            drawn = _draw(rng, kind, model)
            if drawn is not None:
                start, goal, landmark, path = drawn
                text = kind.say(int(rng.integers(len(kind.templates))), goal.magnitude, landmark)
                return Task(
                    instruction=text,
                    initial_pos=_row(start),
                    task_id=f"{split}-{index:06d}",
                    end_pos=_row(path[-1]),
                    reference_path_raw=tuple(_row(pose) for pose in path),
                    reference_path_preprocessed=tuple(_row(pose) for pose in start_local(path)),
                    kind=kind.name,
                    magnitude=goal.magnitude,
                    landmark=landmark,
                    scene=scene,
                    success=SuccessRule(),
                    seed=SPLITS.index(split) * _SEEDS_PER_SPLIT + index,
                    dynamics=dynamics,
                )
    raise RuntimeError(
        f"found no room for task {index} ({kind.name}) of {split} in {_MAX_SCENES} scenes of {_DRAWS_PER_SCENE} draws"
    )


def score_flight(task: Task, poses_T6: np.ndarray | Sequence[Sequence[float]], collided: bool) -> FlightScore:
    """How a flight ended, measured against the expert's end.

    Args:
        task: needs `end_pos`.
        poses_T6: flown poses, cm and deg; only the last one counts.
        collided: whether any step of the flight collided.

    Raises:
        ValueError: the task has no end, or there are no poses.
    """
    poses = np.asarray(poses_T6, np.float64).reshape(-1, 6)
    if task.end_pos is None:
        raise ValueError(f'task {task.task_id!r} has no "end_pos", so its flights cannot be scored')
    if not len(poses):
        raise ValueError("a flight without poses cannot be scored")
    end = np.array(task.end_pos)
    distance = float(np.linalg.norm(poses[-1, :3] - end[:3])) / 100.0
    yaw_error = abs(float(wrap_deg(poses[-1, 4] - end[4])))
    near = distance <= task.success.position_m and yaw_error <= task.success.yaw_deg
    return FlightScore(bool(near and not collided), distance, yaw_error, bool(collided))


def start_local(poses_T6: np.ndarray) -> np.ndarray:
    """Poses relative to the first one: xy turned by -yaw0, z and angles minus the start (spec 4.1): float64 [T, 6]."""
    poses = np.asarray(poses_T6, np.float64)
    local = poses - poses[0]
    forward, right = heading_axes(float(poses[0, 4]))
    local[:, :2] = local[:, :2] @ np.stack([forward[:2], right[:2]], axis=1)
    local[:, 3:] = wrap_deg(local[:, 3:])
    return local


def _draw(
    rng: np.random.Generator, kind: TaskKind, model: SceneModel
) -> tuple[np.ndarray, Goal, str | None, np.ndarray] | None:
    """One attempt: start, goal, landmark name and the expert's path, or None when it does not work out."""
    magnitude = kind.draw_magnitude(rng)
    landmark, centre = None, None
    if kind.has_landmark:
        if not model.scene.landmarks:
            return None
        landmark = model.scene.landmarks[int(rng.integers(len(model.scene.landmarks)))].name
        centre = model.scene.landmark_centre_m(landmark)
        start = _start_at_landmark(rng, kind, centre)
    else:
        start = _start_anywhere(rng, kind, magnitude, model)
    start = np.round(start, 2)
    if kind.has_landmark and not _sees(model, start, landmark, centre):
        return None
    goal = Goal(kind.name, magnitude, centre)
    path = expert_path(start, goal)
    # The far end collides most often, so it is looked at first.
    for poses in (path[[-1, 24]], path):
        if model.path_clearance_m(poses, stop_below_m=_EXPERT_CLEARANCE_M) < _EXPERT_CLEARANCE_M:
            return None
    return start, goal, landmark, path


def _start_anywhere(
    rng: np.random.Generator, kind: TaskKind, magnitude: tuple[float, ...], model: SceneModel
) -> np.ndarray:
    half = 100.0 * (model.scene.half_size_m - 1.5)
    low, high = 200.0, 480.0
    if kind.name.startswith("climb"):
        high = 600.0 - 100.0 * magnitude[0]
    elif kind.name == "descend":
        low, high = 150.0 + 100.0 * magnitude[0], 600.0
    x, y = rng.uniform(-half, half, 2)
    return np.array([x, y, rng.uniform(low, high), 0.0, rng.uniform(-180.0, 180.0), 0.0])


def _start_at_landmark(rng: np.random.Generator, kind: TaskKind, centre_m: np.ndarray) -> np.ndarray:
    """A start from which the landmark lies ahead, at a distance and bearing that suit the kind."""
    low, high, off_axis = _LANDMARK_STARTS[kind.name]
    distance = 100.0 * rng.uniform(low, high)
    bearing = rng.uniform(-180.0, 180.0)  # of the landmark, seen from the start
    away, _ = heading_axes(bearing)
    offset = rng.uniform(*off_axis) * (1.0 if rng.random() < 0.5 else -1.0)
    x, y = 100.0 * centre_m[:2] - distance * away[:2]
    yaw = float(wrap_deg(bearing - offset))
    return np.array([x, y, rng.uniform(180.0, 400.0), 0.0, yaw, 0.0])


# Distance to the landmark's centre in m (from, to) and how far off the middle it appears in deg (from, to).
# `face` starts at 20 deg or more, beyond the success rule's 15, so that standing still fails.
_LANDMARK_STARTS: dict[str, tuple[float, float, tuple[float, float]]] = {
    "approach": (APPROACH_STANDOFF_M + 3.0, APPROACH_STANDOFF_M + 8.0, (0.0, 28.0)),
    "pass_left": (4.5, 8.0, (0.0, 18.0)),
    "pass_right": (4.5, 8.0, (0.0, 18.0)),
    "circle_clockwise": (3.2, 5.0, (0.0, 3.0)),
    "circle_counterclockwise": (3.2, 5.0, (0.0, 3.0)),
    "face": (4.0, 10.0, (20.0, 33.0)),
}


def _sees(model: SceneModel, pose: np.ndarray, landmark: str | None, centre_m: np.ndarray | None) -> bool:
    """Whether the landmark's centre is inside the first frame and nothing stands in front of it."""
    if landmark is None or centre_m is None or model.clearance_m(pose) < _EXPERT_CLEARANCE_M:
        return False
    place = CameraConfig().project(pose, centre_m)
    if place is None or max(abs(place[0]), abs(place[1])) > _VIEW_MARGIN:
        return False
    return model.first_hit(pose[:3] / 100.0, centre_m) == model.scene.landmark(landmark).solid


def _row(pose: np.ndarray) -> tuple[float, float, float, float, float, float]:
    x, y, z, roll, yaw, pitch = (round(float(value), 4) for value in pose)
    return x, y, z, roll, yaw, pitch
