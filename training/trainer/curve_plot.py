"""Pictures of a run's loss curve: one panel per loss or metric; those that differ in numbers only share one."""

from __future__ import annotations

import re
from pathlib import Path

from worldvln_edge.atomic import atomic_file
from worldvln_edge.training.trainer.loss_log import EXTRA_COLUMNS, HELD_OUT, read_curve, writing

_NUMBER = re.compile(r"\d+")
_PANELS, _COLUMNS = 16, 4  # a panel takes a tenth of a second


def plot_curve(curve_file: Path, picture: Path) -> None:
    """Draw the first columns of a loss curve over the steps; nothing where the curve is empty.

    A metric of held-out rows is dashed, in the panel of the training loss of that name if there is one.

    Raises:
        LogWriteError: the disk is full.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    rows = read_curve(curve_file)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and (name not in EXTRA_COLUMNS or name == "lr"):
                panel = _NUMBER.sub("*", name.removeprefix(HELD_OUT))
                panels.setdefault(panel, {}).setdefault(name, []).append((row["step"], value))
    if not panels:
        return
    shown = dict(list(panels.items())[:_PANELS])
    lines = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3 * lines))
    for index, (title, curves) in enumerate(shown.items()):
        axes = figure.add_subplot(lines, _COLUMNS, index + 1)
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            marker, style = "." if len(points) < 30 else None, "--" if name.startswith(HELD_OUT) else "-"
            axes.plot(steps, values, style, marker=marker)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    rest = f"; {len(panels) - len(shown)} more in {curve_file.name}" if len(panels) > len(shown) else ""
    figure.suptitle(f"{rows[0]['stage']}, over optimiser steps; dashed: held-out rows{rest}")
    figure.subplots_adjust(left=0.05, right=0.98, top=1 - 0.6 / (3 * lines), bottom=0.1 / lines, hspace=0.4, wspace=0.3)
    with writing(picture), atomic_file(picture) as building:
        figure.savefig(building, dpi=80)
