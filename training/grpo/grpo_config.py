"""What a GRPO run learns from and when it ends: table `[grpo]` of a recipe.

The defaults are those of the product's algorithm (spec/training.md 5.9); the published column "main" of 5.7 is what
`objective_overrides` says.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from worldvln_edge.config import ConfigError
from worldvln_edge.training.grpo.early_stopping import AnyRule
from worldvln_edge.training.grpo.objective import ObjectiveConfig
from worldvln_edge.training.grpo.policy_steps import PolicyScales, Repetitions
from worldvln_edge.training.grpo.published_rows import PublishedConfig
from worldvln_edge.training.grpo.rewards import RewardConfig
from worldvln_edge.training.trainer.optimiser import OptimiserConfig


class EvaluationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Held-out flights that say which step is the best, paired by task and seed with those of the start."""

    every: int = 10
    """Collections; the first and the last are evaluated always. 0: those only."""
    tasks: int = 64
    rollouts: int = 16
    """Flights of a task."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"grpo.evaluation.every must be >= 0, found {self.every}")
        for name in ("tasks", "rollouts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"grpo.evaluation.{name} must be >= 1, found {getattr(self, name)}")


class GrpoConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of flights, scores and training alike; bf16 needs a larger `drift_limit`."""
    collections: int = 40
    tasks: int = 4
    """Of a collection."""
    candidates: int = 8
    """Flights of a task, which are compared with each other."""
    passes: int = 2
    """Over the flights of a collection."""
    step_samples: int = 32
    """Samples (a segment of a flight each) of an optimiser step."""
    micro_samples: int = 32
    """Samples that go through the network together; less needs less memory."""
    rows: int = 32
    """Flights that fly together."""
    policy_scales: PolicyScales = "semantic"
    """Scales whose bits are drawn and learnt; of the others the likelier bits are taken. 2: the two coarsest."""
    repetitions: Repetitions = "last"
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    published: PublishedConfig = PublishedConfig()
    """Of the published objective, which has rewards and weights of its own."""
    group_later_segments: bool = True
    """Compare segments behind the first too, though they began in different states."""
    subtract_expected: bool = False
    """From the return of a segment behind the first, what the flight's earlier rewards let expect of it: one linear fit
    a segment to all groups of a collection. A flight is then not blamed again for where an earlier segment put it."""
    early_stopping: tuple[AnyRule, ...] = ()
    """Rules that end flights whose outcome is settled, such as [{ rule = "budget" }, { rule = "stall" }]."""
    anchor: float = 0.1
    """Weight of the SFT loss that every optimiser step adds; 0: none."""
    anchor_rows: int = 8
    """Recorded flights of that loss; where rows are packed, it is one sequence."""
    frozen_chunks: int = 0
    """First chunks of blocks that stay as they are, with everything else but the later chunks, norm and heads."""
    checkpoint_activations: bool = False
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.97)
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    """Of averaged weights, per optimiser step; 0: none. With them, they are what is evaluated and written; the policy
    that is not averaged flies the collections, and the limits are of it. Gradients of flights are mostly noise, which
    an average over the last 1 / (1 - ema_decay) steps loses."""
    drift_limit: float = 1e-3
    """Largest difference of a bit's log-probability between flight and trainer; above it the run ends."""
    k3_limit: float = 0.05
    """Mean k3 per bit in the last pass that ends the run."""
    clipped_limit: float = 0.3
    """Share of clipped ratios in the last pass that ends the run."""
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        least = {
            "collections": 1,
            "tasks": 1,
            "candidates": 2,
            "passes": 1,
            "step_samples": 1,
            "micro_samples": 1,
            "rows": 1,
            "anchor_rows": 1,
            "frozen_chunks": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"grpo.{name} must be >= {smallest}, found {getattr(self, name)}")
        for name in ("anchor", "drift_limit", "k3_limit", "clipped_limit"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"grpo.{name} must be finite and >= 0, found {getattr(self, name)}")
        if self.early_stopping and self.objective.kind == "published":
            raise ConfigError("grpo.early_stopping is not part of the published objective; set it to []")
        if self.subtract_expected and self.objective.kind == "published":
            raise ConfigError("grpo.subtract_expected is not part of the published objective; set it to false")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"grpo.ema_decay must be in [0, 1), found {self.ema_decay}")
        if self.subtract_expected and not self.group_later_segments:
            raise ConfigError(
                "grpo.subtract_expected is about segments behind the first, which grpo.group_later_segments = false "
                "leaves out; set one of them the other way"
            )
        self.optimiser()

    def optimiser(self) -> OptimiserConfig:
        """AdamW at a constant rate."""
        return OptimiserConfig(
            learning_rate=self.learning_rate,
            epochs=self.collections * self.passes,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=self.betas,
            clip_norm=self.clip_norm,
            ema_decay=self.ema_decay,
        )

    def identity(self) -> dict[str, Any]:
        """What the numbers of a run depend on: a run may be made longer, and evaluated more or less often."""
        values = msgspec.to_builtins(self)
        for name in ("collections", "evaluation", "k3_limit", "clipped_limit", "micro_samples", "drift_limit"):
            del values[name]
        return values


def objective_overrides(kind: str) -> dict[str, Any]:
    """Values that go with an objective, as a layer of a recipe; learning rate and averaging stay those of the preset.

    `published`: the column "main" of 5.7. `product`: 5.9 item 7.
    """
    if kind == "published":
        objective = {"kind": kind, "eps": 0.15, "beta": 0.1, "aux": 0.02, "advantage_limit": 5.0}
        return {"grpo": {"objective": objective, "clip_norm": 5.0, "early_stopping": [], "subtract_expected": False}}
    objective = {"kind": kind, "eps": 0.02, "beta": 0.05, "aux": 0.0, "advantage_limit": 5.0}
    return {"grpo": {"objective": objective, "clip_norm": 1.0}}
