"""Faults that stay until somebody resets them, even when their cause has gone."""

from __future__ import annotations

from worldvln_edge.ros_bridge.diagnostics import Diagnostic, error, ok

CHECK = "setpoint/faults"


class FaultLatch:
    def __init__(self) -> None:
        self._faults: dict[str, str] = {}

    def set(self, name: str, message: str) -> None:
        """Latch a fault. The first message of a name is kept: it says what began it."""
        self._faults.setdefault(name, message)

    def reset(self) -> tuple[str, ...]:
        """Forget all faults; their names."""
        names = self.names
        self._faults.clear()
        return names

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._faults)

    @property
    def diagnostic(self) -> Diagnostic:
        if not self._faults:
            return ok(CHECK, "no fault")
        return error(
            CHECK,
            "; ".join(f"{name}: {message}" for name, message in self._faults.items()),
            "take over by hand, remove the cause, then send a reset",
        )
