"""Fixtures shared by all rooms, and how the tests are spread over processes."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

_WORKER = "PYTEST_XDIST_WORKER"  # set by pytest-xdist in its processes


def pytest_configure() -> None:
    if _WORKER in os.environ:
        # One thread a process, or the processes would wait for each other. Also for the programs that tests start.
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _WORKER in os.environ:
        from process_groups import long_ones_first

        long_ones_first(items)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, without which tests run one after the other
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from process_groups import GroupScheduling

    return GroupScheduling(config, log) if config.getvalue("dist") == "load" else None


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
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Call `make(folder)` in the first process that asks for the folder `name`; the others wait for it and share it."""
    root = tmp_path_factory.getbasetemp()
    if _WORKER in os.environ:
        root = root.parent  # each process has its own folder below that of the run

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path = root / "shared" / name
        path.parent.mkdir(exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = path.with_suffix(".done")  # what a failed `make` left behind is not taken for a result
            if not done.exists():
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Checkpoint folder of a random model of `small_models.tiny_config()`."""
    from small_models import save_random_checkpoint, tiny_config  # needs torch, which not every room does

    return made_once("tiny-checkpoint", lambda folder: save_random_checkpoint(folder, tiny_config()))


@pytest.fixture(scope="session")
def tracer():
    """One memory of traced graphs for all tests: exports of a model take seconds from the second one on."""
    from worldvln_edge.export.graph_tracer import GraphTracer

    return GraphTracer()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tracer, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Bundle folder exported from `tiny_checkpoint`. Read-only: copy it before changing a file."""
    from worldvln_edge.export.exporter import export_bundle
    from worldvln_edge.models.checkpoint_source import open_any

    return made_once("tiny-bundle", lambda folder: export_bundle(open_any(tiny_checkpoint), folder, tracer=tracer))
