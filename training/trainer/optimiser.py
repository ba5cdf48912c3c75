"""AdamW with groups, learning-rate schedule and clipping: what `[<stage>.optimiser]` of a recipe sets.

Source: spec/training.md 2.7, 3, 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec
import torch
from torch import nn

from worldvln_edge.config import ConfigError
from worldvln_edge.training.trainer.stage import ParameterGroup


class OptimiserConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW and how long it runs. The published values of a stage stand in the packaged recipe `worldvln-8b`."""

    learning_rate: float
    steps: int | None = None
    """Optimiser steps; give this or `epochs`."""
    epochs: int | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    """Steps over which the rate grows linearly to `learning_rate`."""
    final_share: float = 0.05
    """Of the learning rate, at the end of a cosine."""
    betas: tuple[float, float] = (0.9, 0.97)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Of matrices; vectors, biases and norms never decay."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    clip_decay: bool = False
    """Multiply `clip_norm` by 0.3^(20 * progress) + 0.2 (`cdec` of the published code)."""
    ema_decay: float = 0.0
    """Per optimiser step; 0: no averaged weights. With them, they are what is validated and exported."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("optimiser: give either steps or epochs")
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"optimiser.{name} must be >= 1, found {value}")
        for name in ("learning_rate", "eps", "clip_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"optimiser.{name} must be finite and > 0, found {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optimiser.{name} must be >= 0, found {getattr(self, name)}")
        for name, value in (("ema_decay", self.ema_decay), ("betas", self.betas[0]), ("betas", self.betas[1])):
            if not 0 <= value < 1:
                raise ConfigError(f"optimiser.{name} must be in [0, 1), found {value}")
        if not 0 <= self.final_share <= 1:
            raise ConfigError(f"optimiser.final_share must be in [0, 1], found {self.final_share}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run; an estimate where epochs differ in length."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a 0-based step of `total`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        share = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * share

    def clip(self, step: int, total: int) -> float:
        """Largest norm of the gradient at a 0-based step of `total`."""
        if not self.clip_decay:
            return self.clip_norm
        return self.clip_norm * (0.3 ** (20 * min(1.0, step / max(1, total))) + 0.2)


def build_optimiser(
    groups: Iterable[ParameterGroup], matrices: frozenset[int], config: OptimiserConfig, *, fused: bool
) -> torch.optim.AdamW:
    """AdamW over all parameters of the groups, matrices and the rest apart.

    Parameters that are frozen now are members too: they may thaw at a later epoch. Without a gradient they neither
    move nor decay, and have no state (spec/training.md 8.5, item 7).

    Args:
        groups: as `stage.parameter_groups`.
        matrices: ids of the parameters that decay (`find_matrices`).
        config: rates.
        fused: one kernel for all parameters (CUDA).
    """
    parts = []
    for group in groups:
        decaying = [p for p in group.parameters if id(p) in matrices]
        plain = [p for p in group.parameters if id(p) not in matrices]
        for parameters, decay in ((decaying, config.weight_decay), (plain, 0.0)):
            if parameters:
                parts.append({"params": parameters, "weight_decay": decay, "rate": group.rate})
    return torch.optim.AdamW(parts, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused or None)


def find_matrices(network: nn.Module) -> frozenset[int]:
    """Ids of the parameters that decay: at least two axes, and not the learned unconditional text."""
    return frozenset(
        id(p) for name, p in network.named_parameters() if p.ndim > 1 and name.rpartition(".")[2] != "cfg_uncond"
    )


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's own factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["rate"]
