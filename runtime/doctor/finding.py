"""What an examination finds: one line each, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

State = Literal["ok", "note", "warning", "problem"]
"""`note`: worth knowing. `warning`: flies, but not as it could. `problem`: does not fly as it is."""
_ORDER: tuple[State, ...] = ("ok", "note", "warning", "problem")
_MARKS: dict[State, str] = {"ok": "ok", "note": "--", "warning": "!", "problem": "X"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Raises:
        ValueError: a warning or a problem that says not what to do.
    """

    check: str
    """What was looked at: `gpu`, `clock`, `port 8001`."""
    state: State
    what: str
    """What was found, in one sentence."""
    do: str = ""
    """What to do; may be empty for `ok` and `note` only."""

    def __post_init__(self) -> None:
        if self.state in ("warning", "problem") and not self.do:
            raise ValueError(f"{self.check}: a {self.state} has to say what to do")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All findings, in the order in which they were made."""

    findings: list[Finding]
    result: State
    """The worst of them."""


def report_of(findings: Sequence[Finding]) -> Report:
    """The findings and their worst state; `ok` without any."""
    worst = max((_ORDER.index(finding.state) for finding in findings), default=0)
    return Report(findings=list(findings), result=_ORDER[worst])


def report_text(report: Report) -> str:
    """A line per finding; what to do stands below it. The last line counts."""
    width = max((len(finding.check) for finding in report.findings), default=0)
    lines = []
    for finding in report.findings:
        lines.append(f"{_MARKS[finding.state]:>2}  {finding.check:<{width}}  {finding.what}")
        if finding.do:
            lines.append(f"{'':{width + 6}}-> {finding.do}")
    problems, warnings = (sum(each.state == state for each in report.findings) for state in ("problem", "warning"))
    return "\n".join([*lines, "", f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}"])


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
