"""An evaluation as tables: all rows side by side, motion and landmark tasks apart, by kind, and against another policy.

The same parts become Markdown, text for a terminal and the tables of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from worldvln_edge.runtime.bench.report_table import Part, Table, render
from worldvln_edge.training.evaluation.evaluation import Evaluation
from worldvln_edge.training.evaluation.flight_statistics import (
    Comparison,
    EvalFlight,
    Outcome,
    comparison_tree,
    outcome_tree,
    pairing,
)
from worldvln_edge.training.evaluation.intervals import Interval
from worldvln_edge.training.evaluation.row_flights import EXPERT, POLICY

_SHOWN_ERRORS = 5


def evaluation_markdown(evaluation: Evaluation, title: str) -> str:
    """Title and tables, ending with a line feed.

    Args:
        evaluation: with the policy's row and any others.
        title: what was flown with, on what.
    """
    return render([f"# {title}", *evaluation_parts(evaluation)], markdown=True) + "\n"


def evaluation_parts(evaluation: Evaluation) -> list[Part]:
    """Sentences and tables."""
    trees = {name: outcome_tree(flights) for name, flights in evaluation.rows.items()}
    parts: list[Part] = [_successes(trees), _errors(evaluation, trees)]
    if all("landmark" in tree and "motion" in tree for tree in trees.values()):
        parts += ["Motion tasks (the text says it all) and landmark tasks (the goal must be seen):", _by_group(trees)]
        if len(trees) > 1:
            parts += [
                "Success of the policy minus that of the others, in points, task by task:",
                _pairs(evaluation),
            ]
    parts += ["The policy by kind:", _by_kind(trees[POLICY])]
    if len(trees) > 1:
        parts += ["Success by kind:", _success_by_kind(trees)]
    latencies_ms = [ms for flight in evaluation.rows[POLICY] for ms in flight.latency_ms]
    flown = f" with profile {', '.join(evaluation.profiles)}" if evaluation.profiles else ""
    seconds = ""  # where every flight broke off, no segment was timed
    if latencies_ms:
        seconds = f"{sum(latencies_ms) / len(latencies_ms) / 1e3:.2f} s per segment on average{flown}. "
    rule = evaluation.tasks[0].success
    parts.append(
        f"{seconds}Success: the flight ends within {rule.position_m:g} m and {rule.yaw_deg:g} degrees of the expert's "
        "end, without a collision. Oracle: the same, had it ended at its best pose. Intervals are 95 %: Wilson for "
        "shares, Agresti and Min for differences in pairs, bootstrap for means; p: McNemar's exact test. `policy "
        "nearer`: share of tasks on which the policy ended nearer to the goal than this row. Teacher-forced rows are "
        "shown the frames of the expert's flight: without drift, and for the rgb head without prediction."
    )
    broken = [flight for flights in evaluation.rows.values() for flight in flights if flight.error is not None]
    if broken:
        parts.append(_broken_off(broken))
    return parts


def against_parts(policy: Sequence[EvalFlight], other: Sequence[EvalFlight], name: str) -> list[Part]:
    """Two policies on the same tasks and seeds.

    Args:
        policy, other: rows with the same tasks.
        name: of the other one.

    Raises:
        ValueError: the rows do not hold the same tasks in the same order.
    """
    tree = comparison_tree(policy, other)
    groups: dict[str, Comparison] = {name: tree[name] for name in ("all", "motion", "landmark") if name in tree}
    header = ("tasks", "flights", "success", "other", "difference", "95 %", "won", "lost", "p", "nearer m", "95 %", "p")
    return [
        f"Against {name}, task by task, with the same seeds:",
        Table(header, tuple(_compared(group, each) for group, each in (groups | tree["by_kind"]).items())),
        "Difference of success in points (95 %: Agresti and Min); won and lost: tasks that only one of the two solved, "
        "p: McNemar's exact test. Nearer: how much nearer to the goal the policy ended (95 %: bootstrap over tasks), "
        "p: sign test of the tasks.",
    ]


def _successes(trees: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("row", "flights", "success", "95 %", "oracle", "SPL", "nDTW", "sDTW", "collided", "broke off")
    rows = []
    for name, tree in trees.items():
        result: Outcome = tree["all"]
        rows.append(
            (
                name,
                str(result.flights),
                f"{result.success_rate:.1%}",
                _percent(result.success_interval),
                f"{result.oracle_success_rate:.1%}",
                f"{result.spl:.3f}",
                f"{result.ndtw:.3f}",
                f"{result.sdtw:.3f}",
                str(result.collisions),
                str(result.broken_off),
            )
        )
    return Table(header, tuple(rows))


def _errors(evaluation: Evaluation, trees: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("row", "distance m", "95 %", "median", "nearest m", "yaw deg", "95 %", "median", "policy nearer")
    rows = []
    for name, flights in evaluation.rows.items():
        result: Outcome = trees[name]["all"]
        rows.append(
            (
                name,
                f"{result.mean_distance_m:.2f}",
                _numbers(result.distance_interval_m),
                f"{result.median_distance_m:.2f}",
                f"{result.mean_oracle_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
                _numbers(result.yaw_error_interval_deg, 1),
                f"{result.median_yaw_error_deg:.1f}",
                "" if name == POLICY else f"{pairing(evaluation.rows[POLICY], flights).policy_nearer:.0%}",
            )
        )
    return Table(header, tuple(rows))


def _by_group(trees: Mapping[str, Mapping[str, Any]]) -> Table:
    measured = ("95 %", "distance m", "yaw deg")
    header = ("row", "motion success", *measured, "landmark success", *measured)
    rows = []
    for name, tree in trees.items():
        cells = [name]
        for group in ("motion", "landmark"):
            result: Outcome = tree[group]
            cells += [
                f"{result.success_rate:.1%} of {result.flights}",
                _percent(result.success_interval),
                f"{result.mean_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
            ]
        rows.append(tuple(cells))
    return Table(header, tuple(rows))


def _pairs(evaluation: Evaluation) -> Table:
    measured = ("95 %", "won", "lost", "p")
    rows = []
    for name, flights in evaluation.rows.items():
        if name == POLICY:
            continue
        tree = comparison_tree(evaluation.rows[POLICY], flights)
        rows.append((name, *_difference(tree["motion"]), *_difference(tree["landmark"])))
    return Table(("row", "motion: difference", *measured, "landmark: difference", *measured), tuple(rows))


def _by_kind(policy: Mapping[str, Any]) -> Table:
    header = ("kind", "flights", "success", "95 %", "oracle", "SPL", "nDTW", "sDTW", "distance m", "yaw deg")
    rows = []
    for kind, result in policy["by_kind"].items():
        rows.append(
            (
                kind,
                str(result.flights),
                f"{result.success_rate:.0%}",
                _percent(result.success_interval),
                f"{result.oracle_success_rate:.0%}",
                f"{result.spl:.2f}",
                f"{result.ndtw:.2f}",
                f"{result.sdtw:.2f}",
                f"{result.mean_distance_m:.2f}",
                f"{result.mean_yaw_error_deg:.1f}",
            )
        )
    return Table(header, tuple(rows))


def _success_by_kind(trees: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = [name for name in trees if name != EXPERT]
    rows = []
    for kind in trees[POLICY]["by_kind"]:
        rows.append((kind, *(f"{trees[name]['by_kind'][kind].success_rate:.0%}" for name in shown)))
    return Table(("kind", *shown), tuple(rows))


def _compared(group: str, each: Comparison) -> tuple[str, ...]:
    return (
        group,
        str(each.tasks),
        f"{each.success_rate:.1%}",
        f"{each.other_success_rate:.1%}",
        *_difference(each),
        f"{each.paired.distance_gain_m:+.2f}",
        _numbers(each.paired.distance_gain_interval_m),
        f"{each.paired.nearer_p_value:.2g}",
    )


def _difference(each: Comparison) -> tuple[str, ...]:
    """Points, their interval, tasks won and lost, and p."""
    low, high = each.success.interval
    return (
        f"{100 * each.success.difference:+.1f}",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        str(each.success.gained),
        str(each.success.lost),
        f"{each.success.p_value:.2g}",
    )


def _broken_off(broken: Sequence[EvalFlight]) -> str:
    lines = [f"- {flight.row}, {flight.task}: {flight.error}" for flight in broken[:_SHOWN_ERRORS]]
    more = len(broken) - len(lines)
    lines += [f"- and {more} more, in flights.jsonl"] * bool(more)
    return "\n".join([f"{len(broken)} flights broke off and count as failures:", *lines])


def _percent(interval: Interval) -> str:
    return f"{interval[0]:.0%} to {interval[1]:.0%}"


def _numbers(interval: Interval, digits: int = 2) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
