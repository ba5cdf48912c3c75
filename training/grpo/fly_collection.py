"""Flying a collection: what is missing in its folder is flown, written flight by flight, and counted.

Source: spec/training.md 5.2 (retries, failures), 5.9 item 1.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter

import msgspec

from worldvln_edge.atomic import atomic_file
from worldvln_edge.tasks import Task
from worldvln_edge.training.grpo.candidates import Candidate, candidates_of, flight_name
from worldvln_edge.training.grpo.collection import (
    FLIGHTS,
    LOST_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    Collection,
    CollectionConfig,
    CollectionError,
    CollectionReport,
    CollectionSettings,
    LostAttempt,
    read_lost,
    read_record,
    trace_path,
)
from worldvln_edge.training.grpo.rollout import Flier
from worldvln_edge.training.grpo.trace import TRACE_SUFFIX, FlightTrace, TraceError, read_trace, write_trace
from worldvln_edge.training.grpo.wave import LostFlight, Outcome


def collect(
    folder: Path,
    flier: Flier,
    tasks: Sequence[Task],
    config: CollectionConfig | None = None,
    *,
    on_flight: Callable[[Outcome], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Collection | None:
    """Fly what is missing of a collection.

    Args:
        folder: made if missing; one that was begun with the same settings is gone on with, a complete one is left.
        flier: flies; what it brings is written here.
        tasks: of the collection, in order.
        config: how many flights.
        on_flight: called with each outcome after it was written (progress).
        should_stop: asked after each outcome; True breaks off, to be resumed later.

    Returns:
        The collection; None when it was broken off.

    Raises:
        CollectionError: another collection lies there, another process writes it, the folder cannot be written, or not
            one candidate could be flown.
        ConfigError: an early-stopping rule cannot be applied to a task.
        TraceError: the disk is full; what was written stays.
        ValueError: no tasks.
    """
    folder, config = Path(folder), config or CollectionConfig()
    candidates = candidates_of(tasks, config.candidates, first_seed=config.first_seed)
    flier.check(tasks)
    with _own(folder):
        _check_settings(folder, _settings(flier, tasks, config))
        if not (folder / REPORT_FILE).is_file():
            for half in (folder / FLIGHTS).glob(f".*{TRACE_SUFFIX}"):  # what a killed process was writing
                half.unlink()
            run = _Run(folder, config, candidates)
            with closing(flier.fly(run.waiting)) as outcomes:
                for outcome in outcomes:
                    run.take(outcome)
                    if on_flight is not None:
                        on_flight(outcome)
                    if should_stop():
                        return None
            _write(folder / REPORT_FILE, msgspec.json.format(msgspec.json.encode(run.report())) + b"\n")
    return Collection(folder)


class _Run:
    """What is there, what is missing, and what has become known."""

    def __init__(self, folder: Path, config: CollectionConfig, candidates: Sequence[Candidate]):
        self._folder, self._config, self._candidates = folder, config, candidates
        self._lost = read_lost(folder)
        self._attempts = Counter(attempt.name for attempt in self._lost)
        self._flights = self._steps = self._saved = self._steps_now = self._flown_now = 0
        self._ended: Counter[str] = Counter()
        self._missing = {candidate.name for candidate in candidates}
        self._start = perf_counter()
        self.waiting: deque[Candidate] = deque()
        """Attempts to be made; a lost flight adds its retry."""
        for candidate in candidates:
            trace = _whole_trace(trace_path(folder, candidate.name))
            if trace is not None:
                self._count(trace)
            else:
                self._try(dataclasses.replace(candidate, attempt=self._attempts[candidate.name]))

    def take(self, outcome: Outcome) -> None:
        """Write down what became of a candidate."""
        if isinstance(outcome, LostFlight):
            self._take_lost(outcome)
            return
        write_trace(outcome, trace_path(self._folder, flight_name(outcome.group_id, outcome.candidate_id)))
        self._count(outcome)
        self._steps_now += outcome.environment_steps
        self._flown_now += 1

    def report(self) -> CollectionReport:
        """Of the finished collection.

        Raises:
            CollectionError: there is not one flight.
        """
        if not self._flights:
            last = self._lost[-1]
            raise CollectionError(
                f"{self._folder}: not one of {len(self._candidates)} candidates could be flown, {len(self._lost)} "
                f"attempts were lost; the last one: {last.code}: {last.message}. Mend that, delete {LOST_FILE} and "
                "collect again"
            )
        return CollectionReport(
            flights=self._flights,
            flown_now=self._flown_now,
            lost_attempts=len(self._lost),
            failed=tuple(sorted(self._missing)),
            environment_steps=self._steps,
            environment_steps_saved=self._saved,
            ended=dict(sorted(self._ended.items())),
            steps_now=self._steps_now,
            seconds_now=perf_counter() - self._start,
        )

    def _take_lost(self, lost: LostFlight) -> None:
        candidate = lost.candidate
        self._lost.append(
            LostAttempt(
                name=candidate.name,
                task_id=candidate.task.task_id,
                candidate_id=candidate.candidate_id,
                attempt=candidate.attempt,
                seed=candidate.seed,
                code=lost.code,
                message=lost.message,
            )
        )
        _write(self._folder / LOST_FILE, msgspec.json.Encoder().encode_lines(self._lost))
        self._try(dataclasses.replace(candidate, attempt=candidate.attempt + 1))

    def _try(self, candidate: Candidate) -> None:
        if candidate.attempt <= self._config.retries:
            self.waiting.append(candidate)

    def _count(self, trace: FlightTrace) -> None:
        self._flights += 1
        self._steps += trace.environment_steps
        self._saved += trace.environment_steps_saved
        self._ended[trace.end_reason] += 1
        self._missing.remove(flight_name(trace.group_id, trace.candidate_id))


def _settings(flier: Flier, tasks: Sequence[Task], config: CollectionConfig) -> CollectionSettings:
    identity = flier.identity
    return CollectionSettings(
        checkpoint_digest=identity.checkpoint_digest,
        policy_scales=identity.policy_scales,
        repetitions=identity.repetitions,
        rows=identity.rows,
        rules=identity.rules,
        collection=config,
        tasks_digest=hashlib.sha256(msgspec.json.encode(list(tasks))).hexdigest(),
        tasks=len(tasks),
    )


def _check_settings(folder: Path, settings: CollectionSettings) -> None:
    """Write them into a new folder, compare them with an old one's."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        _write(path, msgspec.json.format(msgspec.json.encode(settings)) + b"\n")
        return
    there = read_record(path, CollectionSettings)
    other = [name for name in settings.__struct_fields__ if getattr(there, name) != getattr(settings, name)]
    if other:
        raise CollectionError(
            f"{folder} holds a collection that was begun with another {', another '.join(other)}; give the same "
            "options and checkpoint to go on with it, or another folder"
        )


def _whole_trace(path: Path) -> FlightTrace | None:
    """The trace of an earlier run; None where there is none, or one that cannot be read."""
    try:
        return read_trace(path)
    except TraceError:
        return None


def _write(path: Path, content: bytes) -> None:
    try:
        with atomic_file(path) as building:
            building.write_bytes(content)
    except OSError as error:
        raise CollectionError(f"{path}: cannot be written ({error}); make room, then collect again to go on") from error


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Hold the folder: two processes would count each other's flights as missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise CollectionError(f"{folder}: cannot be written ({error}); give another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CollectionError(f"{folder} is being collected into by another process; wait for it to end") from None
        yield
