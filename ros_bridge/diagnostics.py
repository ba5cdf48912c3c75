"""What the bridge tells the operator: one line per check, with what to do.

Published as diagnostic_msgs/DiagnosticArray, whose levels these are.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Level(IntEnum):
    """Levels of diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


class Diagnostic(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one check. `name` says which (`camera/stamps`), `what_to_do` is empty where all is well."""

    level: Level
    name: str
    message: str
    what_to_do: str = ""

    @property
    def text(self) -> str:
        """Message and advice in one line."""
        return f"{self.message}; {self.what_to_do}" if self.what_to_do else self.message


def ok(name: str, message: str = "ok") -> Diagnostic:
    return Diagnostic(level=Level.OK, name=name, message=message)


def warning(name: str, message: str, what_to_do: str) -> Diagnostic:
    return Diagnostic(level=Level.WARN, name=name, message=message, what_to_do=what_to_do)


def error(name: str, message: str, what_to_do: str) -> Diagnostic:
    return Diagnostic(level=Level.ERROR, name=name, message=message, what_to_do=what_to_do)
