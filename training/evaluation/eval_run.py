"""One run of `worldvln-edge eval`: fly, compare, and write what there is to read.

    flights.jsonl   every finished flight, written as it ends; an interrupted run goes on from it
    eval.json       everything but the paths
    eval.md         the tables
    eval.html       the tables and a drawing of every flight, failures first

The last three appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tqdm import tqdm

from worldvln_edge.atomic import atomic_file
from worldvln_edge.runtime.bench.report_table import Part, render
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.baselines import ActionTables
from worldvln_edge.training.evaluation.evaluation import Evaluation, evaluate
from worldvln_edge.training.evaluation.evaluation_page import evaluation_page
from worldvln_edge.training.evaluation.evaluation_tables import against_parts, evaluation_parts
from worldvln_edge.training.evaluation.flight_log import LOG_FILE, FlightLog
from worldvln_edge.training.evaluation.flight_report import write_json
from worldvln_edge.training.evaluation.policy_choice import RECORD_FILE, PolicyChoice, finished_flights
from worldvln_edge.training.evaluation.row_flights import POLICY
from worldvln_edge.training.sim.tasks import Split, generate_task

if TYPE_CHECKING:
    from worldvln_edge.training.evaluation.open_loop import OpenLoopReport

MARKDOWN_FILE, PAGE_FILE = "eval.md", "eval.html"


@dataclass(frozen=True, kw_only=True)
class EvalRunConfig:
    out: Path
    split: Split = "test"
    first: int = 0
    count: int = 100
    seed: int = 0
    workers: int = 1
    is_resumed: bool | None = None
    """Take up finished flights of a policy; None: of bundles, but not of servers, which do not tell their weights."""
    with_rgb_head: bool = False


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """What was written."""

    record: dict[str, Any]
    parts: tuple[Part, ...]
    files: tuple[Path, ...]

    @property
    def text(self) -> str:
        """The tables for a terminal."""
        return render(self.parts)


def eval_tasks(config: EvalRunConfig) -> list[Task]:
    """The tasks of a run, with a progress bar."""
    indices = range(config.first, config.first + config.count)
    return [generate_task(config.split, index) for index in tqdm(indices, desc="tasks", unit="task")]


def run_evaluation(
    policy: PolicyChoice,
    tasks: Sequence[Task],
    config: EvalRunConfig,
    *,
    tables: ActionTables | None = None,
    against: PolicyChoice | Path | None = None,
    open_loop: OpenLoopReport | None = None,
) -> EvalRun:
    """Fly every task under every row and write the files.

    Args:
        policy: what is evaluated.
        tasks: at least one.
        config: where, how often, how.
        tables: of the baselines; None flies the policy alone.
        against: another policy that is flown on the same tasks, or the folder of its finished evaluation.
        open_loop: goes into the files, too.

    Raises:
        PolicyChoiceError: a finished evaluation of other tasks or another seed.
        FlightError, FlightLogError, RenderingUnavailableError: see `evaluate`.
    """
    finished = finished_flights(against, tasks, config.seed) if isinstance(against, Path) else None
    log = FlightLog(config.out / LOG_FILE)

    def fly(choice: PolicyChoice, tables: ActionTables | None, rgb_bundle: Path | None, label: str) -> Evaluation:
        return evaluate(
            tasks,
            choice.source,
            tables=tables,
            rgb_bundle=rgb_bundle,
            seed=config.seed,
            workers=config.workers,
            log=log,
            is_resumed=choice.bundle is not None if config.is_resumed is None else config.is_resumed,
            identity=choice.source.identity(),
            label=label,
        )

    evaluation = fly(policy, tables, policy.bundle if config.with_rgb_head else None, "eval")
    other: tuple[str, Evaluation] | None = None
    other_name = str(against)
    if isinstance(against, PolicyChoice):
        other_name = against.name
        other = other_name, fly(against, None, None, "against")
        finished = other[1].rows[POLICY]
    flown = f"{policy.name}: {len(tasks)} {config.split} tasks from {config.first}, seed {config.seed}"
    parts: list[Part] = evaluation_parts(evaluation)
    about: dict[str, Any] = {
        "policy": policy.name,
        "split": config.split,
        "first": config.first,
        "success": tasks[0].success,
        "train_flights": None if tables is None else tables.flights,
    }
    if finished is not None:
        about["against_policy"] = other_name
        parts += against_parts(evaluation.rows[POLICY], finished, other_name)
    if open_loop is not None:
        about["open_loop"] = open_loop
        parts += open_loop.parts()
    record = evaluation.to_json(finished, **about)
    return _write(config.out, flown, parts, record, evaluation, other)


def write_open_loop(report: OpenLoopReport, name: str, out: Path) -> EvalRun:
    """The files of a run that flew nothing."""
    record = {"policy": name, "open_loop": report}
    return _write(out, f"{name}: open loop, {report.flights} flights", report.parts(), record, None, None)


def _write(
    out: Path,
    title: str,
    parts: Sequence[Part],
    record: dict[str, Any],
    evaluation: Evaluation | None,
    other: tuple[str, Evaluation] | None,
) -> EvalRun:
    write_json(out / RECORD_FILE, record)
    texts = {
        MARKDOWN_FILE: render([f"# {title}", *parts], markdown=True) + "\n",
        PAGE_FILE: evaluation_page(title, parts, evaluation, other, show_progress=True),
    }
    for name, text in texts.items():
        with atomic_file(out / name) as building:
            building.write_text(text, encoding="utf-8")
    return EvalRun(
        record=msgspec.to_builtins(record),
        parts=(title, *parts),
        files=(out / RECORD_FILE, *(out / name for name in texts)),
    )
