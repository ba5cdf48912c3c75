"""Fly held-out tasks with a policy and with what it has to beat, and put the results side by side.

Rows: `policy`; `shuffled text` (the same policy, told the instruction of a task of another kind); `expert` (the upper
end); `zero`, `mean`, `mean per kind`, `mean per kind and magnitude` (an agent without eyes). Every row flies the same
tasks. A flight depends on task and seed alone, so the number of workers changes nothing but the time.
Source: spec/training.md 8.6, last paragraph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from worldvln_edge.bundle import Bundle
from worldvln_edge.client import AnswerTimeoutError, ServerError, ServerUnreachableError, SessionClient
from worldvln_edge.generation_profile import EXACT, GenerationProfile, find_profile, model_profiles
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.baselines import ActionTables, shuffled_instructions
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    Pilot,
    PolicyPilot,
    ReplayPilot,
    SceneSimulators,
    ServerPilot,
    check_task,
    expert_actions,
    flight_seed,
    fly_task,
)
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight, outcome_tree, pairing

if TYPE_CHECKING:
    from worldvln_edge.runtime.engines.backends import BackendName

POLICY, SHUFFLED, EXPERT = "policy", "shuffled text", "expert"
ZERO, MEAN, MEAN_KIND, MEAN_MAGNITUDE = "zero", "mean", "mean per kind", "mean per kind and magnitude"
ROWS = (POLICY, SHUFFLED, EXPERT, ZERO, MEAN, MEAN_KIND, MEAN_MAGNITUDE)

PilotSource = Callable[[], AbstractContextManager[Pilot]]
"""Opens a pilot; one is opened per worker process, so a source for several workers must be picklable."""


@dataclass(frozen=True, kw_only=True)
class BundlePilot:
    """Opens a bundle in this process."""

    folder: Path
    threads: int = 1
    profile: str = EXACT
    profiles: Mapping[str, GenerationProfile] = field(default_factory=dict)  # besides the built-in ones
    backend: BackendName = "cpu"
    also: tuple[Path, ...] = ()  # other exports of the same checkpoint, for profiles that name their precision

    @contextmanager
    def __call__(self) -> Iterator[Pilot]:
        # Imported here: flying through a server needs no inference engine.
        from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy

        policy = load_policy(
            self.folder,
            backend=self.backend,
            threads=self.threads,
            profile=self.profile,
            profiles=self.profiles,
            also=self.also,
        )
        with closing(policy):
            yield PolicyPilot(policy)


@dataclass(frozen=True, kw_only=True)
class RemotePilot:
    """Opens a connection to a server."""

    server: str
    key: str | None = None

    @contextmanager
    def __call__(self) -> Iterator[Pilot]:
        with SessionClient(self.server, self.key, frame_format="rgb8") as client:
            yield ServerPilot(client)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Flights of every row, in the order of the tasks."""

    rows: dict[str, tuple[EvalFlight, ...]]
    seed: int

    @property
    def profiles(self) -> tuple[str, ...]:
        """Generation profiles that the policy was flown with."""
        return tuple(dict.fromkeys(profile for flight in self.rows[POLICY] for profile in flight.profiles))

    def to_json(self, **about: Any) -> dict[str, Any]:
        """Everything as a JSON-able mapping; `about` goes in front (bundle, split, ...)."""
        policy = self.rows[POLICY]
        return {
            **about,
            "seed": self.seed,
            "profiles": self.profiles,
            "tasks": len(policy),
            "rows": {name: outcome_tree(flights) for name, flights in self.rows.items()},
            "policy_against": {name: pairing(policy, flights) for name, flights in self.rows.items() if name != POLICY},
            "flights": [flight for flights in self.rows.values() for flight in flights],
        }


