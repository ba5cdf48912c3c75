"""A random tiny policy, tasks around a start in a real scene, and fliers, for tests that fly rollouts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from grpo_flights import tiny_tokenizer
from small_models import STATS, random_model, tiny_config

from worldvln_edge.poses import integrate_actions
from worldvln_edge.tasks import SceneRef, Task
from worldvln_edge.training.environments.pool import PoolConfig
from worldvln_edge.training.grpo.rollout import LocalFlier
from worldvln_edge.training.grpo.rollout_policy import RolloutPolicy

PATIENT = PoolConfig(processes=2, per_process=4, answer_within_s=600.0)
"""A pool that loses no flight on a busy machine; dead processes are found out at once all the same."""
START = (0.0, 0.0, 400.0, 0.0, 30.0, 0.0)
TEXTS = ("fly forward", "turn left 5 m", "climb to the red tower")


def tiny_policy(**options) -> RolloutPolicy:
    config = tiny_config(repetitions=1)
    return RolloutPolicy(random_model(config), STATS.latent_head, tiny_tokenizer(config), **{"rows": 4, **options})


def flight_tasks(count: int, **fields) -> list[Task]:
    """Tasks whose expert flies ahead 10 cm a step for the 12 steps of a tiny flight."""
    path = np.concatenate([[START], integrate_actions(np.array(START), np.tile([10.0, 0, 0, 0, 0, 0], (12, 1)))])
    return [
        Task(
            **{
                "task_id": f"ahead-{index}",
                "instruction": TEXTS[index % len(TEXTS)],
                "initial_pos": START,
                "end_pos": tuple(path[-1].tolist()),
                "reference_path_raw": tuple(tuple(pose) for pose in path.tolist()),
                "scene": SceneRef(family="city", seed=0),
                **fields,
            }
        )
        for index in range(count)
    ]


def flight_bytes(folder: Path) -> dict[str, bytes]:
    """Every trace of a collection, by name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "flights").iterdir())}


class CountingEnvironments:
    """Real environments; notes the calls, and may break one off or answer it with something else.

    Args:
        inner: the real ones.
        disturb: called before each step call with its number and ids.
    """

    def __init__(self, inner, disturb=lambda call, ids: None):
        self._inner, self._disturb = inner, disturb
        self.step_calls, self.steps, self.closed = 0, 0, []

    @property
    def capacity(self) -> int:
        return self._inner.capacity

    def create(self, tasks, *, image_hw, max_frames=49):
        return self._inner.create(tasks, image_hw=image_hw, max_frames=max_frames)

    def reset(self, ids: Sequence[str]):
        return self._inner.reset(ids)

    def step(self, actions):
        self.step_calls += 1
        self._disturb(self.step_calls, list(actions))
        self.steps += sum(len(own) for own in actions.values())
        return self._inner.step(actions)

    def close(self, ids: Sequence[str]) -> None:
        self.closed += ids
        self._inner.close(ids)


def flier(environments, **options) -> LocalFlier:
    policy = options.pop("policy", None) or tiny_policy()
    return LocalFlier(policy, environments, **options)
