"""Rows of a source as the steps of an epoch, for stages whose rows are flights.

Source: spec/training.md 1.5 (every row once), 8.5 (an empty group fails loudly).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from worldvln_edge.config import ConfigError
from worldvln_edge.training.data.flight_source import FlightSource
from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.trainer.stage import epoch_order, split_steps


class StageDataError(FlightDataError):
    """Flights that a stage cannot learn from."""


class RowPlan:
    """Which rows a stage uses, and in which order.

    Args:
        flights: all rows.
        stage: name of the stage, for errors.
        shortest: frames that a row needs; shorter ones are left out, with a warning that counts them.
        seed: of the order.
        step_rows: rows of an optimiser step.
        micro_rows: rows that go through the networks together, at most.

    Raises:
        StageDataError: no row is long enough.
    """

    def __init__(self, flights: FlightSource, stage: str, *, shortest: int, seed: int, step_rows: int, micro_rows: int):
        self.rows = [row for row in range(len(flights)) if flights.frame_count(row) >= shortest]
        if not self.rows:
            longest = max((flights.frame_count(row) for row in range(len(flights))), default=0)
            raise StageDataError(
                f"{stage}: none of {len(flights)} flights has the {shortest} frames that it needs (longest {longest}); "
                "give other flights or a shorter window"
            )
        if len(self.rows) < len(flights):
            first = next(row for row in range(len(flights)) if flights.frame_count(row) < shortest)
            warnings.warn(
                f"{stage}: {len(flights) - len(self.rows)} of {len(flights)} flights have fewer than the {shortest} "
                f"frames that it needs and are left out (first {flights.name(first)})",
                stacklevel=3,
            )
        self._seed, self._step_rows, self._micro_rows = seed, step_rows, micro_rows

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """See `Stage.plan`."""
        order = [self.rows[at] for at in epoch_order(self._seed, epoch, len(self.rows))]
        return split_steps(order, step_rows=self._step_rows, micro_rows=self._micro_rows)


def rows_of_one_length(flights: FlightSource, rows: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Rows that may go through a network together: with equal frame counts, at most `batch`; every row once."""
    waiting: dict[int, list[int]] = {}
    for row in rows:
        frames = flights.frame_count(row)
        group = waiting.setdefault(frames, [])
        group.append(row)
        if len(group) == batch:
            yield waiting.pop(frames)
    yield from waiting.values()


def recorded_deltas(flights: FlightSource, row: int, stage: str) -> np.ndarray:
    """Motions of a row: float32 [F-1, 6].

    Raises:
        StageDataError: none were recorded, another number of them, or a NaN.
    """
    deltas = flights.deltas(row)
    if deltas is None:
        raise StageDataError(f"{stage}: {flights.name(row)} has no recorded motion; leave the row out")
    return checked_deltas(flights, row, deltas, stage)


def checked_deltas(flights: FlightSource, row: int, deltas: np.ndarray, stage: str) -> np.ndarray:
    """`deltas` of a row. Raises StageDataError: another number of them than frames - 1, or a NaN."""
    expected = (flights.frame_count(row) - 1, 6)
    if deltas.shape != expected or not np.isfinite(deltas).all():
        raise StageDataError(
            f"{stage}: motions of {flights.name(row)} must be {expected[0]} rows of 6 finite numbers, found shape "
            f"{deltas.shape}; mend or leave out the row"
        )
    return deltas


def held_out_rows(flights: FlightSource | None, most: int, *, shortest: int, stage: str) -> list[int]:
    """The first `most` rows of a held-out source that are long enough; none without a source.

    Warns where the source has none.
    """
    if flights is None:
        return []
    rows = [row for row in range(len(flights)) if flights.frame_count(row) >= shortest]
    if not rows:
        warnings.warn(
            f"{stage}: none of {len(flights)} held-out flights has the {shortest} frames that it needs, so nothing is "
            "validated; give others",
            stacklevel=3,
        )
    return rows[:most]


def held_out_deltas(flights: FlightSource | None, most: int, *, shortest: int, stage: str) -> dict[int, np.ndarray]:
    """Rows of `held_out_rows` with their motions, so that a validation does not fail in the middle of a run.

    Raises:
        StageDataError: see `recorded_deltas`.
    """
    rows = held_out_rows(flights, most, shortest=shortest, stage=stage)
    return {} if flights is None else {row: recorded_deltas(flights, row, stage) for row in rows}


def require(config: Any, stage: str, rule: str, test: Callable[[float], bool], fields: Sequence[str]) -> None:
    """Raise ConfigError at the first field of a stage's config that breaks a rule, e.g. `>= 1`."""
    for name in fields:
        value = getattr(config, name)
        if not test(value):
            raise ConfigError(f"{stage}.{name} must be {rule}, found {value}")
