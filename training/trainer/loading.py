"""Batches ahead of the networks: rows are read in worker processes, in an order that depends on nothing else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from worldvln_edge.training.trainer.distributed import Ranks, check_share, share_out
from worldvln_edge.training.trainer.stage import MicroBatch, Stage


class LoadingError(ValueError):
    """Rows that a worker process could not read; the message is that of the reader."""


class Position(NamedTuple):
    """Where a run is: the next step to do."""

    epoch: int
    step: int
    """Within the epoch."""


class Share(NamedTuple):
    """A micro-batch that this rank runs."""

    place: int
    """Among the micro-batches of the step."""
    rows: MicroBatch
    counts: bool
    """False: run only to keep company with the other ranks."""


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """What this rank runs for one optimiser step."""

    at: Position
    after: Position
    rows: int
    """Of the step, on all ranks."""
    shares: list[Share]
    batches: list[Any]


def load_steps(
    stage: Stage, start: Position, ranks: Ranks, *, workers: int, seed: int, epochs: int | None
) -> Iterator[LoadedStep]:
    """All steps from `start` on, for `epochs` epochs in all or without end.

    Args:
        workers: processes that load ahead; 0 loads here, when a step needs it.
        seed: of the loader itself; rows draw from `stage.row_generator`.

    Raises:
        RanksError: an epoch whose steps are all too small for the ranks.
        LoadingError: rows that could not be read, with the reader's message.
    """
    steps = _Steps(stage, start, ranks, epochs)
    loader: DataLoader = DataLoader(
        _Rows(stage),
        batch_size=None,
        sampler=_Order(steps),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,  # a stage is shared with workers, not sent to them
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator().manual_seed(seed),
    )
    loaded = iter(loader)
    for at, after, micro_batches in _Steps(stage, start, ranks, epochs):
        shares = _shares(micro_batches, ranks)
        batches = [_unwrap(next(loaded)) for _ in shares]
        yield LoadedStep(
            at=at, after=after, rows=sum(len(rows) for rows in micro_batches), shares=shares, batches=batches
        )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches the workers of a terminal too, and they must load until the running step is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass(frozen=True)
class _Steps:
    stage: Stage
    start: Position
    ranks: Ranks
    epochs: int | None

    def __iter__(self) -> Iterator[tuple[Position, Position, list[MicroBatch]]]:
        epoch, first = self.start
        while self.epochs is None or epoch < self.epochs:
            plan = self.stage.plan(epoch)
            if not plan:
                raise LoadingError(f"{self.stage.name}: epoch {epoch} has no rows to train on")
            check_share(max(len(step) for step in plan), self.ranks)
            for index in range(first, len(plan)):
                after = Position(epoch, index + 1) if index + 1 < len(plan) else Position(epoch + 1, 0)
                yield Position(epoch, index), after, list(plan[index])
            epoch, first = epoch + 1, 0


class _Order:
    """The rank's micro-batches, as keys of `_Rows`."""

    def __init__(self, steps: _Steps):
        self._steps = steps

    def __iter__(self) -> Iterator[tuple[int, MicroBatch]]:
        for at, _, micro_batches in self._steps:
            for share in _shares(micro_batches, self._steps.ranks):
                yield at.epoch, share.rows


class _Rows(Dataset):
    def __init__(self, stage: Stage):
        self._stage = stage

    def __getitem__(self, key: tuple[int, MicroBatch]) -> Any:
        epoch, rows = key
        try:
            return self._stage.load(epoch, rows)
        except (ValueError, RuntimeError, LookupError, OSError) as error:
            # Our own errors say what is wrong with which row in one sentence; the loader would wrap them in a
            # traceback. Faults go that way.
            if type(error).__module__.partition(".")[0] != "worldvln_edge":
                raise
            return _Failure(str(error))


@dataclass(frozen=True)
class _Failure:
    message: str


def _unwrap(loaded: Any) -> Any:
    if isinstance(loaded, _Failure):
        raise LoadingError(loaded.message)
    return loaded


def _shares(micro_batches: list[MicroBatch], ranks: Ranks) -> list[Share]:
    return [Share(place, micro_batches[place], counts) for place, counts in share_out(len(micro_batches), ranks)]
