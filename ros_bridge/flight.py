"""One instruction on its way through the policy process: whoever asked for it may watch it, and end it.

Thread-safe: the policy process writes, others read and cancel.
"""

from __future__ import annotations

import threading
from typing import Literal

import msgspec

from worldvln_edge.ros_bridge.diagnostics import Diagnostic, Level, ok

FLIGHT = "policy/flight"
_FLYING = "flying: "
State = Literal["waiting", "flying", "over"]


def flying(instruction: str) -> Diagnostic:
    """What the policy says while it flies."""
    return ok(FLIGHT, _FLYING + instruction)


def flown(instruction: str) -> Diagnostic:
    """What it says when an instruction was flown to its end."""
    return ok(FLIGHT, f"flown: {instruction}")


def is_flying(message: str) -> bool:
    """Whether it says so."""
    return message.startswith(_FLYING)


class FlightProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a flight is."""

    state: State
    chunk: int
    """Chunks that were sent to the setpoint process."""
    actions_flown: float
    """Of the newest chunk."""


class Flight:
    def __init__(self, instruction: str):
        self.instruction = instruction
        self._progress = FlightProgress(state="waiting", chunk=0, actions_flown=0.0)
        self._cancelled = threading.Event()
        self._over = threading.Event()
        self._outcome: Diagnostic | None = None

    @property
    def progress(self) -> FlightProgress:
        return self._progress

    @property
    def outcome(self) -> Diagnostic | None:
        """How it ended; None as long as it has not."""
        return self._outcome

    @property
    def was_flown(self) -> bool:
        """Whether it was flown to its end."""
        return self._outcome is not None and self._outcome.level == Level.OK

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End it soon. The drone holds."""
        self._cancelled.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over."""
        return self._over.wait(timeout_s)

    def begin(self) -> None:
        self._progress = FlightProgress(state="flying", chunk=0, actions_flown=0.0)

    def chunk_sent(self) -> None:
        self._progress = FlightProgress(state="flying", chunk=self._progress.chunk + 1, actions_flown=0.0)

    def flown(self, actions: float) -> None:
        """Of the newest chunk."""
        self._progress = FlightProgress(state="flying", chunk=self._progress.chunk, actions_flown=actions)

    def end(self, outcome: Diagnostic) -> None:
        """The first outcome counts."""
        if self._outcome is None:
            self._outcome = outcome
            self._progress = msgspec.structs.replace(self._progress, state="over")
            self._over.set()
