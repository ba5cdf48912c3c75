"""Fixtures shared by all rooms."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Folder of a golden set by name: below $WORLDVLN_GOLDEN if that is set, else below tests/golden."""
    root = Path(os.environ.get("WORLDVLN_GOLDEN") or Path(__file__).parent / "golden")

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            pytest.fail(f"golden set {name!r} is missing: {path} is no folder; check $WORLDVLN_GOLDEN")
        return path

    return folder
