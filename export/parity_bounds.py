"""What a bundle may differ from PyTorch: one row per stage, and where the bounds come from.

| rows                    | held against                              | bound                                        |
|-------------------------|-------------------------------------------|----------------------------------------------|
| stages, actions, flight | PyTorch with the bundle's rounded weights | `FLOORS` + a multiple of the model's noise   |
| precision_cost          | the checkpoint in float32                 | one number per precision                     |

The noise is measured anew for every bundle, on the same flights, in PyTorch alone (`stage_noise`). docs/precision.md
has the measured ratios that the multiples rest on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

RUN_PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""Precisions that ONNX Runtime's CPU provider runs, as long as the compute dtype is not bf16."""


class VerifyError(ValueError):
    """A bundle that cannot be compared with this checkpoint."""


@dataclass(frozen=True, kw_only=True)
class StageBounds:
    """Limits of the measures of one stage; a measure without a limit is only reported."""

    at_most: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)

    def failures(self, values: Mapping[str, float]) -> list[str]:
        """One phrase per measure that is out of bounds; NaN is."""
        above = [
            f"{name} {values[name]:.2g} > {limit:.2g}"
            for name, limit in self.at_most.items()
            if name in values and not values[name] <= limit
        ]
        below = [
            f"{name} {values[name]:.6f} < {limit:.6g}"
            for name, limit in self.at_least.items()
            if name in values and not values[name] >= limit
        ]
        return above + below


@dataclass
class ParityRow:
    """One line of the table: a stage, its measures, and why it failed if it did."""

    stage: str
    values: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    note: str = ""
    bounds: StageBounds = field(default_factory=StageBounds)

    def measures(self) -> dict[str, float]:
        """The numbers that JSON can hold, with the bound of a measure beside it as `..._bound`."""
        limits = {**self.bounds.at_most, **self.bounds.at_least}
        numbers = self.values | {f"{name}_bound": limit for name, limit in limits.items() if name in self.values}
        return {name: float(value) for name, value in numbers.items() if np.isfinite(value)}


def bounded_row(stage: str, values: dict[str, float], bounds: StageBounds, note: str = "") -> ParityRow:
    """A row whose failures are what `bounds` says."""
    return ParityRow(stage, values, bounds.failures(values), note, bounds)


class Differences:
    """Sums over pairs of arrays of one stage.

    `relative_max` and `relative_rms` are in units of the reference's root mean square, so one bound serves small and
    large activations.
    """

    def __init__(self) -> None:
        self.max_abs, self._error, self._sum_abs, self._reference, self._count = 0.0, 0.0, 0.0, 0.0, 0

    def add(self, found: np.ndarray, expected: np.ndarray) -> None:
        """One pair. Raises VerifyError when the shapes differ."""
        if found.shape != expected.shape:
            raise VerifyError(f"the bundle gives shape {found.shape} where the checkpoint gives {expected.shape}")
        # A NaN must fail, so it counts as an infinite difference.
        difference = np.nan_to_num(np.abs(found.astype(np.float64) - expected), nan=np.inf, posinf=np.inf)
        self.max_abs = max(self.max_abs, float(difference.max(initial=0.0)))
        self._error += float((difference**2).sum())
        self._sum_abs += float(difference.sum())
        self._reference += float((expected.astype(np.float64) ** 2).sum())
        self._count += difference.size

    def values(self) -> dict[str, float]:
        """max_abs, relative_max and relative_rms."""
        reference = max(self._reference, 1e-30)
        return {
            "max_abs": self.max_abs,
            "relative_max": self.max_abs / float(np.sqrt(reference / max(self._count, 1))),
            "relative_rms": float(np.sqrt(self._error / reference)),
        }

    @property
    def mean_abs(self) -> float:
        return self._sum_abs / max(self._count, 1)


NOISE_FACTORS = {"relative_max": 4.0, "max_abs": 4.0, "action_cm": 4.0, "action_deg": 4.0}
"""How many times the noise of the model a difference may be; `_MEAN_FACTOR` for means, which vary less."""
_MEAN_FACTOR = 2.5
FLOORS = {
    "relative_max": 5e-6,
    "relative_rms": 1e-6,
    "max_abs": 1e-5,
    "mean_abs": 2e-7,
    "action_cm": 1e-4,
    "action_deg": 2e-5,
}
"""What every bound is at least: rounding to float32 of results whose noise happens to be zero."""
_RELATIVE = ("relative_max", "relative_rms")
_BOUNDED = {"world_model": ("max_abs", "mean_abs"), "actions": ("action_cm", "action_deg")}
# The quantiser runs on the host in float32, whatever the bundle's precision: a bit may differ where a residual is zero
# up to rounding, and then its code does.
_QUANTISER = StageBounds(at_least={"bits_equal": 1.0 - 1e-4})
_CODES = 1e-6  # summed in float32 from the same bits, whatever the precision
_OBSERVED = {"fp32": 0.999, "fp16": 0.998}
_COST = {"fp16": 0.0012, "int8": 0.06, "int4": 0.2}


def action_difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Absolute differences [N, 6]; a NaN counts as an infinite one."""
    return np.nan_to_num(np.abs(found.astype(np.float64) - expected), nan=np.inf)


def action_values(differences: list[np.ndarray]) -> dict[str, float]:
    """Largest, median and 95th percentile over actions of the worst axis: cm of translation, deg of rotation."""
    values = {}
    joined = np.concatenate(differences)
    for unit, axes in (("cm", slice(0, 3)), ("deg", slice(3, 6))):
        worst = joined[:, axes].max(1)
        values[f"action_{unit}"] = float(worst.max())
        values[f"action_{unit}_median"] = float(np.median(worst))
        values[f"action_{unit}_p95"] = float(np.quantile(worst, 0.95, method="higher"))
    return values


def bounds_from_noise(noise: Mapping[str, Mapping[str, float]], compute: str) -> dict[str, StageBounds]:
    """Bounds of every stage that is run.

    Args:
        noise: stage -> measure -> value of `stage_noise`.
        compute: fp32 or fp16.
    """
    bounds = {"quantiser": _QUANTISER}
    for stage, measures in noise.items():
        limits = {
            name: FLOORS[name] + NOISE_FACTORS.get(name, _MEAN_FACTOR) * value
            for name, value in measures.items()
            if name in _BOUNDED.get(stage, _RELATIVE)
        }
        bounds[stage] = StageBounds(at_most=limits)
    codes = {"codes_max_abs": _CODES}
    bounds["world_model"] = StageBounds(at_most={**bounds["world_model"].at_most, **codes})
    bounds["flight"] = StageBounds(
        at_most={**bounds["actions"].at_most, "first_flip_margin": bounds["world_model"].at_most["max_abs"]},
        at_least={"observed_bits_equal": _OBSERVED[compute]},
    )
    return bounds


def cost_bounds(precision: str) -> StageBounds:
    """Bounds of what a precision may cost, against the checkpoint in float32."""
    return StageBounds(at_most={"mean_abs": _COST[precision]})


def runs_on_cpu(precision: str, compute: str) -> bool:
    """Does ONNX Runtime's CPU provider run bundles of this precision?"""
    return precision in RUN_PRECISIONS and compute != "bf16"
