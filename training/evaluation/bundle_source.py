"""A bundle that is exported again exactly when something that it is made from has changed.

Exporting takes half a minute or more, so a bundle is kept; but a kept bundle must never stand for another checkpoint or
for an older exporter. Beside its files lies `source.json`: the hash of every file of the checkpoint, of the code that
exports, and the versions of the packages that do the work. The exporter replaces a bundle's folder in whole, so a
bundle that was exported by other means has no `source.json` and is made again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from worldvln_edge.atomic import atomic_file
from worldvln_edge.bundle import Bundle, BundleError, file_entry
from worldvln_edge.exporter_identity import code_sha256, package_versions

SOURCE_FILE = "source.json"


class ExportFailedError(RuntimeError):
    """`worldvln-edge export` failed; it said why on stderr."""


def ensure_bundle(checkpoint: Path, bundle: Path) -> None:
    """Export `checkpoint` to `bundle`, unless a whole bundle of this very checkpoint and exporter lies there.

    Args:
        checkpoint: folder; all files directly in it count, except for its model card (Markdown).
        bundle: folder; a bundle there is replaced.

    Raises:
        ExportFailedError: the export failed.
        FileNotFoundError: no such checkpoint folder.
    """
    source = bundle_source(checkpoint)
    if _is_current(bundle, source):
        return
    export_bundle(checkpoint, bundle)
    with atomic_file(bundle / SOURCE_FILE) as building:
        building.write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def bundle_source(checkpoint: Path) -> dict[str, Any]:
    """What a bundle is made from, as JSON: the checkpoint's files, the exporter's code, the packages it uses."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.suffix != ".md")
    return {
        "checkpoint": {path.name: file_entry(path).sha256 for path in files},
        "code": code_sha256(),
        "packages": package_versions(),
    }


def export_bundle(checkpoint: Path, bundle: Path) -> None:
    """`worldvln-edge export` as a process of its own; its progress is shown on stderr.

    Raises:
        ExportFailedError: it failed.
    """
    command = [sys.executable, "-m", "worldvln_edge", "export", "--checkpoint", str(checkpoint), "--out", str(bundle)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise ExportFailedError(
            f"the export of {checkpoint} ended with status {done.returncode}; the reason stands above"
        )


def _is_current(bundle: Path, source: dict[str, Any]) -> bool:
    try:
        if json.loads((bundle / SOURCE_FILE).read_text(encoding="utf-8")) != source:
            return False
        Bundle.open(bundle)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, BundleError):  # no record, or no whole bundle
        return False
    return True
