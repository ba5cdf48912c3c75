"""Fly held-out tasks with a policy and with what it has to beat, and put the results side by side.

Rows: `policy`; `shuffled text` (the same policy, told the instruction of a task of another kind); two teacher-forced
ones, the policy and the bundle's RGB head on the frames of the expert's flight; `expert` (the upper end); `zero`,
`mean`, `mean per kind`, `mean per kind and magnitude` (an agent without eyes). Every row flies the same tasks. A flight
depends on task and seed alone, so the number of workers changes nothing but the time, and finished flights may be taken
from a log.
Source: spec/training.md 8.6, last paragraph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from worldvln_edge.client import AnswerTimeoutError, ServerError, ServerUnreachableError
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.baselines import ActionTables, shuffled_instructions
from worldvln_edge.training.evaluation.closed_loop import FlightError, Pilot, check_task, expert_actions, flight_seed
from worldvln_edge.training.evaluation.flight_log import FlightLog, LoggedFlight, PathPoint, flight_digest
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight, comparison_tree, outcome_tree
from worldvln_edge.training.evaluation.pilot_sources import PilotSource
from worldvln_edge.training.evaluation.row_flights import (
    POLICY,
    POLICY_ROWS,
    RGB,
    ROWS,
    SHUFFLED,
    TEACHER_FORCED,
    RowFlyer,
    TaskRows,
    blind_choices,
)

_VERSION = 1  # of how flights are flown and measured; a change makes every digest another


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Flights of every row, in the order of the tasks."""

    tasks: tuple[Task, ...]
    rows: dict[str, tuple[EvalFlight, ...]]
    paths: dict[str, tuple[tuple[PathPoint, ...], ...]]
    """Flown, of every row and task."""
    seed: int
    from_log: int = 0
    """Flights that were not flown again."""

    @property
    def profiles(self) -> tuple[str, ...]:
        """Generation profiles that the policy was flown with."""
        return tuple(dict.fromkeys(profile for flight in self.rows[POLICY] for profile in flight.profiles))

    def to_json(self, against: Sequence[EvalFlight] | None = None, **about: Any) -> dict[str, Any]:
        """Everything but the paths as a JSON-able mapping.

        Args:
            against: another policy's flights of the same tasks; adds `against`.
            about: goes in front (bundle, split, ...).
        """
        policy = self.rows[POLICY]
        record = {
            **about,
            "seed": self.seed,
            "profiles": self.profiles,
            "tasks": len(policy),
            "rows": {name: outcome_tree(flights) for name, flights in self.rows.items()},
            "policy_against": {
                name: comparison_tree(policy, flights) for name, flights in self.rows.items() if name != POLICY
            },
        }
        if against is not None:
            record["against"] = comparison_tree(policy, against)
        return record | {"flights": [flight for flights in self.rows.values() for flight in flights]}


def evaluate(
    tasks: Sequence[Task],
    source: PilotSource,
    *,
    tables: ActionTables | None = None,
    rgb_bundle: Path | None = None,
    seed: int = 0,
    workers: int = 1,
    log: FlightLog | None = None,
    is_resumed: bool = True,
    identity: str = "",
    show_progress: bool = True,
    label: str = "eval",
) -> Evaluation:
    """Fly every task under every row.

    Args:
        tasks: at least one; neighbours in one scene share a simulator.
        source: opens the policy; with one worker in this process, else once in every worker.
        tables: of the baselines; None flies the policy alone.
        rgb_bundle: adds the row of its RGB head on the frames of the expert's flight.
        seed: of the policy's draws; mixed with each task's own.
        workers: processes.
        log: where every flight is kept as soon as it is finished.
        is_resumed: take flights of the policy that the log already holds; those of fixed actions always are.
        identity: of the policy, see `pilot_sources`; flights of another identity are not taken from the log.
        show_progress: a bar on stderr.
        label: of that bar.

    Raises:
        FlightError: a task that cannot be flown, tables of another flight length, a server that went away, or a worker
            process that was killed.
        FlightLogError: a broken log, or one that cannot be written.
        RenderingUnavailableError, BundleError, EngineError: as their names say.
    """
    if not tasks:
        raise FlightError("no tasks to fly")
    if len({task.task_id for task in tasks}) != len(tasks):
        raise FlightError("two tasks have one task_id; rows are compared task by task")
    for task in tasks:
        check_task(task)
    wanted = _task_rows(tasks, tables, rgb_bundle, seed, identity)
    known = log.read() if log is not None else {}
    if not is_resumed:
        known = {digest: logged for digest, logged in known.items() if logged.flight.row not in POLICY_ROWS}
    found = {digest: known[digest] for rows in wanted for digest in rows.digests.values() if digest in known}
    from_log = len(found)
    jobs = _jobs([replace(rows, digests=_missing(rows, found)) for rows in wanted], tables, rgb_bundle, seed, log)
    with tqdm(total=len(tasks), desc=label, unit="task", disable=not show_progress, smoothing=0.1) as bar:

        def take(flights: Sequence[LoggedFlight]) -> None:
            found.update({logged.digest: logged for logged in flights})
            flown = [found[rows.digests[POLICY]].flight for rows in wanted if rows.digests[POLICY] in found]
            bar.n = sum(all(digest in found for digest in rows.digests.values()) for rows in wanted)
            bar.set_postfix_str(f"{sum(flight.success for flight in flown)} of {len(flown)} succeeded")

        take(())
        _run(jobs, source, workers, take)
    names = [name for name in ROWS if name in wanted[0].digests]
    logged_rows = {name: [found[rows.digests[name]] for rows in wanted] for name in names}
    return Evaluation(
        tasks=tuple(tasks),
        rows={name: tuple(logged.flight for logged in flights) for name, flights in logged_rows.items()},
        paths={name: tuple(logged.path for logged in flights) for name, flights in logged_rows.items()},
        seed=seed,
        from_log=from_log,
    )


