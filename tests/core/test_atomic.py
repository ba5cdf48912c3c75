"""Folders appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from worldvln_edge.atomic import FolderInUseError, atomic_directory, resumable_directory

MARKER = "old"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "deep" / "bundle"
    with atomic_directory(target, MARKER) as building:
        (building / "a").write_text("1", encoding="utf-8")
        assert not target.exists()
    assert (target / "a").read_text(encoding="utf-8") == "1"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_old_folder_is_replaced_in_whole(tmp_path: Path):
    target = tmp_path / "bundle"
    for content in ("first", "second"):
        with atomic_directory(target, MARKER) as building:
            (building / MARKER).touch()
            (building / content).touch()
    assert names(target) == [MARKER, "second"]
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "bundle"
    with atomic_directory(target, MARKER) as building:
        (building / "old").touch()
    with pytest.raises(error), atomic_directory(target, MARKER) as building:  # noqa: PT012
        (building / "half").touch()
        raise error
    assert names(target) == ["old"]
    assert names(tmp_path) == ["bundle"]


def test_failed_move_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "bundle"
    with atomic_directory(target, MARKER) as building:
        (building / "old").touch()
    move = os.replace

    def fail_for_new(source, destination):
        if str(source).endswith(".building"):
            raise OSError("disk is gone")
        move(source, destination)

    monkeypatch.setattr(os, "replace", fail_for_new)
    with pytest.raises(OSError, match="disk is gone"), atomic_directory(target, MARKER) as building:
        (building / "new").touch()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["bundle"]


def test_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "bundle").touch()
    with (
        pytest.raises(FolderInUseError, match="is a file; give the name of a folder"),
        atomic_directory(tmp_path / "bundle", MARKER),
    ):
        pass


def test_folder_of_somebody_else_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "thesis.tex").touch()
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path, Path(".")):
        with pytest.raises(FolderInUseError, match="holds other files"), atomic_directory(target, MARKER):
            pass
    assert names(tmp_path) == ["thesis.tex"]


def test_empty_folder_is_used(tmp_path: Path):
    (tmp_path / "bundle").mkdir()
    with atomic_directory(tmp_path / "bundle", MARKER) as building:
        (building / "new").touch()
    assert names(tmp_path / "bundle") == ["new"]


def test_killed_writer_leaves_the_old_folder(tmp_path: Path):
    target = tmp_path / "bundle"
    with atomic_directory(target, MARKER) as building:
        (building / "old").touch()
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from worldvln_edge.atomic import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1]), 'old') as building:\n"
        "    (building / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(target)], check=False, timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert names(target) == ["old"]
    with atomic_directory(target, MARKER) as building:  # what the dead writer left behind is in nobody's way
        (building / "new").touch()
    assert names(target) == ["new"]


def _stop(target: Path, name: str, text: str) -> None:
    """Write a file into the folder that is being built, and stop."""

    def work() -> None:
        with resumable_directory(target, "marker") as folder:
            (folder / name).write_text(text)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        work()


def test_unfinished_work_is_found_again(tmp_path: Path):
    _stop(tmp_path / "out", "half", "done so far")
    assert not (tmp_path / "out").exists()
    with resumable_directory(tmp_path / "out", "marker") as folder:
        assert (folder / "half").read_text() == "done so far"
        (folder / "marker").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["half", "marker"]


def test_two_runs_do_not_build_the_same_folder(tmp_path: Path):
    with resumable_directory(tmp_path / "out", "marker") as folder:
        with pytest.raises(FolderInUseError, match="another process"), resumable_directory(tmp_path / "out", "marker"):
            pass
        (folder / "marker").touch()
    assert (tmp_path / "out" / "marker").exists()


@pytest.mark.parametrize("moved_in", [False, True])
def test_a_run_that_was_killed_while_it_moved_in_leaves_nothing_behind(tmp_path: Path, moved_in: bool):
    old = tmp_path / ".out.replaced"
    old.mkdir()
    (old / "marker").write_text("old")
    if moved_in:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "marker").write_text("newer")
    _stop(tmp_path / "out", "half", "")
    assert (tmp_path / "out" / "marker").read_text() == ("newer" if moved_in else "old")
    assert not old.exists()
