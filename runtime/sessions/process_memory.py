"""Resident memory of a process, where Linux tells."""

from __future__ import annotations

from pathlib import Path

_PROCESSES = Path("/proc")


def resident_bytes(field: str, pid: int | None = None) -> int | None:
    """A field of /proc/PID/status in bytes: `VmRSS` now, `VmHWM` at most so far.

    Args:
        field: its name.
        pid: of the process; None: this one.

    Returns:
        None on other systems, and where there is no such process.
    """
    try:
        status = (_PROCESSES / ("self" if pid is None else str(pid)) / "status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
