"""A folder that a conversion writes: new, and there only when it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worldvln_edge.atomic import FolderInUseError, atomic_directory


@contextmanager
def new_folder(out: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends without an error.

    Unlike what can be computed again, a dataset is never replaced: it may be the only copy, or the one being read.

    Args:
        out: an empty or a new folder.
        marker: a file that every folder of this kind holds.

    Raises:
        FolderInUseError: `out` is a file, or holds something.
    """
    _refuse_used(out)
    with atomic_directory(out, marker) as building:
        yield building
        _refuse_used(out)  # a conversion takes hours: another one may have been faster


def _refuse_used(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise FolderInUseError(f"{out} holds files already; give an empty or a new folder")
