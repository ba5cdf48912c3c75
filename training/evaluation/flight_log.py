"""Finished flights of an evaluation on disk, one JSON line each, so that an interrupted run goes on where it was.

A line carries the digest of everything that the flight depends on (row, task, instruction, seed, policy or actions,
program version). A flight is taken from the file exactly when that digest is asked for again: another policy, seed or
task never meets an old line. Lines are appended whole, under a lock, and reach the disk before the flight counts;
several processes may write. What a killed process left of a line is cut off by the next writer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from worldvln_edge import __version__
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.flight_statistics import EvalFlight

LOG_FILE = "flights.jsonl"

PathPoint = tuple[float, float, float, float]
"""x, y, z in cm and yaw in deg."""


class FlightLogError(ValueError):
    """A log that cannot be read or written. The message names file and line."""


class LoggedFlight(msgspec.Struct, frozen=True, kw_only=True):
    """One line."""

    digest: str
    flight: EvalFlight
    path: tuple[PathPoint, ...]
    """Flown, the start first."""


def flight_digest(row: str, task: Task, **inputs: Any) -> str:
    """Names one flight: sha256 of the row, the task and all else that it depends on.

    Args:
        row: of the evaluation.
        task: all of it.
        inputs: JSON-able values and arrays.
    """
    parts: list[Any] = [__version__, row, task]
    for name, value in sorted(inputs.items()):
        if isinstance(value, np.ndarray):
            value = [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        parts.append([name, value])
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def path_points(poses_T6: np.ndarray) -> tuple[PathPoint, ...]:
    """Poses as a line keeps them, rounded to 1 mm and 0.1 degrees."""
    return tuple(
        (round(float(x), 1), round(float(y), 1), round(float(z), 1), round(float(yaw), 1))
        for x, y, z, _, yaw, _ in np.asarray(poses_T6, np.float64)
    )


@dataclass(frozen=True)
class FlightLog:
    """The log of one folder. Holds no open file, so that it may go to worker processes."""

    file: Path

    def read(self) -> dict[str, LoggedFlight]:
        """Flights by digest; empty without a file. A last line without its end is no flight.

        Raises:
            FlightLogError: the file cannot be read, or a line in it is broken.
        """
        try:
            lines = self.file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise FlightLogError(f"{self.file}: cannot read the finished flights ({error.strerror})") from error
        flights: dict[str, LoggedFlight] = {}
        for number, line in enumerate(lines[:-1], start=1):
            try:
                logged = msgspec.json.decode(line, type=LoggedFlight)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise FlightLogError(
                    f"{self.file}, line {number}: not a finished flight ({error}); delete the line to fly its task "
                    "again, or the file to fly all"
                ) from error
            flights[logged.digest] = logged
        return flights

    def append(self, logged: LoggedFlight) -> None:
        """Add a line; it is on the disk when this returns.

        Raises:
            FlightLogError: it cannot be written; what was there stays readable.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                _cut_half_line(stream)
                stream.write(msgspec.json.encode(logged) + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise FlightLogError(
                f"{self.file}: cannot keep a finished flight ({error.strerror}); free space or choose another folder, "
                "and run again: flights that are in the file are not flown again"
            ) from error


def _cut_half_line(stream: BinaryIO) -> None:
    end = stream.seek(0, os.SEEK_END)
    place = end
    while place > 0:
        stream.seek(place - 1)
        if stream.read(1) == b"\n":
            break
        place -= 1
    if place < end:
        stream.truncate(place)
    stream.seek(0, os.SEEK_END)
