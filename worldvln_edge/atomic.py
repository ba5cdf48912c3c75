"""Files and folders that appear whole or not at all: written beside their place, then moved in with one rename."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderInUseError(ValueError):
    """The place of an output folder is taken by something else, which would be lost."""


@contextmanager
def atomic_directory(target: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error.

    An existing `target` is replaced in whole; on an error it stays as it was and nothing is left behind.

    Args:
        target: the folder.
        marker: a file that every folder of this kind holds; a folder without it is somebody's own and is not replaced.

    Raises:
        FolderInUseError: `target` is a file, or a folder with other things in it.
    """
    target = _free_place(target, marker)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".building", dir=target.parent))
    try:
        building.chmod(0o755)
        yield building
        _move_in(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def resumable_directory(target: Path, marker: str) -> Iterator[Path]:
    """As `atomic_directory`, for work that takes long: what an interrupted run left behind is yielded again.

    The folder that is being built lies beside `target` under a fixed name. It stays when the block ends with an error
    or the process is killed; the next run finds it and decides what of it is still good.

    Raises:
        FolderInUseError: as `atomic_directory`, or another process is building the same folder.
    """
    target = _free_place(target, marker)
    building = target.parent / f".{target.name}.unfinished"
    replaced = building.with_suffix(".replaced")
    place = target.parent / f".{target.name}.lock"
    with place.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before may have deleted the file that was opened here.
            if not place.exists() or not os.path.samestat(os.fstat(lock.fileno()), place.stat()):
                raise BlockingIOError
        except BlockingIOError:
            raise FolderInUseError(f"{target} is being written by another process; wait for it to end") from None
        try:
            if replaced.exists():  # a run was killed while it moved its folder in
                shutil.rmtree(replaced) if target.exists() else os.replace(replaced, target)
            building.mkdir(exist_ok=True)
            yield building
            _move_in(building, target)
        finally:
            place.unlink(missing_ok=True)


def _free_place(target: Path, marker: str) -> Path:
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise FolderInUseError(f"{target} is a file; give the name of a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise FolderInUseError(f"{target} holds other files (and no {marker}); give an empty or a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _move_in(building: Path, target: Path) -> None:
    """Put the finished folder in the place of an older one, which is deleted only then."""
    replaced = building.with_suffix(".replaced")
    try:
        if target.exists():
            os.replace(target, replaced)
        os.replace(building, target)
    except BaseException:
        if replaced.exists() and not target.exists():
            os.replace(replaced, target)
        raise
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield an empty file's path, with `target`'s suffix; it becomes `target` when the block ends without an error.

    The folder is made if it is missing; on an error `target` stays as it was and nothing is left behind.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    building = Path(name)
    try:
        building.chmod(0o644)
        yield building
        os.replace(building, target)
    finally:
        building.unlink(missing_ok=True)
