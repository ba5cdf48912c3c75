"""An evaluation as Markdown: all rows side by side, motion and landmark tasks apart, and the policy by kind."""

from __future__ import annotations

from collections.abc import Sequence

from worldvln_edge.training.evaluation.evaluation import EXPERT, POLICY, Evaluation
from worldvln_edge.training.evaluation.flight_statistics import Outcome, outcome_tree, pairing


def evaluation_markdown(evaluation: Evaluation, title: str) -> str:
    """The tables, ending with a line feed.

    Args:
        evaluation: with the policy's row and any others.
        title: what was flown with, on what.
    """
    trees = {name: outcome_tree(flights) for name, flights in evaluation.rows.items()}
    parts = [f"# {title}", _overall(evaluation, trees)]
    if all("landmark" in tree and "motion" in tree for tree in trees.values()):
        parts += ["Motion tasks (the text says it all) and landmark tasks (the goal must be seen):", _by_group(trees)]
    parts += ["By kind:", _by_kind(trees)]
    latencies_ms = [ms for flight in evaluation.rows[POLICY] for ms in flight.latency_ms]
    flown = f" with profile {', '.join(evaluation.profiles)}" if evaluation.profiles else ""
    parts.append(
        f"{sum(latencies_ms) / len(latencies_ms) / 1e3:.2f} s per segment on average{flown}. Success intervals are "
        "95 % (Wilson). `policy nearer`: share of tasks on which the policy ended nearer to the goal than this row."
    )
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, aligned also as plain text."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(ruler)} |", *(line(row) for row in rows)])


def _overall(evaluation: Evaluation, trees: dict[str, dict]) -> str:
    header = ("row", "flights", "success", "95 %", "distance m", "median", "yaw deg", "median", "policy nearer")
    rows = []
    for name, flights in evaluation.rows.items():
        result: Outcome = trees[name]["all"]
        low, high = result.success_interval
        nearer = "" if name == POLICY else f"{pairing(evaluation.rows[POLICY], flights).policy_nearer:.0%}"
        rows.append(
            (
                name,
                str(result.flights),
                f"{result.success_rate:.1%}",
                f"{low:.0%} to {high:.0%}",
                f"{result.mean_distance_m:.2f}",
                f"{result.median_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
                f"{result.median_yaw_error_deg:.1f}",
                nearer,
            )
        )
    return markdown_table(header, rows)


def _by_group(trees: dict[str, dict]) -> str:
    header = ("row", "motion success", "distance m", "yaw deg", "landmark success", "distance m", "yaw deg")
    rows = []
    for name, tree in trees.items():
        cells = [name]
        for group in ("motion", "landmark"):
            result: Outcome = tree[group]
            cells += [
                f"{result.success_rate:.1%} of {result.flights}",
                f"{result.mean_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
            ]
        rows.append(cells)
    return markdown_table(header, rows)


def _by_kind(trees: dict[str, dict]) -> str:
    shown = [name for name in trees if name not in (POLICY, EXPERT)]
    header = ("kind", "flights", "policy success", "distance m", "yaw deg", *(f"{name} success" for name in shown))
    rows = []
    for kind, result in trees[POLICY]["by_kind"].items():
        rows.append(
            (
                kind,
                str(result.flights),
                f"{result.success_rate:.0%}",
                f"{result.mean_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
                *(f"{trees[name]['by_kind'][kind].success_rate:.0%}" for name in shown),
            )
        )
    return markdown_table(header, rows)
