"""One optimisation loop for all stages: schedule, clipping, loss log, progress bar.

A stage is a function from a step number to a dictionary of losses, `loss` among them. Everything random in a stage
comes from generators that are seeded by (seed, step), so that a run is a function of its config.
Source: spec/training.md 2.7 (non-finite losses are skipped and counted).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

Losses = dict[str, Tensor]


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss that is not finite."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW with linear warm-up and cosine decay to `final_share` of the rate."""

    learning_rate: float
    steps: int
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.97)
    clip_norm: float = 1.0
    final_share: float = 0.05
    log_every: int = 20
    max_bad_steps: int = 20

    def rate(self, step: int) -> float:
        """Learning rate of a 0-based step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        share = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * share


@dataclass
class LossCurve:
    """Averages of the losses over every `log_every` steps, appended to a JSON-lines file."""

    path: Path
    stage: str
    _sums: dict[str, float] = field(default_factory=dict)
    _count: int = 0
    _start: float = field(default_factory=time.perf_counter)

    def add(self, losses: Losses) -> None:
        self._count += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())

    def flush(self, step: int, rate: float) -> dict[str, float]:
        means = {name: total / max(1, self._count) for name, total in self._sums.items()}
        row = {"stage": self.stage, "step": step, "seconds": round(time.perf_counter() - self._start, 1), "lr": rate}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row | {k: round(v, 6) for k, v in means.items()}) + "\n")
        self._sums, self._count = {}, 0
        return means


def optimise(
    stage: str,
    parameters: Iterable[nn.Parameter],
    config: OptimiserConfig,
    losses_of_step: Callable[[int], Losses],
    curve_file: Path,
) -> None:
    """Run `config.steps` optimiser steps.

    Args:
        stage: name in the loss curve and on the progress bar.
        parameters: what is trained.
        config: schedule.
        losses_of_step: step -> losses; `loss` is minimised, the others are logged.
        curve_file: JSON-lines file that the loss curve is appended to.

    Raises:
        TrainingDivergedError: `max_bad_steps` steps in a row without a finite loss.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
    )
    curve, bad = LossCurve(curve_file, stage), 0
    bar = tqdm(range(config.steps), desc=stage, unit="step", mininterval=1.0)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = config.rate(step)
        losses = losses_of_step(step)
        optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(trained, config.clip_norm)
        if torch.isfinite(norm) and torch.isfinite(losses["loss"]):
            optimiser.step()
            bad = 0
            curve.add(losses)
        else:
            bad += 1
            if bad >= min(config.max_bad_steps, config.steps):
                raise TrainingDivergedError(f"{stage}: {bad} steps in a row without a finite loss, last step {step}")
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            means = curve.flush(step + 1, config.rate(step))
            bar.set_postfix({name: f"{value:.3f}" for name, value in list(means.items())[:4]})


def step_generator(seed: int, step: int) -> torch.Generator:
    """CPU generator of one step: draws depend on (seed, step) only, so a resumed run repeats them."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
