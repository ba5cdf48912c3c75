"""What exports bundles: the code of the rooms that take part, and the packages that do the work.

A bundle and an unfinished export are worth keeping only as long as the same exporter would write them again. The
version number does not tell, because code changes between releases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from worldvln_edge.bundle import file_entry

EXPORTER_ROOMS = ("worldvln_edge", "worldvln_edge.models", "worldvln_edge.export", "worldvln_edge.runtime")
EXPORTER_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers", "numpy")


def code_sha256(rooms: Sequence[str] = EXPORTER_ROOMS) -> str:
    """sha256 (hex) over all Python files of the rooms that are installed; sub-packages are named one by one."""
    digest = hashlib.sha256()
    for room in rooms:
        spec = find_spec(room)
        folders = spec.submodule_search_locations if spec is not None else None
        for folder in folders or ():
            for path in sorted(Path(folder).glob("*.py")):
                digest.update(f"{room}/{path.name} {file_entry(path).sha256}\n".encode())
    return digest.hexdigest()


def package_versions(packages: Sequence[str] = EXPORTER_PACKAGES) -> dict[str, str | None]:
    """Installed version by package; None: not installed."""
    return {name: _version(name) for name in packages}


@cache
def exporter_identity() -> str:
    """sha256 (hex) of everything above: it changes whenever an export may come out differently.

    Once per process, which goes on with the code that it has imported whatever happens to the files.
    """
    versions = "\n".join(f"{name} {version}" for name, version in package_versions().items())
    return hashlib.sha256(f"{code_sha256()}\n{versions}".encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
