"""Resident memory of this process, where Linux tells."""

from __future__ import annotations

from pathlib import Path

_STATUS_FILE = Path("/proc/self/status")


def resident_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes: `VmRSS` now, `VmHWM` at most so far. None on other systems."""
    if not _STATUS_FILE.is_file():
        return None
    for line in _STATUS_FILE.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
