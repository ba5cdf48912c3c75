"""Rewards of flown segments: plug-ins by name, and their weighted sum.

A flight that ended early stands where it ended for the rest of the horizon, so that every flight has a reward for every
segment, and a flight is worth the same whichever others share its group.
Legend: S segments of the horizon, T+1 poses of a flight with its start. Poses: cm and deg.
Source: spec/training.md 5.5 (formulas), 5.9 items 4 and 5 (simulator poses, weights, wrapped angles).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Protocol

import msgspec
import numpy as np

from worldvln_edge.config import ConfigError
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.navigation_metrics import ndtw
from worldvln_edge.training.grpo.advantages import NotFiniteError
from worldvln_edge.training.grpo.reward_terms import TermConfig, action_costs, score_pose
from worldvln_edge.training.grpo.trace import FlightTrace


class RewardError(ValueError):
    """A flight that cannot be judged: its trace or its task lacks something. The message names both."""


class Reward(Protocol):
    """One kind of reward; higher is better."""

    def __call__(self, trace: FlightTrace, task: Task) -> np.ndarray:
        """Reward of every segment of the horizon: float64 [S].

        Raises:
            RewardError: the flight is invalid, or the task lacks what the reward measures against.
        """
        ...


RewardFactory = Callable[[TermConfig, int], Reward]
"""(scales and limits, actions of a segment) -> reward."""


def flight_name(trace: FlightTrace) -> str:
    """Task, candidate and seed, for messages."""
    return f"task {trace.task_id!r}, candidate {trace.candidate_id} (seed {trace.seed})"


def action_reward(terms: TermConfig, step: int) -> Reward:
    """`1 / (1 + a)`: how well a segment's poses match the expert's at the same moments."""

    def reward(trace: FlightTrace, task: Task) -> np.ndarray:
        poses, reference = _poses(trace, step), _reference(trace, task)
        costs = [
            terms.action_cost(action_costs(poses[first : first + step], reference[first : first + step]))
            for first in range(1, len(poses), step)
        ]
        return 1 / (1 + np.array(costs))

    return reward


def task_reward(terms: TermConfig, step: int) -> Reward:
    """How near a segment's end is to the expert's at that moment: a dense score, and a bonus of success."""

    def reward(trace: FlightTrace, task: Task) -> np.ndarray:
        poses, reference = _poses(trace, step), _reference(trace, task)
        ends = range(step, len(poses), step)
        return np.array([terms.task_score(score_pose(poses[end], reference[end], terms)) for end in ends])

    return reward


def success_reward(terms: TermConfig, step: int) -> Reward:
    """1 in the last segment of a flight that ends as the task's own rule wants it, without a collision."""

    def reward(trace: FlightTrace, task: Task) -> np.ndarray:
        poses = _poses(trace, step)
        found = np.zeros((len(poses) - 1) // step)
        found[-1] = float(has_succeeded(trace, task))
        return found

    return reward


def path_reward(terms: TermConfig, step: int) -> Reward:
    """nDTW of the path up to a segment's end to the expert's up to there; the task's distance is its radius."""

    def reward(trace: FlightTrace, task: Task) -> np.ndarray:
        poses, reference = _poses(trace, step)[:, :3] / 100, _reference(trace, task)[:, :3] / 100
        radius = task.success.position_m
        ends = range(step, len(poses), step)
        return np.array([ndtw(poses[: end + 1], reference[: end + 1], radius_m=radius) for end in ends])

    return reward


def collision_reward(terms: TermConfig, step: int) -> Reward:
    """-1 in the last segment that a flight with a collision flew, 0 elsewhere."""

    def reward(trace: FlightTrace, task: Task) -> np.ndarray:
        found = np.zeros((len(_poses(trace, step)) - 1) // step)
        if trace.collided:
            found[len(trace.segments) - 1] = -1.0
        return found

    return reward


def reference_reward(terms: TermConfig, step: int) -> Reward:
    """Mean log-probability of a segment's bits under the policy that flew them; 0 for one that was not generated."""

    def reward(trace: FlightTrace, task: Task) -> np.ndarray:
        found = np.zeros((len(_poses(trace, step)) - 1) // step)
        for index, segment in enumerate(trace.segments):
            bits = sum(one.numel() for one in segment.log_probs)
            if bits == 0:
                raise RewardError(f"{flight_name(trace)}: segment {index} holds no log-probabilities")
            found[index] = min(0.0, segment.log_prob) / bits
        return found

    return reward


REWARDS: Mapping[str, RewardFactory] = {
    "action": action_reward,
    "task": task_reward,
    "success": success_reward,
    "path": path_reward,
    "collision": collision_reward,
    "reference": reference_reward,
}


class WeightedRewards:
    """The weighted sum of rewards.

    Args:
        weights: by name in `REWARDS`, or by `module:function` of a `RewardFactory` of your own.
        terms: scales and limits.
        step: actions of a segment.

    Raises:
        ConfigError: a name that nothing has, or no weight but 0.
    """

    def __init__(self, weights: Mapping[str, float], terms: TermConfig, *, step: int):
        check_weights(weights)
        self._parts = [(name, weight, find_reward(name)(terms, step)) for name, weight in weights.items() if weight]

    def __call__(self, trace: FlightTrace, task: Task) -> np.ndarray:
        """See `Reward`.

        Raises:
            NotFiniteError: a reward that is NaN or infinite.
        """
        total: np.ndarray | None = None
        for name, weight, reward in self._parts:
            values = np.asarray(reward(trace, task), np.float64)
            if not np.isfinite(values).all():
                raise NotFiniteError(f"{flight_name(trace)}: reward {name!r} is not finite: {values.tolist()}")
            if total is not None and values.shape != total.shape:
                raise RewardError(
                    f"{flight_name(trace)}: reward {name!r} gives {list(values.shape)} numbers, the others "
                    f"{list(total.shape)}; a reward gives one for every segment of the horizon"
                )
            total = weight * values if total is None else total + weight * values
        assert total is not None  # check_weights
        return total


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ConfigError for weights that are not numbers, or that sum nothing up."""
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"grpo.rewards: the weight of {name!r} must be finite, found {weight}")
    if not any(weights.values()):
        raise ConfigError("grpo.rewards: no reward has a weight other than 0")


def find_reward(name: str) -> RewardFactory:
    """The factory of a name. Raises ConfigError where there is none."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"grpo.rewards: no reward {name!r}; known are {', '.join(REWARDS)}, or give module:function of your own"
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"grpo.rewards: {name!r} cannot be imported ({error})") from error


def has_succeeded(trace: FlightTrace, task: Task) -> bool:
    """Whether the flight ends as the task's own rule wants it, without a collision.

    Raises:
        RewardError: the task has no end.
    """
    if task.end_pos is None:
        raise RewardError(f'{flight_name(trace)}: the task has no "end_pos", so success cannot be judged')
    rule = task.success
    scored = score_pose(
        trace.completed_poses()[-1],
        np.array(task.end_pos),
        TermConfig(near_m=rule.position_m, near_deg=rule.yaw_deg),
    )
    return bool(scored.success) and not trace.collided


def _poses(trace: FlightTrace, step: int) -> np.ndarray:
    """World poses of the whole horizon: float64 [T+1, 6]."""
    if not trace.segments or trace.environment_steps == 0:
        raise RewardError(f"{flight_name(trace)}: nothing was flown, so there is nothing to reward; collect it again")
    poses = trace.completed_poses()
    if not np.isfinite(poses).all():
        raise RewardError(f"{flight_name(trace)}: the flown poses hold NaN or infinity; collect it again")
    if (len(poses) - 1) % step:
        raise RewardError(f"{flight_name(trace)}: {len(poses) - 1} actions are no whole segments of {step}")
    return poses


def _reference(trace: FlightTrace, task: Task) -> np.ndarray:
    """The expert's world poses at the same moments, float64 [T+1, 6]; one who arrived earlier stays there."""
    reference = np.array(task.reference_path_raw, np.float64).reshape(-1, 6)
    if len(reference) < 2:
        raise RewardError(
            f'{flight_name(trace)}: the task has no "reference_path_raw"; set the weights of action, task and path to '
            "0, or use tasks with an expert"
        )
    missing = trace.horizon_steps + 1 - len(reference)
    if missing > 0:
        reference = np.concatenate([reference, np.repeat(reference[-1:], missing, axis=0)])
    return reference[: trace.horizon_steps + 1]


class RewardConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a segment is worth (5.9 item 5)."""

    weights: dict[str, float] = msgspec.field(default_factory=lambda: {"action": 0.3, "task": 1.3})
    terms: TermConfig = TermConfig()
    discount: float = 0.9
    """Of later segments, in the return of a segment."""
    success_bonus: float = 0.0
    """Added to every segment's return of a flight that succeeds (5.9 item 5: 0.2)."""

    def __post_init__(self) -> None:
        check_weights(self.weights)
        for name in self.weights:
            find_reward(name)
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"grpo.reward.discount must be in [0, 1], found {self.discount}")
        if not 0 <= self.success_bonus < float("inf"):
            raise ConfigError(f"grpo.reward.success_bonus must be finite and >= 0, found {self.success_bonus}")
