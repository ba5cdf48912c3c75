"""Budgets of an ActiveVLN episode: how many actions and turns a policy gets, and where it takes over from the expert.

A client works them out and sends them with `/environments` (`step_budget`, `turn_budget`, `history_actions`).
Source: spec/seed_systems.md 2.6; golden activevln_env.json (`step_budget`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_MOST_TURNS, _ACTIONS_PER_TURN = 40, 3


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The defaults are the published ones: no curriculum."""

    tolerance: float = 2.0  # actions that a policy gets for each of the expert's
    most_steps: int = 120
    warmup_ratio: float = 0.0  # share of the training in which the expert flies the beginning; shorter every step
    exponent: float = 2.0  # above 1, the policy's part grows late
    fewest_own: int = 2  # the expert's last actions that are left to the policy at the start of the training

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf or not 0 < self.exponent < math.inf or not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"tolerance and exponent must be finite and > 0, and warmup_ratio in [0, 1], found {self}")
        if self.most_steps < 1 or self.fewest_own < 1:
            raise ValueError(f"most_steps and fewest_own must be >= 1, found {self}")


@dataclass(frozen=True, kw_only=True)
class EpisodeBudget:
    steps: int
    turns: int
    history: int
    """First actions of the expert, which are flown before the policy begins."""


def episode_budget(
    expert_actions: int, *, step: int, total_steps: int, config: BudgetConfig | None = None, from_start: bool = False
) -> EpisodeBudget:
    """Budget of an episode in a step of a training.

    Args:
        expert_actions: text actions of the expert, stop included.
        step: 1-based, of the training.
        total_steps: of the training.
        config: of the curriculum.
        from_start: the whole episode in spite of the curriculum; the published trainer draws it for some episodes.

    Raises:
        ValueError: no action, or a step below 1.
    """
    config = config or BudgetConfig()
    if expert_actions < 1 or step < 1:
        raise ValueError(f"an episode has >= 1 actions of the expert in a step >= 1, found {expert_actions} and {step}")
    warmup = int(total_steps * config.warmup_ratio)
    own = expert_actions
    if step <= warmup and not from_start:
        share = (math.log(step) / math.log(warmup + 1)) ** config.exponent
        fewest = min(config.fewest_own, expert_actions)
        own = int(fewest + (expert_actions - fewest) * share)
    history = expert_actions - own
    return EpisodeBudget(
        steps=int(min(own * config.tolerance, config.most_steps)),
        turns=_MOST_TURNS - math.ceil(history / _ACTIONS_PER_TURN),
        history=history,
    )
