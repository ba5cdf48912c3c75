"""What a bundle may differ from PyTorch: one row per stage, one table of bounds per precision.

The text encoder, the VAE and the action heads are stored in the compute dtype whatever the precision, so their bounds
are those of the compute dtype. The world model has bounds of its own for every precision. Every bound lies two to
five times above the worst value that was measured; docs/precision.md has the values and the command that prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

TIE = 3e-5
"""A drawn bit of an fp32 bundle may flip where its uniform number lies closer than this to its probability: the bound
of the probabilities themselves."""

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

    def measures(self) -> dict[str, float]:
        """The numbers that JSON can hold."""
        return {name: float(value) for name, value in self.values.items() if np.isfinite(value)}


def bounded_row(stage: str, values: dict[str, float], bounds: StageBounds) -> ParityRow:
    """A row whose failures are what `bounds` says."""
    return ParityRow(stage, values, bounds.failures(values))


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


def _stage(relative_max: float, relative_rms: float) -> StageBounds:
    return StageBounds(at_most={"relative_max": relative_max, "relative_rms": relative_rms})


# The quantiser runs on the host in float32, whatever the bundle's precision: a bit may differ where a residual is zero
# up to rounding, and then its code does.
_QUANTISER = StageBounds(at_least={"bits_equal": 1.0 - 1e-4})

_COMPUTE: dict[str, dict[str, StageBounds]] = {
    "fp32": {
        "text_encoder": _stage(1e-5, 2e-6),
        "vae_encoder": _stage(2e-5, 3e-6),
        "quantiser": _QUANTISER,
        "vae_decoder": _stage(2e-5, 5e-6),
        "vae_pixels": _stage(3e-5, 3e-6),
        "action_head": _stage(2e-5, 4e-6),
        "rgb_head": _stage(1e-5, 4e-6),
        "actions": StageBounds(at_most={"action_cm": 5e-4, "action_deg": 1e-4}),
    },
    "fp16": {
        "text_encoder": _stage(0.008, 0.001),
        "vae_encoder": _stage(0.01, 0.002),
        "quantiser": _QUANTISER,
        "vae_decoder": _stage(0.02, 0.0025),
        "vae_pixels": _stage(0.008, 0.0012),
        "action_head": _stage(0.008, 0.002),
        "rgb_head": _stage(0.015, 0.004),
        "actions": StageBounds(at_most={"action_cm": 0.08, "action_deg": 0.03}),
    },
}

_CODES = 1e-6  # summed in float32 from the same bits, whatever the precision


def _world_model(
    *, mean_abs: float, drawn: float, cm: tuple[float, float], deg: tuple[float, float]
) -> dict[str, StageBounds]:
    """Bounds below fp32; cm and deg: median and 95th percentile of the actions of free flights."""
    at_most = {
        "action_cm_median": cm[0],
        "action_cm_p95": cm[1],
        "action_deg_median": deg[0],
        "action_deg_p95": deg[1],
    }
    return {
        "world_model": StageBounds(at_most={"mean_abs": mean_abs, "codes_max_abs": _CODES}),
        "flight": StageBounds(at_most=at_most, at_least={"observed_bits_equal": 0.998, "drawn_bits_equal": drawn}),
    }


_WORLD_MODEL: dict[str, dict[str, StageBounds]] = {
    "fp32": {
        "world_model": StageBounds(at_most={"max_abs": TIE, "mean_abs": 1e-6, "codes_max_abs": _CODES}),
        "flight": StageBounds(
            at_most={"first_flip_margin": TIE, "action_cm": 5e-4, "action_deg": 1e-4},
            at_least={"observed_bits_equal": 0.999},
        ),
    },
    "fp16": _world_model(mean_abs=0.0012, drawn=0.945, cm=(0.02, 0.6), deg=(0.005, 0.2)),
    "int8": _world_model(mean_abs=0.06, drawn=0.65, cm=(0.5, 5.0), deg=(0.15, 1.5)),
    "int4": _world_model(mean_abs=0.2, drawn=0.5, cm=(2.0, 7.0), deg=(0.5, 2.0)),
}

DISTRIBUTION_FLIGHTS = 8
"""With fewer flights one early flip decides a percentile, so only the median and the observed bits are bounded."""
_OF_MANY_FLIGHTS = ("action_cm_p95", "action_deg_p95", "drawn_bits_equal")


def bounds_of_flights(bounds: StageBounds, flights: int) -> StageBounds:
    """The bounds of the row `flight` that hold for so many flights."""
    if flights >= DISTRIBUTION_FLIGHTS:
        return bounds
    kept = [{k: v for k, v in part.items() if k not in _OF_MANY_FLIGHTS} for part in (bounds.at_most, bounds.at_least)]
    return StageBounds(at_most=kept[0], at_least=kept[1])


def runs_on_cpu(precision: str, compute: str) -> bool:
    """Does ONNX Runtime's CPU provider run bundles of this precision?"""
    return precision in RUN_PRECISIONS and compute != "bf16"


def bounds_for(precision: str, compute: str) -> dict[str, StageBounds]:
    """Bounds of every stage that runs.

    Raises:
        VerifyError: a precision that nothing here runs.
    """
    if not runs_on_cpu(precision, compute):
        raise VerifyError(
            f"precision {precision} computed in {compute} does not run here, so there are no bounds for it; "
            f"known: {', '.join(RUN_PRECISIONS)} computed in fp32 or fp16"
        )
    return {**_COMPUTE[compute], **_WORLD_MODEL[precision]}