def _task_rows(
    tasks: Sequence[Task], tables: ActionTables | None, rgb_bundle: Path | None, seed: int, identity: str
) -> list[TaskRows]:
    """Every row of every task with the digest of its flight."""
    told = shuffled_instructions(tasks) if tables is not None else None
    choices = blind_choices(tables) if tables is not None else {}
    found = []
    for i, task in enumerate(tasks):
        flown = {"version": _VERSION, "seed": flight_seed(task, seed), "identity": identity}
        digests = {POLICY: flight_digest(POLICY, task, **flown)}
        if told is not None:
            digests[SHUFFLED] = flight_digest(SHUFFLED, task, told=told[i], **flown)
        if tables is not None:
            digests[TEACHER_FORCED] = flight_digest(TEACHER_FORCED, task, expert=expert_actions(task), **flown)
        if rgb_bundle is not None:
            digests[RGB] = flight_digest(RGB, task, expert=expert_actions(task), **flown)
        for name, choose in choices.items():
            digests[name] = flight_digest(name, task, version=_VERSION, actions=choose(task))
        found.append(TaskRows(task=task, told=None if told is None else told[i], digests=digests))
    return found


def _missing(rows: TaskRows, found: dict[str, LoggedFlight]) -> dict[str, str]:
    return {name: digest for name, digest in rows.digests.items() if digest not in found}


def _jobs(
    tasks: Sequence[TaskRows], tables: ActionTables | None, rgb_bundle: Path | None, seed: int, log: FlightLog | None
) -> list[RowFlyer]:
    """Neighbours of one scene that have something to fly."""
    jobs = []
    for _, group in groupby(tasks, key=lambda rows: (rows.task.scene, rows.task.dynamics)):
        to_fly = tuple(rows for rows in group if rows.digests)
        if to_fly:
            jobs.append(RowFlyer(tasks=to_fly, tables=tables, rgb_bundle=rgb_bundle, seed=seed, log=log))
    return jobs


def _run(
    jobs: Sequence[RowFlyer], source: PilotSource, workers: int, take: Callable[[Sequence[LoggedFlight]], None]
) -> None:
    if not jobs:
        return
    if workers == 1:
        with source() as pilot:
            for job in jobs:
                for logged in job.fly(pilot):
                    take((logged,))
        return
    # Spawned, not forked: a fork would share the parent's OpenGL state and the engines' threads.
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=_keep_source, initargs=(source,)
    ) as pool:
        try:
            for done in as_completed([pool.submit(_fly_in_worker, job) for job in jobs]):
                take(done.result())
        except BrokenProcessPool as error:
            raise FlightError(
                f"a worker process was killed ({error}); finished flights are kept, so run the same command again, "
                "with fewer --workers if memory is short"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Worker:
    """What a worker process keeps between jobs: its pilot, opened on the first job and closed with the process."""

    source: PilotSource | None = None
    pilot: Pilot | None = None
    open_pilot = ExitStack()


def _keep_source(source: PilotSource) -> None:
    _Worker.source = source


def _fly_in_worker(job: RowFlyer) -> list[LoggedFlight]:
    assert _Worker.source is not None  # the pool's initializer ran
    try:
        if _Worker.pilot is None:
            _Worker.pilot = _Worker.open_pilot.enter_context(_Worker.source())
        return list(job.fly(_Worker.pilot))
    except (ServerError, ServerUnreachableError, AnswerTimeoutError) as error:
        raise FlightError(str(error)) from None  # the server's errors do not survive the way between processes
