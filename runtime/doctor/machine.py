"""The computer that is examined: its files, its programs, its Python.

Files are read below a root and programs are looked for on a path, so that an image of a computer, or a copy of what
one said, is examined like the one that runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program said."""

    code: int
    output: str
    """stdout, or where that is empty stderr; without blanks at its ends."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One computer.

    Args:
        root: folder that its files lie below.
        programs: where its programs are looked for, as in $PATH; None: in $PATH.
        modules: folder that its Python packages are looked for in first; None: none but Python's own.
    """

    root: Path = Path("/")
    programs: str | None = None
    modules: Path | None = None

    def text(self, path: str) -> str | None:
        """A file's text without zero bytes and blanks at its ends; None where it is missing or may not be read."""
        try:
            raw = (self.root / path.lstrip("/")).read_bytes()
        except OSError:
            return None
        return raw.decode("utf-8", errors="replace").replace("\0", "").strip()

    def matches(self, pattern: str) -> list[Path]:
        """Files that fit a pattern like `sys/class/thermal/thermal_zone*`, sorted."""
        return sorted(self.root.glob(pattern))

    def has(self, program: str) -> bool:
        """Is the program installed?"""
        return shutil.which(program, path=self.programs) is not None

    def ask(self, program: str, *arguments: str) -> Answer | None:
        """Run a program; None where it is missing, does not start, or does not answer within 20 s."""
        found = shutil.which(program, path=self.programs)
        return None if found is None else _run([found, *arguments], os.environ)

    def ask_python(self, code: str) -> Answer | None:
        """Run a few lines in a Python of their own, so that a library that crashes takes only that one along."""
        environment = dict(os.environ)
        if self.modules is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.modules), os.environ.get("PYTHONPATH"))))
        return _run([sys.executable, "-c", code], environment, timeout_s=3 * _TIMEOUT_S)


def _run(
    command: list[str], environment: os._Environ[str] | dict[str, str], timeout_s: float = _TIMEOUT_S
) -> Answer | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Answer(code=done.returncode, output=done.stdout.strip() or done.stderr.strip())
