"""The table of a GRPO run: a row per collection, as JSON lines, as text while it runs, and as pictures at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from worldvln_edge.atomic import atomic_file
from worldvln_edge.training.trainer.loss_log import read_curve

TABLE_FILE, TABLE_PICTURE = "collections.jsonl", "collections.png"
Row = Mapping[str, float | None]
"""None stands for a number that is not known, as JSON has no NaN."""

_COLUMNS: tuple[tuple[str, str, int, str], ...] = (
    ("collection", "coll", 4, "d"),
    ("environment_steps_total", "env steps", 9, "d"),
    ("reward", "reward", 7, ".4f"),
    ("success", "success", 7, ".3f"),
    ("k3", "k3", 8, ".5f"),
    ("clipped", "clipped", 7, ".3f"),
    ("drift", "drift", 8, ".1e"),
    ("steps_per_s", "steps/s", 7, ".1f"),
    ("learner_share", "learner", 7, ".2f"),
    ("failed", "failed", 6, "d"),
    ("held_out_reward", "held-out", 8, ".4f"),
    ("held_out_difference", "minus SFT", 9, "+.4f"),
    ("held_out_error", "+-", 6, ".4f"),
    ("held_out_success", "success", 7, ".3f"),
)
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward of a segment (dashed: held-out tasks)", ("reward", "held_out_reward")),
    ("success (dashed: held-out tasks)", ("success", "held_out_success")),
    ("held-out reward minus SFT, +- 2 standard errors", ("held_out_difference",)),
    ("k3 per bit, last pass", ("k3",)),
    ("clipped fraction, last pass", ("clipped",)),
    ("environment steps per second", ("steps_per_s",)),
    ("learner's share of time", ("learner_share",)),
    ("environment steps saved by early stopping", ("steps_saved",)),
)


class RunTable:
    """Rows on disk; only the first rank has one.

    Args:
        file: JSON lines.
        done: collections that are done; later rows are of an interrupted run, and dropped.
        show: takes a line of text.
    """

    def __init__(self, file: Path, *, done: int, show: Callable[[str], None] | None = None):
        self._file, self._show = file, show
        self.rows: list[Row] = [row for row in read_curve(file) if row["collection"] <= done]
        self._write()
        if show is not None:
            show(header_line())

    def add(self, row: Row) -> None:
        """Append a row, or replace that of the same collection; `environment_steps_total` is added to it."""
        before = [old for old in self.rows if _number(old, "collection") < _number(row, "collection")]
        steps = sum(_number(one, "environment_steps") for one in (*before, row))
        row = {**row, "environment_steps_total": steps}
        self.rows = [*before, row]
        self._write()
        if self._show is not None:
            self._show(row_line(row))

    def _write(self) -> None:
        with atomic_file(self._file) as building:
            building.write_text("".join(json.dumps(_plain(row)) + "\n" for row in self.rows), encoding="utf-8")


def header_line() -> str:
    """Names of the columns."""
    return " ".join(f"{title:>{width}}" for _, title, width, _ in _COLUMNS)


def row_line(row: Row) -> str:
    """A row as text; `-` where it has no value."""
    return " ".join(_cell(row.get(name), width, form) for name, _, width, form in _COLUMNS)


def _cell(value: float | None, width: int, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "-".rjust(width)
    return format(int(value) if form == "d" else value, form).rjust(width)


def plot_table(rows: Sequence[Row], picture: Path) -> None:
    """Draw the table over the environment steps; nothing where it is empty."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    if not rows:
        return
    figure = Figure(figsize=(16, 7))
    for index, (title, names) in enumerate(_PANELS):
        axes = figure.add_subplot(2, 4, index + 1)
        for name in names:
            drawn = [row for row in rows if math.isfinite(_number(row, name, math.nan))]
            if not drawn:
                continue
            steps = [_number(row, "environment_steps_total") for row in drawn]
            values = [_number(row, name) for row in drawn]
            style = "--" if name.startswith("held_out_") and len(names) > 1 else "-"
            axes.plot(steps, values, style, marker=".")
            if name == "held_out_difference":
                errors = [2 * _number(row, "held_out_error") for row in drawn]
                axes.errorbar(steps, values, errors, fmt="none", capsize=3)
                axes.axhline(0, color="grey", linewidth=0.5)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("environment steps", fontsize=8)
        axes.grid(alpha=0.3)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.95, bottom=0.07, hspace=0.35, wspace=0.22)
    with atomic_file(picture) as building:
        figure.savefig(building, format="png", dpi=80)


def _number(row: Row, name: str, otherwise: float = 0.0) -> float:
    value = row.get(name)
    return otherwise if value is None else value


def _plain(row: Row) -> dict[str, float | None]:
    return {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
