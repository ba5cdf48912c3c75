"""The published weights of segments, for comparison: the fields of a replay row, one per candidate and segment.

As published, actions are summed as if they were steps in the world, angles of `all6` are not wrapped, and no weight is
negative (spec/training.md 5.5, 6, 7); nothing of this is in the product's rewards.
Legend: K candidates, C segments (clips 1..C), N actions of a flight. Poses and actions: cm and deg.
Source: spec/training.md 5.5, 5.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from worldvln_edge.config import ConfigError
from worldvln_edge.poses import wrap_deg
from worldvln_edge.training.grpo.advantages import Shaped, Shaping, leave_one_out, ranks_01, shape_costs
from worldvln_edge.training.grpo.reward_terms import ActionCosts, TaskScore, TermConfig, action_costs, score_pose

_DECAY = 0.9
_TRAJECTORY = TermConfig(near_m=3.0, near_deg=10.0)
"""Limits of success of a whole flight."""


class PublishedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights of the published score; the defaults are those of its collection."""

    action: float = 0.3
    task: float = 1.3
    ce: float = 0.03
    shaping: Shaping = "zscore_exp"
    task_mode: Literal["raw_dense", "dense_loo"] = "raw_dense"
    terms: TermConfig = TermConfig()

    def __post_init__(self) -> None:
        for name in ("action", "task", "ce"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"grpo.published.{name} must be finite and >= 0, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One flight of a task."""

    actions_N6: np.ndarray
    log_probs_C: np.ndarray
    """Sum over the bits of every segment."""


def published_rows(
    candidates: Sequence[Candidate], reference_T6: np.ndarray, config: PublishedConfig, *, step: int = 16
) -> list[list[dict[str, Any]]]:
    """Fields of the replay rows of one task's candidates.

    Args:
        candidates: K flights.
        reference_T6: poses of the expert, start included; they are taken relative to the first.
        config: weights.
        step: actions of a segment.

    Returns:
        By candidate and segment: the `grpo_*` fields of 5.6 that are numbers; `grpo_adv_final` is the weight.

    Raises:
        ValueError: a candidate without a single action in some segment (spec/training.md 7, Q13).
    """
    reference = np.asarray(reference_T6, np.float64) - np.asarray(reference_T6, np.float64)[0]
    reference[:, 3:] = wrap_deg(reference[:, 3:])
    reference = reference[1:]
    flights = [np.cumsum(np.asarray(one.actions_N6, np.float64), 0) for one in candidates]
    trajectories = [_at(poses, reference, len(reference) - 1, _TRAJECTORY) for poses in flights]
    segments = max(len(one.log_probs_C) for one in candidates)
    rows: list[list[dict[str, Any]]] = [[] for _ in candidates]
    for clip in range(1, segments + 1):
        members = [k for k, one in enumerate(candidates) if len(one.log_probs_C) >= clip]
        group = [
            _segment(flights[k], reference, float(candidates[k].log_probs_C[clip - 1]), clip, step, config)
            for k in members
        ]
        for k, row in zip(members, _scored(group, [trajectories[k] for k in members], clip, config), strict=True):
            rows[k].append(row)
    return rows


@dataclass(frozen=True, kw_only=True)
class _Segment:
    costs: ActionCosts
    cost: float
    score: TaskScore
    ce: float
    log_prob: float


def _segment(
    poses: np.ndarray, reference: np.ndarray, log_prob: float, clip: int, step: int, config: PublishedConfig
) -> _Segment:
    own = slice(step * (clip - 1), step * clip)
    costs = action_costs(poses[own], reference[own], wraps_angles=False)
    return _Segment(
        costs=costs,
        cost=config.terms.action_cost(costs),
        score=_at(poses, reference, step * clip - 1, config.terms),
        ce=max(0.0, -log_prob),
        log_prob=log_prob,
    )


def _at(poses: np.ndarray, reference: np.ndarray, row: int, terms: TermConfig) -> TaskScore:
    if row >= min(len(poses), len(reference)):
        return TaskScore(float("inf"), float("inf"), 0.0, 0.0)
    return score_pose(poses[row], reference[row], terms)


def _scored(
    group: list[_Segment], trajectories: list[TaskScore], clip: int, config: PublishedConfig
) -> list[dict[str, Any]]:
    decay, terms = _DECAY ** (clip - 1), config.terms
    actions = shape_costs(np.array([one.cost for one in group]), config.shaping)
    ces = shape_costs(np.array([one.ce for one in group]), config.shaping)
    action_K = decay * (actions.values if config.shaping == "inv1p" else leave_one_out(actions.values))
    ce_K = decay * (ces.values if config.shaping == "inv1p" else leave_one_out(ces.values))
    raw_K = np.array([terms.task_score(one.score) for one in group])
    advantage_K = leave_one_out(raw_K) if config.task_mode == "dense_loo" else np.zeros(len(group))
    task_K = decay * (advantage_K if config.task_mode == "dense_loo" else raw_K)
    score_K = config.action * action_K + config.task * task_K + config.ce * ce_K
    rank_K = ranks_01(score_K)
    rows = []
    for k, (one, whole) in enumerate(zip(group, trajectories, strict=True)):
        whole_raw = terms.task_score(whole)
        gate = 1.0 if whole.success else float(np.clip(whole_raw, 0, 1))
        score = float(score_K[k])
        rows.append(
            {
                "grpo_clip_id": clip,
                "grpo_old_logprob": one.log_prob,
                "grpo_ref_logprob": one.log_prob,
                "grpo_act_mse_scalar": one.cost,
                "grpo_mse": _published_units(one.costs),
                "grpo_reward_act_inv_raw": 1 / (1 + one.cost),
                "grpo_reward_act_raw": float(actions.values[k]),
                "grpo_reward_act_adv": float(action_K[k]),
                "grpo_reward_act": float(action_K[k]),
                **_shaping_fields("act", actions, k, config.shaping),
                "grpo_ce_nll": one.ce,
                "grpo_reward_ce_raw": decay * float(ces.values[k]),
                "grpo_reward_ce_adv": float(ce_K[k]),
                **_shaping_fields("ce", ces, k, config.shaping),
                "grpo_succ": one.score.success,
                "grpo_succ_traj": whole.success,
                **_error_fields("grpo_task_final", one.score, terms),
                **_error_fields("grpo_traj_final", whole, terms),
                "grpo_reward_task_dense_raw": one.score.dense,
                "grpo_reward_task_success_raw": one.score.success,
                "grpo_reward_task_raw": float(raw_K[k]),
                "grpo_reward_task": float(task_K[k]),
                "grpo_reward_task_adv": float(advantage_K[k]),
                "grpo_reward_task_traj_dense_raw": whole.dense,
                "grpo_reward_task_traj_success_raw": whole.success,
                "grpo_reward_task_traj_raw": whole_raw,
                "grpo_traj_gate": gate,
                "grpo_reward_decay": decay,
                "grpo_reward": score,
                "grpo_score_final": score,
                "grpo_score_final_raw": score,
                "grpo_score_final_pos": max(score, 0.0),
                "grpo_rank_final": float(rank_K[k]),
                "grpo_adv_final": float(np.clip(max(score, 0.0) * gate, 0, 1)),
            }
        )
    return rows


def _published_units(costs: ActionCosts) -> dict[str, float]:
    return {
        "mse_all6_mrad": costs.all6,
        "mse_xyz_m2": costs.xyz,
        "mse_yaw_rad2": costs.yaw,
        "mse_xyz_cm2": costs.xyz * 1e4,
        "mse_yaw_deg2": costs.yaw * float(np.degrees(1.0)) ** 2,
    }


def _error_fields(prefix: str, score: TaskScore, terms: TermConfig) -> dict[str, float]:
    cost = (score.position_error_m / terms.position_scale_m) ** 2 + (score.yaw_error_deg / terms.yaw_scale_deg) ** 2
    return {
        f"{prefix}_pos_err_m": score.position_error_m,
        f"{prefix}_yaw_err_deg": score.yaw_error_deg,
        f"{prefix}_cost": cost,
    }


def _shaping_fields(what: str, shaped: Shaped, k: int, shaping: Shaping) -> Mapping[str, float]:
    found = {f"grpo_reward_{what}_mu": shaped.mean, f"grpo_reward_{what}_sigma": shaped.std}
    if shaping == "zscore_exp":
        found[f"grpo_reward_{what}_z"] = float(shaped.distances[k])
    if shaping == "minstd_exp":
        found[f"grpo_reward_{what}_xminus"] = float(shaped.distances[k])
    return found
