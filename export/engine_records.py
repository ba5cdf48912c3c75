"""Engines in a bundle's manifest: written by one process at a time, one entry after the other."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from worldvln_edge.bundle import ENGINES_FOLDER, Bundle, EngineEntry, write_manifest
from worldvln_edge.export.build_job import EngineBuildError


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the engines of a bundle: two writers would overwrite each other's entries.

    Raises:
        EngineBuildError: somebody else holds them.
    """
    lock = folder / ENGINES_FOLDER / ".lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EngineBuildError(
                f"{folder}: another build is at work on this bundle; wait until it is done"
            ) from error
        yield


def record_engine(folder: Path, entry: EngineEntry) -> None:
    """Put an engine into the manifest as it is now; one of the same place goes."""
    manifest = Bundle.open_manifest(folder)
    others = tuple(other for other in manifest.engines if other.file != entry.file)
    engines = tuple(sorted((*others, entry), key=lambda engine: engine.file))
    write_manifest(folder, msgspec.structs.replace(manifest, engines=engines))
