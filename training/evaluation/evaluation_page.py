"""An evaluation as one page: the tables, and every flight drawn against the expert, failures first.

The page is a single file that asks no other host for anything and runs no script; it opens from a disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tqdm import tqdm

from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.evaluation import Evaluation
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight
from worldvln_edge.training.evaluation.flight_svg import EXPERT_COLOUR, Paths, height_svg, top_view_svg
from worldvln_edge.training.evaluation.row_flights import POLICY

_POLICY_COLOUR, _OTHER_COLOUR = "#0b6bd3", "#d97706"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #0f172a; margin: 2rem auto; max-width: 84rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .88rem }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { background: #f1f5f9 }
p { max-width: 60rem; white-space: pre-line }
.flights { display: flex; flex-wrap: wrap; gap: 1rem }
.flight { border: 1px solid #e2e8f0; border-radius: 6px; padding: .6rem; width: 240px; font-size: .8rem }
.flight h3 { font-size: .9rem; margin: 0 0 .3rem } .flight svg { display: block; background: #f8fafc }
.flight svg text { font-family: system-ui, sans-serif } .good { color: #15803d } .bad { color: #be123c }
"""


def evaluation_page(
    title: str,
    parts: Sequence[Part],
    evaluation: Evaluation | None = None,
    other: tuple[str, Evaluation] | None = None,
    *,
    show_progress: bool = False,
) -> str:
    """HTML text.

    Args:
        title: heading.
        parts: sentences and tables.
        evaluation: whose policy's flights are drawn; None draws none.
        other: name and flights of another policy on the same tasks, drawn beside them.
        show_progress: a bar on stderr.
    """
    body = [f"<h1>{escape(title)}</h1>", *(_part(part) for part in parts)]
    if evaluation is not None:
        body += ["<h2>Flights</h2>", _legend(other)]
        cards = []
        order = failures_first(evaluation.rows[POLICY])
        for place in tqdm(order, desc="page", unit="flight", disable=not show_progress):
            cards.append(_card(evaluation, place, other))
        body.append(f'<div class="flights">{"".join(cards)}</div>')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def failures_first(flights: Sequence[EvalFlight]) -> list[int]:
    """Places of the flights: broken-off ones, then failures, the farthest from the goal first, then successes."""
    return sorted(
        range(len(flights)),
        key=lambda i: (flights[i].success, flights[i].error is None, -flights[i].final_distance_m, i),
    )


def _part(part: Part) -> str:
    if isinstance(part, Table):
        head = "".join(f"<th>{escape(cell)}</th>" for cell in part.header)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in part.rows)
        return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    return f"<p>{escape(part)}</p>"


def _legend(other: tuple[str, Evaluation] | None) -> str:
    entries = [(_POLICY_COLOUR, "policy"), (EXPERT_COLOUR, "expert (dashed)")]
    if other is not None:
        entries.append((_OTHER_COLOUR, other[0]))
    names = ", ".join(f'<b style="color:{colour}">{escape(name)}</b>' for colour, name in entries)
    return (
        f"<p>{names}. The start is a black dot, looking up; the disc is the goal with the allowed distance. Short "
        "lines show where the drone looks at the end, and where it should look.</p>"
    )


def _card(evaluation: Evaluation, place: int, other: tuple[str, Evaluation] | None) -> str:
    task, flight = evaluation.tasks[place], evaluation.rows[POLICY][place]
    drawn: dict = {}
    lines = [_result("policy", flight)]
    if other is not None:
        name, flown = other
        drawn[name] = (_OTHER_COLOUR, flown.paths[POLICY][place])
        lines.append(_result(name, flown.rows[POLICY][place]))
    drawn["policy"] = (_POLICY_COLOUR, evaluation.paths[POLICY][place])
    return f'<div class="flight">{_heading(task, flight)}{_drawings(task, drawn)}{"".join(lines)}</div>'


def _heading(task: Task, flight: EvalFlight) -> str:
    mark = '<span class="good">&#10003;</span>' if flight.success else '<span class="bad">&#10007;</span>'
    return f"<h3>{mark} {escape(task.instruction)}</h3>{escape(task.task_id)}, {escape(task.kind)}"


def _drawings(task: Task, paths: Paths) -> str:
    return top_view_svg(task, paths) + height_svg(task, paths)


def _result(name: str, flight: EvalFlight) -> str:
    failure = "broke off" if flight.error else "collided" if flight.collided else "failed"
    ended = "success" if flight.success else failure
    css = "good" if flight.success else "bad"
    error = f"<br>{escape(flight.error)}" if flight.error else ""
    return (
        f'<div>{escape(name)}: <b class="{css}">{ended}</b>, {flight.final_distance_m:.2f} m and '
        f"{flight.final_yaw_error_deg:.1f}&deg; from the goal, nDTW {flight.ndtw:.2f}{error}</div>"
    )
