"""Memory that this process may still take, where Linux tells: what the machine has left, or its control group.

Source: proc(5) `MemAvailable`; Linux control groups, version 2 (`memory.max`) and 1 (`memory.limit_in_bytes`).
"""

from __future__ import annotations

from pathlib import Path

_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2_FILES = ("memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> int | None:
    """The smallest of what the machine and every control group above this process have left.

    Args:
        root: below it lie `proc` and `sys`.

    Returns:
        Bytes; file pages that can be given up count as left. None where nothing tells.
    """
    found = [left for left in (_of_machine(root), *_of_control_groups(root)) if left is not None]
    return min(found) if found else None


def _of_machine(root: Path) -> int | None:
    for name, value in _fields(root / "proc/meminfo"):
        if name == "MemAvailable:":
            return value * 1024
    return None


def _of_control_groups(root: Path) -> list[int | None]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[int | None] = []
    for line in lines:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _of_group_and_above(root / "sys/fs/cgroup", path, _V2_FILES)
        elif "memory" in controllers.split(","):
            found += _of_group_and_above(root / "sys/fs/cgroup/memory", path, _V1_FILES)
    return found


def _of_group_and_above(mount: Path, path: str, files: tuple[str, str, str]) -> list[int | None]:
    # In a container the path may be that of the host, of which only the mount itself is to be seen.
    parts = [part for part in path.split("/") if part not in ("", "..")]
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [_of_group(folder, *files) for folder in folders]


def _of_group(folder: Path, limit_file: str, used_file: str, reclaimable: str) -> int | None:
    limit, used = _number(folder / limit_file), _number(folder / used_file)
    if limit is None or used is None:
        return None
    given_up = sum(value for name, value in _fields(folder / "memory.stat") if name == reclaimable)
    return max(0, limit - max(0, used - given_up))


def _number(path: Path) -> int | None:
    """None for `max`, and where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> list[tuple[str, int]]:
    """(name, number) of every line that starts so."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(words[0], int(words[1])) for line in lines if len(words := line.split()) > 1 and words[1].isdecimal()]
