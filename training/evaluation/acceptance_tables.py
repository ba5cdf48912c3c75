"""The acceptance list as tables: of one checkpoint beside both presets' limits, and of several with their verdict."""

from __future__ import annotations

from collections.abc import Sequence

from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.training.evaluation.acceptance import LIMITS_OF, AcceptanceLine, Verdict, is_accepted


def acceptance_table(lines: Sequence[AcceptanceLine]) -> Table:
    """One checkpoint beside the limits of every preset; lines without a value say why."""
    header = ("acceptance", "value", *(cell for preset in LIMITS_OF for cell in (f"{preset} asks", "holds")))
    rows = []
    for line in lines:
        cells = [line.metric, _value(line.value, line.detail)]
        for preset in LIMITS_OF:
            cells += [f"{line.relation} {line.limit(preset):g}", _word(line.holds(preset))]
        rows.append(tuple(cells))
    return Table(header, tuple(rows))


def verdict_parts(names: Sequence[str], verdicts: Sequence[Verdict]) -> list[Part]:
    """All checkpoints in one table, and what it comes to.

    Args:
        names: of the checkpoints, in the order of the values.
        verdicts: of all lines.
    """
    has_several = len(names) > 1
    means = ("mean", "SE", "holds") if has_several else ()
    header = ("acceptance", "asked", *names, *means, "accepted")
    rows = []
    for verdict in verdicts:
        cells = [verdict.metric, f"{verdict.relation} {verdict.limit:g}"]
        cells += [_value(value, detail) for value, detail in zip(verdict.values, verdict.details, strict=True)]
        if has_several:
            cells += [_number(verdict.mean), _number(verdict.standard_error), f"{verdict.held} of {len(names)}"]
        rows.append((*cells, _word(verdict.is_accepted) if verdict.is_applicable else "n/a"))
    return [Table(header, tuple(rows)), _conclusion(names, verdicts)]


def _conclusion(names: Sequence[str], verdicts: Sequence[Verdict]) -> str:
    asked = [verdict for verdict in verdicts if verdict.is_applicable]
    unmeasured = [verdict.metric for verdict in asked if verdict.is_accepted is None]
    failed = [verdict.metric for verdict in asked if verdict.is_accepted is False]
    held = len(asked) - len(unmeasured) - len(failed)
    rule = f" A line must hold for {verdicts[0].needed} of {len(names)} checkpoints." if len(names) > 1 else ""
    said = "Accepted" if is_accepted(verdicts) else "Not accepted"
    parts = [f"{said}: {held} of {len(asked)} lines hold.{rule}"]
    parts += [f"Do not hold: {'; '.join(failed)}."] * bool(failed)
    parts += [f"Not measured: {'; '.join(unmeasured)}."] * bool(unmeasured)
    return " ".join(parts)


def _value(value: float | None, detail: str) -> str:
    if value is None:
        return detail or "-"
    return f"{value:.3f} ({detail})" if detail else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _word(holds: bool | None) -> str:
    return "" if holds is None else "yes" if holds else "no"
