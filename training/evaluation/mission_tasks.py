"""Missions longer than the model's horizon: several instructions one after the other, as one task of the simulator.

A mission starts as a held-out task; every further leg is a motion from where the expert ended.
Source: spec/training.md 8.6.
"""

from __future__ import annotations

import msgspec
import numpy as np

from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.expert import Goal, expert_path
from worldvln_edge.training.sim.instructions import TASK_KINDS
from worldvln_edge.training.sim.scene_model import load_scene_model
from worldvln_edge.training.sim.tasks import generate_task

THEN = ", then "
"""Between the instructions of a mission."""
_MOTIONS = [index for index, kind in enumerate(TASK_KINDS) if not kind.has_landmark]
_CLEARANCE_M, _LOWEST_CM, _HIGHEST_CM = 0.7, 150.0, 700.0
_DRAWS = 200


def generate_mission(index: int, legs: int) -> Task:
    """Mission number `index` of so many legs: the same one every time, in a held-out scene.

    Args:
        index: 0-based; kinds of the first leg take turns.
        legs: at least 1.

    Raises:
        ValueError: no legs.
        RuntimeError: no room for it in the scenes that were tried.
    """
    if legs < 1:
        raise ValueError(f"a mission needs at least one leg, found {legs}")
    turn, kind = divmod(index, len(_MOTIONS))
    for attempt in range(50):
        first = generate_task("test", (turn + 1000 * attempt) * len(TASK_KINDS) + _MOTIONS[kind])
        found = _go_on(first, legs, np.random.default_rng([7, index, legs, attempt]))
        if found is not None:
            return msgspec.structs.replace(found, task_id=f"mission-{legs}-{index:06d}")
    raise RuntimeError(f"found no room for mission {index} of {legs} legs")


def _go_on(first: Task, legs: int, rng: np.random.Generator) -> Task | None:
    assert first.scene is not None  # generated tasks have one
    model = load_scene_model(first.scene.family, first.scene.seed)
    path, texts = [np.array(pose) for pose in first.reference_path_raw], [first.instruction]
    for _ in range(legs - 1):
        for _ in range(_DRAWS):
            kind = TASK_KINDS[_MOTIONS[int(rng.integers(len(_MOTIONS)))]]
            magnitude = kind.draw_magnitude(rng)
            leg = expert_path(path[-1], Goal(kind.name, magnitude))
            is_high_enough = _LOWEST_CM <= leg[-1, 2] <= _HIGHEST_CM
            if is_high_enough and model.path_clearance_m(leg, stop_below_m=_CLEARANCE_M) >= _CLEARANCE_M:
                path += list(leg[1:])
                texts.append(kind.say(int(rng.integers(len(kind.templates))), magnitude))
                break
        else:
            return None
    poses = tuple(tuple(round(float(value), 4) for value in pose) for pose in path)
    return msgspec.convert(
        {
            **msgspec.to_builtins(first),
            "instruction": THEN.join(texts),
            "end_pos": poses[-1],
            "reference_path_raw": poses,
            "reference_path_preprocessed": (),
            "kind": f"{legs} legs",
            "magnitude": (),
        },
        Task,
    )