def evaluate(
    tasks: Sequence[Task],
    source: PilotSource,
    *,
    tables: ActionTables | None = None,
    seed: int = 0,
    workers: int = 1,
    show_progress: bool = True,
    label: str = "eval",
) -> Evaluation:
    """Fly every task under every row.

    Args:
        tasks: at least one; neighbours in one scene share a simulator.
        source: opens the policy; with one worker in this process, else once in every worker.
        tables: of the baselines; None flies the policy alone.
        seed: of the policy's draws; mixed with each task's own.
        workers: processes.
        show_progress: a bar on stderr.
        label: of that bar.

    Raises:
        FlightError: a task that cannot be flown, tables of another flight length, or a server that failed.
        RenderingUnavailableError, BundleError, EngineError: as their names say.
    """
    if not tasks:
        raise FlightError("no tasks to fly")
    for task in tasks:
        check_task(task)
    jobs = _jobs(tasks, tables, seed)
    flown: dict[int, dict[str, EvalFlight]] = {}
    total = sum(len(job.tasks) for job in jobs)
    with tqdm(total=total, desc=label, unit="task", disable=not show_progress, smoothing=0.1) as bar:

        def take(results: dict[int, dict[str, EvalFlight]]) -> None:
            flown.update(results)
            bar.update(len(results))
            successes = sum(rows[POLICY].success for rows in flown.values())
            bar.set_postfix_str(f"{successes} of {len(flown)} succeeded")

        if workers == 1:
            with source() as pilot:
                for job in jobs:
                    take(_fly_job(job, pilot))
        else:
            # Spawned, not forked: a fork would share the parent's OpenGL state and the engines' threads.
            with ProcessPoolExecutor(
                min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=_keep_source, initargs=(source,)
            ) as pool:
                try:
                    for done in as_completed([pool.submit(_fly_in_worker, job) for job in jobs]):
                        take(done.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    names = [name for name in ROWS if name in flown[0]]
    return Evaluation(rows={name: tuple(flown[i][name] for i in range(len(tasks))) for name in names}, seed=seed)


def check_bundle(folder: Path, profile: str = EXACT, profiles: Mapping[str, GenerationProfile] | None = None) -> None:
    """See that a bundle can be flown: here, once, rather than in every worker.

    Args:
        folder: of the bundle.
        profile: that it will be flown with.
        profiles: besides the built-in ones.

    Raises:
        BundleError: it is not whole.
        ConfigError: an unknown profile, or one that does not fit the model.
    """
    find_profile(model_profiles(Bundle.open(folder).manifest.model, profiles), profile)


def check_server(server: str, key: str | None) -> None:
    """Raise ServerUnreachableError or ServerError unless a server answers."""
    with SessionClient(server, key):
        pass


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Neighbouring tasks of one scene."""

    indices: tuple[int, ...]
    tasks: tuple[Task, ...]
    told: tuple[str | None, ...]  # shuffled instructions; None: this row is not flown
    tables: ActionTables | None
    seed: int


def _jobs(tasks: Sequence[Task], tables: ActionTables | None, seed: int) -> list[_Job]:
    told: Sequence[str | None] | None = shuffled_instructions(tasks) if tables is not None else None
    told = told or [None] * len(tasks)
    jobs = []
    for _, group in groupby(range(len(tasks)), key=lambda i: (tasks[i].scene, tasks[i].dynamics)):
        indices = tuple(group)
        jobs.append(
            _Job(
                indices=indices,
                tasks=tuple(tasks[i] for i in indices),
                told=tuple(told[i] for i in indices),
                tables=tables,
                seed=seed,
            )
        )
    return jobs


def _fly_job(job: _Job, pilot: Pilot) -> dict[int, dict[str, EvalFlight]]:
    """Fly the tasks of a job under all rows: index of the task -> row -> flight."""
    results: dict[int, dict[str, EvalFlight]] = {}
    num_actions = pilot.points[-1] - 1
    blind = _blind_pilots(job.tables, num_actions)
    with SceneSimulators(pilot.image_hw) as seeing, SceneSimulators(ReplayPilot.image_hw) as unseeing:
        for index, task, told in zip(job.indices, job.tasks, job.told, strict=True):
            seed = flight_seed(task, job.seed)
            rows = {POLICY: _fly(POLICY, task, pilot, seeing, seed)}
            if told is not None:
                rows[SHUFFLED] = _fly(SHUFFLED, task, pilot, seeing, seed, told)
            for name, replay in blind.items():
                rows[name] = _fly(name, task, replay, unseeing, seed)
            results[index] = rows
    return results


def _blind_pilots(tables: ActionTables | None, num_actions: int) -> dict[str, Pilot]:
    if tables is None:
        return {}
    if tables.num_actions != num_actions:
        raise FlightError(
            f"the training flights have {tables.num_actions} actions each, the policy flies {num_actions}; "
            "give flights of the policy's length, or --no-baselines"
        )
    choices = {
        EXPERT: expert_actions,
        ZERO: tables.zero_action,
        MEAN: tables.mean_action,
        MEAN_KIND: tables.mean_of_kind,
        MEAN_MAGNITUDE: tables.mean_of_kind_and_magnitude,
    }
    return {name: ReplayPilot(choice, num_actions=num_actions) for name, choice in choices.items()}


def _fly(
    row: str, task: Task, pilot: Pilot, simulators: SceneSimulators, seed: int, told: str | None = None
) -> EvalFlight:
    flight = fly_task(task, pilot, simulators.for_task(task), seed=seed, instruction=told)
    return EvalFlight(
        row=row,
        task=task.task_id,
        kind=task.kind,
        landmark=task.landmark,
        instruction=flight.instruction,
        success=flight.score.success,
        collided=flight.score.collided,
        final_distance_m=round(flight.score.final_distance_m, 4),
        final_yaw_error_deg=round(flight.score.final_yaw_error_deg, 3),
        latency_ms=tuple(round(ms, 2) for ms in flight.latency_ms) if row in (POLICY, SHUFFLED) else (),
        profiles=flight.profiles,
    )


class _Worker:
    """What a worker process keeps between jobs: its pilot, opened on the first job and closed with the process."""

    source: PilotSource | None = None
    pilot: Pilot | None = None
    open_pilot = ExitStack()


def _keep_source(source: PilotSource) -> None:
    _Worker.source = source


def _fly_in_worker(job: _Job) -> dict[int, dict[str, EvalFlight]]:
    assert _Worker.source is not None  # the pool's initializer ran
    try:
        if _Worker.pilot is None:
            _Worker.pilot = _Worker.open_pilot.enter_context(_Worker.source())
        return _fly_job(job, _Worker.pilot)
    except (ServerError, ServerUnreachableError, AnswerTimeoutError) as error:
        raise FlightError(str(error)) from None  # the server's errors do not survive the way between processes
