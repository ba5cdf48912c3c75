"""The acceptance list of training, stages VAE to action: what is measured, what a preset must reach, and the verdict
over checkpoints that differ by their seed.

A line is accepted when it holds for two of three seeds; in general for at least two thirds of the checkpoints.
Source: spec/training.md 8.4.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from worldvln_edge.training.stages.motion_metrics import COLUMNS

if TYPE_CHECKING:
    from worldvln_edge.training.evaluation.open_loop import OpenLoopReport
    from worldvln_edge.training.evaluation.overfit import OverfitReport

Metrics = Mapping[str, float]
LimitsOf = Literal["nano", "mini"]
LIMITS_OF: tuple[LimitsOf, ...] = ("nano", "mini")
"""Presets that the list has limits for."""
State = Literal["measured", "not measured", "not applicable"]

_RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_LN_2 = math.log(2)
_OVERFIT_CE = 0.05


class AcceptanceLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list for one checkpoint."""

    metric: str
    relation: str
    """Of the value to its limit: <, <=, > or >=."""
    nano: float
    """Limit for `nano`."""
    mini: float
    value: float | None
    """None unless measured."""
    state: State = "measured"
    detail: str = ""
    """What stands behind the value, or why there is none."""

    def limit(self, preset: LimitsOf) -> float:
        return self.nano if preset == "nano" else self.mini

    def holds(self, preset: LimitsOf) -> bool | None:
        """Whether the value is on the right side of the preset's limit; None where there is no value."""
        return None if self.value is None else _RELATIONS[self.relation](self.value, self.limit(preset))


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list over all checkpoints."""

    metric: str
    relation: str
    limit: float
    values: tuple[float | None, ...]
    """By checkpoint."""
    details: tuple[str, ...]
    states: tuple[State, ...]
    mean: float | None
    standard_error: float | None
    """Of the mean, between checkpoints; None for fewer than two values."""
    held: int
    needed: int
    """Checkpoints that the line must hold for."""
    is_accepted: bool | None
    """None: nothing was measured."""

    @property
    def is_applicable(self) -> bool:
        return any(state != "not applicable" for state in self.states)


def acceptance_lines(report: OpenLoopReport, overfit: OverfitReport | None = None) -> list[AcceptanceLine]:
    """The list for one checkpoint.

    Columns that do not move (roll and pitch in the simulator) have no line; every other metric that is missing has one
    that says so.

    Args:
        report: all stages on held-out flights.
        overfit: None: the line says that it was not measured.
    """
    backbone, action = report.backbone, report.action
    majority = "majority_bit_ce"
    best = min(_LN_2, backbone.get(f"semantic_{majority}", _LN_2))
    lines = [
        _line(
            "vae: reconstruction MSE / variance about the mean image", "<", (0.6, 0.15), report.vae.get("unexplained")
        ),
        _line("sft: bit CE / ln 2", "<", (1.0, 1.0), _ratio(backbone.get("bit_ce"), _LN_2)),
        _line("sft: bit CE / majority", "<", (1.0, 1.0), _ratio(backbone.get("bit_ce"), backbone.get(majority))),
        _line(
            "sft: semantic bit CE / best of the two", "<=", (0.9, 0.75), _ratio(backbone.get("semantic_bit_ce"), best)
        ),
        _text_line(backbone),
        _overfit_line(overfit),
        _adapter_line(report),
    ]
    for column in COLUMNS:
        if f"nmse_{column}" in action:
            lines.append(_line(f"action: NMSE {column}", "<", (0.6, 0.2), action[f"nmse_{column}"]))
    for what, name, unit in (("endpoint_m", "endpoint distance", "m"), ("yaw_deg", "yaw error", "deg")):
        own, of_mean = action.get(f"segment_{what}"), action.get(f"segment_mean_{what}")
        detail = "" if own is None or of_mean is None else f"{own:.3g} / {of_mean:.3g} {unit}"
        metric = f"action: {name} of a segment / of integrating the mean"
        lines.append(_line(metric, "<=", (0.6, 0.3), _ratio(own, of_mean), detail))
    for column in COLUMNS:
        if f"nmse_{column}" in report.shuffled:
            control = report.shuffled[f"nmse_{column}"]
            lines.append(_line(f"control: NMSE {column}, frames shuffled", ">=", (0.95, 0.9), control))
    return lines


def verdicts(by_checkpoint: Sequence[Sequence[AcceptanceLine]], preset: LimitsOf) -> list[Verdict]:
    """All checkpoints' lines as one list, in the order in which they first come.

    Args:
        by_checkpoint: `acceptance_lines` of at least one checkpoint.
        preset: whose limits.
    """
    names = dict.fromkeys(line.metric for lines in by_checkpoint for line in lines)
    found = [{line.metric: line for line in lines} for lines in by_checkpoint]
    return [_verdict([lines.get(name) for lines in found], preset) for name in names]


def needed(checkpoints: int) -> int:
    """How many of them a line must hold for: two of three."""
    return math.ceil(2 * checkpoints / 3)


def is_accepted(of_lines: Sequence[Verdict]) -> bool:
    """Whether every line that applies was measured and holds."""
    return all(verdict.is_accepted for verdict in of_lines if verdict.is_applicable)


def _verdict(lines: Sequence[AcceptanceLine | None], preset: LimitsOf) -> Verdict:
    first = next(line for line in lines if line is not None)
    measured = [line.value for line in lines if line is not None and line.value is not None]
    held = sum(bool(line.holds(preset)) for line in lines if line is not None)
    spread = statistics.stdev(measured) / math.sqrt(len(measured)) if len(measured) > 1 else None
    return Verdict(
        metric=first.metric,
        relation=first.relation,
        limit=first.limit(preset),
        values=tuple(None if line is None else line.value for line in lines),
        details=tuple("" if line is None else line.detail for line in lines),
        states=tuple("not measured" if line is None else line.state for line in lines),
        mean=statistics.fmean(measured) if measured else None,
        standard_error=spread,
        held=held,
        needed=needed(len(lines)),
        is_accepted=held >= needed(len(lines)) if measured else None,
    )


def _line(
    metric: str, relation: str, limits: tuple[float, float], value: float | None, detail: str = ""
) -> AcceptanceLine:
    nano, mini = limits
    return AcceptanceLine(
        metric=metric,
        relation=relation,
        nano=nano,
        mini=mini,
        value=value,
        state="not measured" if value is None else "measured",
        detail=detail,
    )


def _text_line(backbone: Metrics) -> AcceptanceLine:
    effect, error = backbone.get("text_effect"), backbone.get("text_effect_error")
    detail = "" if effect is None or error is None else f"{effect:.4f} ± {error:.4f}"
    metric = "sft: semantic bit CE, true minus shuffled instruction, in its standard errors"
    return _line(metric, "<", (-2.0, -2.0), _ratio(effect, error), detail)


def _overfit_line(overfit: OverfitReport | None) -> AcceptanceLine:
    metric = "sft: bit CE of few sequences, overfitted"
    if overfit is None:
        return _line(metric, "<", (_OVERFIT_CE, _OVERFIT_CE), None, "not measured")
    detail = f"{overfit.rows} sequences, {overfit.steps} steps"
    return _line(metric, "<", (_OVERFIT_CE, _OVERFIT_CE), overfit.bit_ce, detail)


def _adapter_line(report: OpenLoopReport) -> AcceptanceLine:
    line = _line("adapter: cosine to the teacher", ">", (0.6, 0.8), report.adapter.get("cosine"))
    if report.is_adapter_distilled:
        return line
    reason = "trained with the action head, not distilled"
    return msgspec.structs.replace(line, value=None, state="not applicable", detail=reason)


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None
