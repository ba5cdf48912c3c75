"""Secret keys lie in files that only their owner can open."""

from __future__ import annotations

import stat
from pathlib import Path


def is_open_to_others(path: Path) -> bool:
    """Whether another user of this machine, or the file's group, may read or change it. Raises OSError."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
