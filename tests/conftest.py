"""Fixtures shared by all rooms."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Folder of a golden set by name: below $WORLDVLN_GOLDEN if that is set, else below tests/golden.

    Somebody else's folder may hold some of the sets only; ours holds all of them.
    """
    other = os.environ.get("WORLDVLN_GOLDEN")
    root = Path(other or Path(__file__).parent / "golden")
    if other and not root.is_dir():
        pytest.fail(f"$WORLDVLN_GOLDEN names {root}, which is no folder")

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            if other:
                pytest.skip(f"$WORLDVLN_GOLDEN has no set {name!r}")
            pytest.fail(f"golden set {name!r} is missing: {path} is no folder")
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random model of `small_models.tiny_config()`."""
    from small_models import save_random_checkpoint, tiny_config  # needs torch, which not every room does

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_random_checkpoint(folder, tiny_config())
    return folder


@pytest.fixture(scope="session")
def tracer():
    """One memory of traced graphs for all tests: exports of a model take seconds from the second one on."""
    from worldvln_edge.export.graph_tracer import GraphTracer

    return GraphTracer()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tracer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle folder exported from `tiny_checkpoint`. Read-only: copy it before changing a file."""
    from worldvln_edge.export.exporter import export_bundle
    from worldvln_edge.models.checkpoint_source import open_any

    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(open_any(tiny_checkpoint), folder, tracer=tracer)
    return folder
