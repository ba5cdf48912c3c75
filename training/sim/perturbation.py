"""Disturbed expert flights: the drone is pushed off the path and the expert steers back.

A policy that was trained on perfect flights only has never seen how to return to the path. Here smooth noise and one
push move the expert's path, and the expert closes a share of the error with every step.
Source: spec/training.md 8.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldvln_edge.training.sim.expert import EXPERT_STEPS

_AXES = [0, 1, 2, 4]  # x, y, z, yaw


@dataclass(frozen=True, kw_only=True)
class PerturbationConfig:
    """How strongly flights are disturbed; cm and deg per step for the noise, cm and deg in all for the push."""

    share: float = 0.7  # of the flights; the others are the expert's own
    noise_horizontal_cm: float = 1.2
    noise_vertical_cm: float = 0.8
    noise_yaw_deg: float = 0.35
    noise_steps: float = 6.0  # correlation of the noise
    push_probability: float = 0.7
    push_horizontal_cm: float = 60.0  # standard deviation of a push
    push_vertical_cm: float = 25.0
    push_yaw_deg: float = 10.0
    push_steps: int = 8
    push_start: tuple[int, int] = (0, 28)  # first step of the push: from, to; 0 disturbs the start itself
    recovery: float = 0.12  # share of the error that the expert removes in a step
    quiet_steps: int = 10  # no noise at the end: the flight still arrives

    def __post_init__(self) -> None:
        for name in ("share", "push_probability", "recovery"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"perturbation.{name} must be 0..1, found {getattr(self, name)}")
        first, last = self.push_start
        if not 0 <= first <= last <= EXPERT_STEPS - self.push_steps:
            raise ValueError(
                f"perturbation.push_start must lie in 0..{EXPERT_STEPS - self.push_steps}, found {self.push_start}"
            )


def perturb_path(path_T6: np.ndarray, config: PerturbationConfig, rng: np.random.Generator) -> np.ndarray:
    """A disturbed flight along a path: poses float64 [T, 6] with the same start.

    Args:
        path_T6: the expert's poses, cm and deg.
        config: strengths; `share` is not looked at here.
        rng: source of the noise.
    """
    steps = len(path_T6) - 1
    push = _disturbance(steps, config, rng)
    flown = np.array(path_T6, np.float64)
    for t in range(steps):
        onwards = path_T6[t + 1] - path_T6[t] + config.recovery * (path_T6[t] - flown[t])
        flown[t + 1] = flown[t] + onwards
        flown[t + 1, _AXES] += push[t]
    return flown


def _disturbance(steps: int, config: PerturbationConfig, rng: np.random.Generator) -> np.ndarray:
    """Unwanted motion of every step: float64 [steps, 4], x y z in cm, yaw in deg."""
    deviations = np.array(
        [config.noise_horizontal_cm, config.noise_horizontal_cm, config.noise_vertical_cm, config.noise_yaw_deg]
    )
    keep = np.exp(-1.0 / config.noise_steps)
    noise = np.empty((steps, 4))
    state = rng.standard_normal(4)
    for t in range(steps):
        noise[t] = state
        state = keep * state + np.sqrt(1.0 - keep**2) * rng.standard_normal(4)
    noise *= deviations
    noise *= np.clip((steps - 1 - np.arange(steps)) / config.quiet_steps, 0.0, 1.0)[:, None]
    if rng.random() < config.push_probability:
        first = int(rng.integers(config.push_start[0], config.push_start[1] + 1))
        total = np.clip(rng.standard_normal(4), -2.0, 2.0) * np.array(
            [config.push_horizontal_cm, config.push_horizontal_cm, config.push_vertical_cm, config.push_yaw_deg]
        )
        bump = np.sin(np.pi * (np.arange(config.push_steps) + 0.5) / config.push_steps)
        noise[first : first + config.push_steps] += bump[:, None] / bump.sum() * total
    return noise
