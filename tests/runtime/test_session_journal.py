"""What a server was told and answered is on disk before it answers, and every whole record of it is read again."""

import errno
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from worldvln_edge.runtime.sessions.journal_records import (
    Frames,
    JournalDamageError,
    Opening,
    RecordedSession,
    Settings,
    encode_record,
    frames_records,
    segment_record,
)
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.sessions.session_journal import JournalError, SessionJournal

KEY = ("peer", "../../etc/passwd")


def opening(key=KEY, **changes) -> Opening:
    fields = {"prompt": "go", "seed": 7, "negative_prompt": "", "emit": "ahead", "horizons": None}
    return Opening(peer=key[0], name=key[1], reply="step", policy="p", **{**fields, **changes})


def frames(count: int, first: int = 1, hw=(4, 6)) -> list[np.ndarray]:
    return [np.full((*hw, 3), first + index, np.uint8) for index in range(count)]


def frames_record(frames: list[np.ndarray], t_ns: list[int] | None) -> list[Frames]:
    return frames_records(frames, t_ns, arrived_s=1e9 + len(frames))


def chunk(segment: int, **changes) -> ActionChunk:
    actions = np.arange(24, dtype=np.float32).reshape(4, 6) + segment
    return ActionChunk(segment=segment, actions=actions, observed_frames=5, seed=7, **changes)


def write(journal: SessionJournal, key=KEY) -> None:
    journal.open(opening(key)).result()
    for record in frames_record(frames(2), [10, 20]):
        journal.add(key, record).result()
    answered = chunk(0, profile="fast", profile_reason="late", hold="late")
    journal.add(key, segment_record(answered, answers=(1, 2))).result()
    journal.add(key, Settings(prompt="turn", seed=8, negative_prompt="slow")).result()
    for record in frames_record(frames(3, first=3), None):
        journal.add(key, record).result()


def go_on(journal: SessionJournal, key=KEY) -> RecordedSession:
    """Read it, and write behind it from now on."""
    found = journal.read(key).result()
    journal.go_on(key, found).result()
    return found


def check(found, *, count: int = 5) -> None:
    assert found.opening == opening()
    assert [int(frame[0, 0, 0]) for frame in found.frames] == list(range(1, count + 1))
    assert found.capture_ns == {1: 10, 2: 20}
    assert found.settings == Settings(prompt="turn", seed=8, negative_prompt="slow")
    assert found.arrived_s == [1e9 + 2] * 2 + [1e9 + 3] * 3 + [1e9 + 2] * (count - 5)
    assert found.last_call == ((1, 2), 0)
    assert (found.emitted, found.chunks[0].hold, found.chunks[0].profile) == (0, "late", "fast")
    np.testing.assert_array_equal(found.chunks[0].actions, chunk(0).actions)


def test_everything_is_read_back_by_another_process(tmp_path):
    write(SessionJournal(tmp_path))  # never closed: the process was killed
    check(SessionJournal(tmp_path).read(KEY).result())


def test_what_follows_a_restore_is_written_behind_it(tmp_path):
    write(SessionJournal(tmp_path))
    second = SessionJournal(tmp_path)
    go_on(second)
    for record in frames_record(frames(2, first=6), None):
        second.add(KEY, record).result()
    check(SessionJournal(tmp_path).read(KEY).result(), count=7)


def test_a_file_that_was_cut_anywhere_gives_its_whole_records(tmp_path):
    write(SessionJournal(tmp_path / "whole"))
    (path,) = (tmp_path / "whole").iterdir()
    data = path.read_bytes()
    (tmp_path / "cut").mkdir()
    seen, opening_bytes = [], len(encode_record(opening()))
    for end in range(opening_bytes, len(data)):
        (tmp_path / "cut" / path.name).write_bytes(data[:end])
        seen.append(len(SessionJournal(tmp_path / "cut").read(KEY).result().frames))
    assert sorted(set(seen)) == [0, 2]
    assert seen == sorted(seen)


@pytest.mark.parametrize("end", [0, 5, 40])
def test_a_file_that_ends_within_its_first_record_is_damage(tmp_path, end):
    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    os.truncate(path, end)
    with pytest.raises(JournalDamageError, match=f"ends within its first record, after {end} bytes"):
        SessionJournal(tmp_path).read(KEY).result()


def test_a_changed_byte_anywhere_is_damage_and_never_a_shorter_flight(tmp_path):
    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(JournalDamageError, match="is not as it was written"):
            SessionJournal(tmp_path).read(KEY).result()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([opening(version=1)], "it has version 1, this program reads 2"),
        ([opening(("peer", "other"))], "another session"),
        ([Settings(prompt="x", seed=0, negative_prompt="")], "does not say how the session began"),
        ([opening(), opening()], "contradicts itself"),
        (
            [opening(), msgspec.structs.replace(frames_record(frames(1), None)[0], shape=(2, 4, 6, 3))],
            "contradicts itself",
        ),
    ],
)
def test_whole_records_that_tell_no_session_are_damage(tmp_path, records, message):
    journal = SessionJournal(tmp_path)
    journal.open(opening()).result()
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"".join(encode_record(record) for record in records))
    with pytest.raises(JournalDamageError, match=message):
        SessionJournal(tmp_path).read(KEY).result()


