"""A collection: the flights of all candidates of some tasks, in a folder that can be resumed at any time.

    settings.json               what the flights depend on; a folder with other settings is refused
    flights/task_000003_k05.safetensors   one trace a flight (`trace.py`), written when the flight ends
    lost.jsonl                  every attempt that brought no flight, one line each
    collection.json             the report, written last: the collection is complete

What is there is not flown again; a file that cannot be read is flown anew. So a run that is killed loses the flights
in the air and nothing else.
Source: spec/training.md 5.2 (retries, failures), 5.9 item 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from worldvln_edge.config import ConfigError
from worldvln_edge.training.grpo.candidates import FIRST_SEED
from worldvln_edge.training.grpo.early_stopping import AnyRule
from worldvln_edge.training.grpo.policy_steps import PolicyScales, Repetitions
from worldvln_edge.training.grpo.trace import TRACE_SUFFIX, FlightTrace, read_trace

SETTINGS_FILE, LOST_FILE, REPORT_FILE, FLIGHTS = "settings.json", "lost.jsonl", "collection.json", "flights"
_STRICT = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}


class CollectionError(ValueError):
    """A collection that cannot be made or read. The message says which folder, what is wrong and what to do."""


class CollectionConfig(msgspec.Struct, **_STRICT):
    """How many flights, and with which seeds."""

    candidates: int = 8
    """Of every task (K)."""
    first_seed: int = FIRST_SEED
    """Seeds of all candidates follow from it; another collection of the same tasks needs another one."""
    retries: int = 3
    """Of a lost flight, each with a seed of its own."""

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.retries < 0:
            raise ConfigError(
                f"a collection needs candidates >= 1 and retries >= 0, found {self.candidates} and {self.retries}"
            )


class CollectionSettings(msgspec.Struct, **_STRICT):
    """`settings.json`."""

    checkpoint_digest: str
    policy_scales: PolicyScales
    repetitions: Repetitions
    rows: int
    rules: tuple[AnyRule, ...]
    collection: CollectionConfig
    tasks_digest: str
    tasks: int


class LostAttempt(msgspec.Struct, **_STRICT):
    """A line of `lost.jsonl`."""

    name: str
    task_id: str
    candidate_id: int
    attempt: int
    seed: int
    code: str
    message: str


class CollectionReport(msgspec.Struct, **_STRICT):
    """`collection.json`. Times and steps flown are of the run that finished the collection."""

    flights: int
    """In the folder."""
    flown_now: int
    lost_attempts: int
    """In all runs."""
    failed: tuple[str, ...]
    """Names of candidates whose attempts were all lost; they are not in the folder."""
    environment_steps: int
    """Of all flights in the folder."""
    environment_steps_saved: int
    """That early stopping spared, of all flights in the folder."""
    ended: dict[str, int]
    """Flights by `end_reason`."""
    steps_now: int
    seconds_now: float

    @property
    def steps_per_second(self) -> float:
        """Environment steps that the finishing run flew a second, networks included."""
        return self.steps_now / self.seconds_now if self.seconds_now > 0 else 0.0


class Collection:
    """A complete collection on disk.

    Raises:
        CollectionError: the folder holds none, or it is not complete.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        for name in (SETTINGS_FILE, REPORT_FILE):
            if not (self.folder / name).is_file():
                raise CollectionError(f"{self.folder} holds no complete collection ({name} is missing); collect first")
        self.settings = read_record(self.folder / SETTINGS_FILE, CollectionSettings)
        self.report = read_record(self.folder / REPORT_FILE, CollectionReport)

    def __len__(self) -> int:
        return self.report.flights

    def traces(self) -> Iterator[FlightTrace]:
        """All flights, task by task, candidate by candidate; errors as `read_trace`."""
        for path in sorted((self.folder / FLIGHTS).glob(f"[!.]*{TRACE_SUFFIX}")):  # .*: half-written, of a killed run
            yield read_trace(path)

    def lost(self) -> list[LostAttempt]:
        """Every attempt that brought no flight."""
        return read_lost(self.folder)


def trace_path(folder: Path, name: str) -> Path:
    """File of a flight in a collection's folder, whether it is there or not."""
    return Path(folder) / FLIGHTS / f"{name}{TRACE_SUFFIX}"


def read_lost(folder: Path) -> list[LostAttempt]:
    """Every attempt of a collection that brought no flight, oldest first; finished or not.

    Raises:
        CollectionError: the list cannot be read.
    """
    path = Path(folder) / LOST_FILE
    if not path.is_file():
        return []
    try:
        return msgspec.json.Decoder(LostAttempt).decode_lines(path.read_bytes())
    except msgspec.MsgspecError as error:
        raise CollectionError(
            f"{path}: not a list of lost attempts ({error}); delete it, and they count as 0"
        ) from error


Record = TypeVar("Record", bound=msgspec.Struct)


def read_record(path: Path, kind: type[Record]) -> Record:
    """One of the JSON files of a collection.

    Raises:
        CollectionError: it cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.MsgspecError as error:
        raise CollectionError(f"{path}: does not fit this version ({error}); collect into a new folder") from error
