"""What a server was told and answered is on disk before it answers, and every whole record of it is read again."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.sessions.session_journal import (
    JournalError,
    Opening,
    SessionJournal,
    Settings,
    frames_record,
    segment_record,
)

KEY = ("peer", "../../etc/passwd")


def opening(key=KEY, **changes) -> Opening:
    fields = {"prompt": "go", "seed": 7, "negative_prompt": "", "emit": "ahead", "horizons": None, "policy": "p"}
    return Opening(peer=key[0], name=key[1], **{**fields, **changes})


def frames(count: int, first: int = 1, hw=(4, 6)) -> list[np.ndarray]:
    return [np.full((*hw, 3), first + index, np.uint8) for index in range(count)]


def chunk(segment: int, **changes) -> ActionChunk:
    actions = np.arange(24, dtype=np.float32).reshape(4, 6) + segment
    return ActionChunk(segment=segment, actions=actions, observed_frames=5, seed=7, **changes)


def write(journal: SessionJournal, key=KEY) -> None:
    journal.open(opening(key)).result()
    for record in frames_record(frames(2), [10, 20]):
        journal.add(key, record).result()
    journal.add(key, segment_record(chunk(0, profile="fast", profile_reason="late", hold="late"))).result()
    journal.add(key, Settings(prompt="turn", seed=8, negative_prompt="slow")).result()
    for record in frames_record(frames(3, first=3), None):
        journal.add(key, record).result()


def check(found, *, count: int = 5) -> None:
    assert found.opening == opening()
    assert [int(frame[0, 0, 0]) for frame in found.frames] == list(range(1, count + 1))
    assert found.capture_ns == {1: 10, 2: 20}
    assert found.settings == Settings(prompt="turn", seed=8, negative_prompt="slow")
    assert (found.emitted, found.chunks[0].hold, found.chunks[0].profile) == (0, "late", "fast")
    np.testing.assert_array_equal(found.chunks[0].actions, chunk(0).actions)


def test_everything_is_read_back_by_another_process(tmp_path):
    write(SessionJournal(tmp_path))  # never closed: the process was killed
    check(SessionJournal(tmp_path).read(KEY).result())


def test_what_follows_a_restore_is_written_behind_it(tmp_path):
    write(SessionJournal(tmp_path))
    second = SessionJournal(tmp_path)
    second.read(KEY).result()
    for record in frames_record(frames(2, first=6), None):
        second.add(KEY, record).result()
    check(SessionJournal(tmp_path).read(KEY).result(), count=7)


def test_a_file_that_was_cut_anywhere_gives_its_whole_records(tmp_path):
    write(SessionJournal(tmp_path / "whole"))
    (path,) = (tmp_path / "whole").iterdir()
    data = path.read_bytes()
    (tmp_path / "cut").mkdir()
    seen = []
    for end in range(len(data)):
        (tmp_path / "cut" / path.name).write_bytes(data[:end])
        found = SessionJournal(tmp_path / "cut").read(KEY).result()
        seen.append(-1 if found is None else len(found.frames))
    assert sorted(set(seen)) == [-1, 0, 2]
    assert seen == sorted(seen)


def test_a_changed_byte_ends_what_is_read(tmp_path):
    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = SessionJournal(tmp_path).read(KEY).result()
    assert found is None or len(found.frames) < 5


def test_records_after_a_torn_one_go_where_it_began(tmp_path):
    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - 3)
    second = SessionJournal(tmp_path)
    assert len(second.read(KEY).result().frames) == 2
    for record in frames_record(frames(3, first=3), None):
        second.add(KEY, record).result()
    check(SessionJournal(tmp_path).read(KEY).result())


def test_sessions_do_not_find_each_other(tmp_path):
    journal = SessionJournal(tmp_path)
    write(journal)
    for key in (("peer", "other"), ("other", KEY[1]), ("peer../", "../etc/passwd")):
        assert journal.read(key).result() is None


def test_names_never_become_paths(tmp_path):
    folder = tmp_path / "journal"
    write(SessionJournal(folder))
    assert [path.parent for path in tmp_path.rglob("*") if path.is_file()] == [folder]
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_ended_session_leaves_nothing(tmp_path):
    journal = SessionJournal(tmp_path)
    write(journal)
    journal.forget(KEY).result()
    assert list(tmp_path.iterdir()) == []
    journal.add(KEY, Settings(prompt="x", seed=0, negative_prompt="")).result()
    assert journal.read(KEY).result() is None


def test_the_session_written_least_lately_goes_when_the_folder_is_full(tmp_path):
    journal = SessionJournal(tmp_path, max_bytes=900)
    for name in ("a", "b", "c"):
        write(journal, ("peer", name))
    kept = [name for name in ("a", "b", "c") if journal.read(("peer", name)).result() is not None]
    assert kept[-1] == "c"
    assert "a" not in kept
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 900


def test_old_files_go_when_the_server_starts(tmp_path):
    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    os.utime(path, (1, 1))
    assert SessionJournal(tmp_path).read(KEY).result() is None
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        pass


def test_a_full_disk_ends_the_journal_and_not_the_session(tmp_path, caplog):
    journal = SessionJournal(tmp_path)
    write(journal)
    (path,) = tmp_path.iterdir()
    journal._files[path] = FullDisk()
    for record in frames_record(frames(1), None):
        journal.add(KEY, record).result()
    assert "goes on without a journal" in caplog.text
    assert "No space left" in caplog.text
    journal.add(KEY, Settings(prompt="x", seed=0, negative_prompt="")).result()
    assert journal.read(KEY).result() is None


def test_frames_of_two_sizes_are_two_records(tmp_path):
    records = frames_record([*frames(2), *frames(1, hw=(2, 2))], [1, 2, 3])
    assert [(record.shape, record.t_ns) for record in records] == [((2, 4, 6, 3), [1, 2]), ((1, 2, 2, 3), [3])]
    assert frames_record([], None) == []


def test_folder_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"file cannot be used .*--journal"):
        SessionJournal(tmp_path / "file")