def test_a_record_of_a_later_version_is_damage(tmp_path):
    class Later(msgspec.Struct, tag="later"):
        pass

    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + encode_record(Later()))
    with pytest.raises(JournalDamageError, match="of another version"):
        SessionJournal(tmp_path).read(KEY).result()


def test_a_file_that_cannot_be_read_is_damage(tmp_path):
    journal = SessionJournal(tmp_path)
    write(journal)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(JournalDamageError, match="cannot be read"):
        journal.read(KEY).result()


def test_a_journal_that_was_set_aside_is_in_nobodys_way(tmp_path):
    write(SessionJournal(tmp_path))
    journal = SessionJournal(tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    aside = journal.set_aside(KEY).result()
    assert (aside.parent, aside.stem.partition(".")[0], aside.read_bytes()) == (tmp_path, path.stem, data)
    assert journal.read(KEY).result() is None
    assert journal.set_aside(KEY).result() is None
    write(journal)
    check(SessionJournal(tmp_path).read(KEY).result())


def test_a_few_are_kept_aside_and_the_oldest_go_first(tmp_path):
    journal, made = SessionJournal(tmp_path), []
    for _ in range(6):
        write(journal)
        made.append(journal.set_aside(KEY).result())
    journal = SessionJournal(tmp_path)  # a later process counts them too
    for _ in range(6):
        write(journal)
        made.append(journal.set_aside(KEY).result())
    assert sorted(tmp_path.iterdir()) == sorted(made[-8:])


def test_what_is_set_aside_goes_first_when_the_folder_is_full(tmp_path):
    one = len(b"".join(encode_record(r) for r in (opening(), *frames_record(frames(5), None)))) + 400
    journal = SessionJournal(tmp_path, max_bytes=3 * one)
    write(journal, ("peer", "a"))
    write(journal)
    aside = journal.set_aside(KEY).result()
    for name in ("b", "c"):
        write(journal, ("peer", name))
    assert not aside.exists()
    assert all(journal.read(("peer", name)).result() for name in ("a", "b", "c"))


def test_records_after_a_torn_one_go_where_it_began(tmp_path):
    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - 3)
    second = SessionJournal(tmp_path)
    assert len(go_on(second).frames) == 2
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
    journal = SessionJournal(tmp_path, max_bytes=1900)
    for name in ("a", "b", "c"):
        write(journal, ("peer", name))
    kept = [name for name in ("a", "b", "c") if journal.read(("peer", name)).result() is not None]
    assert kept == ["b", "c"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1900


def test_a_session_that_is_too_large_alone_is_left_out(tmp_path, caplog):
    journal = SessionJournal(tmp_path, max_bytes=500)
    write(journal)
    assert journal.read(KEY).result() is None
    assert "more than 500 bytes; a session goes on without" in caplog.text


def test_old_files_go_when_the_server_starts(tmp_path):
    write(SessionJournal(tmp_path))
    (path,) = tmp_path.iterdir()
    os.utime(path, (1, 1))
    assert SessionJournal(tmp_path).read(KEY).result() is None
    assert list(tmp_path.iterdir()) == []


def test_sessions_of_an_earlier_process_are_forgotten_when_nobody_asks_for_them(tmp_path):
    now_s = [1000.0]
    write(SessionJournal(tmp_path))
    write(SessionJournal(tmp_path), ("peer", "taken up"))
    journal = SessionJournal(tmp_path, ttl_s=60, clock=lambda: now_s[0])
    go_on(journal, ("peer", "taken up"))
    now_s[0] += 50
    journal.forget_old().result()
    assert journal.read(KEY).result() is not None
    now_s[0] += 11
    assert journal.read(KEY).result() is None
    journal.forget_old().result()
    assert journal.read(("peer", "taken up")).result() is not None
    assert len(list(tmp_path.iterdir())) == 1


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


def test_a_disk_that_takes_nothing_any_more_ends_no_request(tmp_path, monkeypatch, caplog):
    def refuse(path, **_):
        raise OSError(errno.EROFS, "Read-only file system")

    journal = SessionJournal(tmp_path)
    write(journal)
    (path,) = tmp_path.iterdir()
    journal._files[path] = FullDisk()
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "rename", lambda path, target: refuse(path))
    journal.add(KEY, Settings(prompt="x", seed=0, negative_prompt="")).result()
    journal.forget(KEY).result()
    assert journal.set_aside(KEY).result() is None
    assert "cannot be removed" in caplog.text
    assert "cannot be renamed" in caplog.text


def test_a_journal_that_cannot_go_on_is_no_journal(tmp_path, monkeypatch, caplog):
    def refuse(path, length):
        raise OSError(errno.EIO, "Input/output error")

    write(SessionJournal(tmp_path))
    monkeypatch.setattr(os, "truncate", refuse)
    go_on(SessionJournal(tmp_path))
    assert "goes on without a journal" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_frames_of_two_sizes_are_two_records(tmp_path):
    records = frames_record([*frames(2), *frames(1, hw=(2, 2))], [1, 2, 3])
    assert [(record.shape, record.t_ns) for record in records] == [((2, 4, 6, 3), [1, 2]), ((1, 2, 2, 3), [3])]
    assert frames_record([], None) == []


def test_folder_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"file cannot be used .*--journal"):
        SessionJournal(tmp_path / "file")
