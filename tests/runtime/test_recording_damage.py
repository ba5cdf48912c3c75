"""A recording that was cut, damaged or starved tells what it can, and says what is missing; the flight goes on."""

import asyncio
import errno
import logging
import os
import random
import threading
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from crashing_server import SeeingPolicy
from http_calls import HttpCalls
from mcap.writer import Writer
from recorded_flights import files, kinds, messages, picture, pictures, recording_server, replayed

from worldvln_edge import cli
from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import Observe, Start
from worldvln_edge.runtime.recording import recorder as recorder_module
from worldvln_edge.runtime.recording import recording_file
from worldvln_edge.runtime.recording.event_queue import EventQueue
from worldvln_edge.runtime.recording.recorder import Recorder, RecorderConfig
from worldvln_edge.runtime.recording.recording_file import RecordingFile
from worldvln_edge.runtime.recording.recording_messages import Gap, Segment
from worldvln_edge.runtime.recording.recording_reader import Recording, RecordingReadError
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.session_events import FramesStored, SentFrame, SessionClosed, SessionResumed
from worldvln_edge.runtime.sessions.session_manager import SessionManager

JPEGS = [picture(value) for value in range(1, 50)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A recording of many small chunks."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording_file, "_CHUNK_BYTES", 1500)
        with recording_server(SeeingPolicy(), folder) as server, SessionClient(server.url) as client:
            client.start("go", seed=3)
            for jpeg in JPEGS:
                client.observe([jpeg])
    (path,) = files(folder)
    return path.read_bytes()


def written(folder: Path, data: bytes) -> Path:
    path = folder / "flight.000.mcap"
    path.write_bytes(data)
    return path


def chunk_ends(data: bytes) -> list[int]:
    """Where chunks end in a file: each is one opcode, 8 bytes of length, and that many bytes."""
    ends, at = [], 8
    while at < len(data) - 8:
        length = int.from_bytes(data[at + 1 : at + 9], "little")
        if data[at] == 6:
            ends.append(at + 9 + length)
        at += 9 + length
    return ends


def test_cut_recording_opens_up_to_its_last_whole_chunk(whole, tmp_path):
    ends, reference = chunk_ends(whole), messages(Recording(written(tmp_path, whole)))
    assert len(ends) > 20
    counts = {end: len(messages(Recording(written(tmp_path, whole[:end])))) for end in ends}
    assert sorted(counts.values()) == list(counts.values())
    assert counts[ends[-1]] == len(reference)
    for cut in sorted(random.Random(0).sample(range(ends[0], len(whole) - 1), 50)):
        recording = Recording(written(tmp_path, whole[:cut]))
        found = messages(recording)
        assert found == reference[: counts[max(end for end in ends if end <= cut)]], cut
        assert (len(recording.problems), "was cut" in recording.problems[0]) == (1, True), recording.problems
        report = replayed(recording, SeeingPolicy())
        segments = sum(isinstance(each, Segment) for each in found)
        assert (report.is_same, report.segments, report.missing) == (
            segments > 0,
            segments,
            "" if segments else "no segment is recorded",
        )
        assert not recording.is_there_more


@pytest.mark.parametrize("size", [0, 5, 8, 30, 900])
def test_recording_that_was_cut_in_its_first_chunk_is_refused(size, whole, tmp_path):
    with pytest.raises(RecordingReadError, match=r"flight\.000\.mcap: was cut at \d+ bytes.*nothing can be read"):
        Recording(written(tmp_path, whole[:size]))


def test_damaged_bytes_are_never_worse_than_a_problem(whole, tmp_path):
    chance, reference = random.Random(1), messages(Recording(written(tmp_path, whole)))
    refused = told = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 4, 40])):
            at = chance.randrange(len(data))
            data[at : at + chance.choice([0, 1, 1, 1, 9])] = chance.randbytes(chance.choice([1, 1, 1, 2]))
        path = written(tmp_path, bytes(data))
        try:
            recording = Recording(path)
        except RecordingReadError:
            refused += 1
            continue
        found = messages(recording)
        if recording.problems:
            told += 1
            assert found == reference[: len(found)]  # chunks have checksums: what is read is what was written
    assert refused > 5
    assert told > 50


def test_other_files_are_refused_with_what_they_are(tmp_path):
    with pytest.raises(RecordingReadError, match="is not there"):
        Recording(tmp_path / "none.mcap")
    with pytest.raises(RecordingReadError, match="is a folder: name one of the files"):
        Recording(tmp_path)
    with pytest.raises(RecordingReadError, match=r"is no MCAP file; nothing can be read"):
        Recording(written(tmp_path, b"a picture or so " * 10))
    with (tmp_path / "other.mcap").open("wb") as file:
        writer = Writer(file)
        writer.start()
        writer.finish()
    with pytest.raises(RecordingReadError, match=r"holds no message; nothing can be read"):
        Recording(tmp_path / "other.mcap")
    file = RecordingFile(tmp_path / "gap.mcap")
    file.add_note(Gap(first_frame=0, last_frame=0, events=1), 0)
    file.finish()
    with pytest.raises(RecordingReadError, match=r"does not begin with /session"):
        Recording(tmp_path / "gap.mcap")


def test_missing_part_is_named(tmp_path):
    config = {"part_bytes": 8000}
    with recording_server(NullPolicy(), tmp_path, config=config) as server, SessionClient(server.url) as client:
        client.start("go")
        client.observe(JPEGS)
    first, second, third, *_ = files(tmp_path)
    second.rename(tmp_path / "elsewhere")
    recording = Recording(third)
    assert 0 < len(pictures(recording)) < 49
    assert f"{third.name}: is part 2, and part 1 is missing" in recording.problems[0]
    assert recording.is_there_more
    first.unlink()
    with pytest.raises(RecordingReadError, match="part 0 of this recording is missing"):
        Recording(third)


def test_other_version_is_refused(whole, tmp_path):
    opening = Recording(written(tmp_path, whole)).opening
    file = RecordingFile(tmp_path / "newer.mcap")
    file.add_note(msgspec.structs.replace(opening, version=9), 0)
    file.finish()
    with pytest.raises(RecordingReadError, match=r"newer\.mcap: has version 9, this program reads 1; nothing"):
        Recording(tmp_path / "newer.mcap")


def frames(uid: str, first: int, size: int) -> FramesStored:
    return FramesStored(uid=uid, first=first, sent=[SentFrame(bytes(size))], frames=(), age_s=0, t_ns=None, poses=None)


def test_queue_leaves_out_what_does_not_fit_and_tells_it_once():
    queue = EventQueue(max_bytes=100, max_events=4)
    for first in (1, 2, 3, 4):
        queue.put(frames("a", first, 60), first)
    queue.put(SessionResumed(uid="b"), 5)
    queue.put(SessionResumed(uid="a"), 6)
    taken = [queue.take(0) for _ in range(3)]
    assert [each.event.uid for each in taken] == ["a", "b", "a"]
    assert [each.gap for each in taken] == [None, None, Gap(first_frame=2, last_frame=4, events=3)]
    assert (queue.lost_events, queue.lost_frames, queue.take(0)) == (3, 3, None)
    queue.done(taken[0])
    queue.put(frames("a", 5, 5000), 7)  # one that is larger than all, alone
    assert queue.take(0).gap is None
    for _ in range(6):
        queue.put(SessionResumed(uid="c"), 8)
    assert queue.lost_events == 5


def test_queue_that_is_full_still_has_room_for_beginnings_and_ends():
    """Without its beginning nothing of a session is recorded, and without its end its file stays open."""
    queue, ended = EventQueue(max_bytes=100, max_events=2), {"reason": "ended", "emitted": -1, "is_done": False}
    for _ in range(3):
        queue.put(SessionResumed(uid="a"), 1)
    queue.put(SessionClosed(uid="a", frames=0, **ended), 2)
    taken = [queue.take(0) for _ in range(3)]
    assert [type(each.event) for each in taken] == [SessionResumed, SessionResumed, SessionClosed]
    assert taken[2].gap == Gap(first_frame=0, last_frame=0, events=1)
    for _ in range(9):
        queue.put(SessionClosed(uid="b", frames=0, **ended), 3)
    assert queue.lost_events == 1 + 5  # that room is not without end either


def test_slow_disk_costs_frames_in_the_recording_and_no_time_in_flight(tmp_path, monkeypatch):
    slow = threading.Event()
    monkeypatch.setattr(recording_file.os, "fsync", lambda descriptor: slow.wait(20) and None)
    monkeypatch.setattr(recording_file, "_CHUNK_BYTES", 1)
    policy = SeeingPolicy()
    recorder = Recorder(tmp_path, policy.info, config=RecorderConfig(queue_bytes=2000, least_free_bytes=0))

    async def fly() -> float:
        manager = SessionManager(policy)
        manager.events.subscribe(recorder.watch)
        await manager.start("", Start(id=1, session="a", prompt="go"))
        began = time.perf_counter()
        for index, jpeg in enumerate(JPEGS[:30], start=1):
            await manager.observe("", Observe(id=index, session="a", first=index, frames=[jpeg]))
        took_s = time.perf_counter() - began
        lost = recorder.lost_frames
        assert 20 <= lost < 30
        slow.set()
        while recorder._queue._waiting:
            await asyncio.sleep(0.01)
        await manager.observe("", Observe(id=99, session="a", first=31, frames=[JPEGS[30]]))
        await manager.end("", "a", 100)
        manager.close()
        return took_s

    assert asyncio.run(fly()) < 5.0
    recorder.close()
    recording = Recording(files(tmp_path)[0])
    gaps = [each for each in messages(recording) if isinstance(each, Gap)]
    lost = {frame for gap in gaps for frame in range(gap.first_frame, gap.last_frame + 1)}
    assert [each.index for each in pictures(recording)] == sorted(set(range(1, 32)) - lost)
    report = replayed(recording, SeeingPolicy())
    assert not report.is_same
    assert f"frames {min(lost)} to" in report.missing
    assert kinds(recording)["Closing"] == 1


def fly_two(server) -> None:
    """Two segments, with a pause in which the recorder meets its disk."""
    with SessionClient(server.url) as client:
        client.start("go")
        assert client.observe([JPEGS[0]]).segment == 0
        time.sleep(0.5)
        assert client.observe(JPEGS[1:17]).segment == 1


def test_full_disk_ends_the_recording_and_not_the_flight(tmp_path, monkeypatch, caplog):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recording_file.os, "fsync", full)
    with recording_server(NullPolicy(), tmp_path, config={"flush_s": 0.05}) as server:
        fly_two(server)
        with HttpCalls(server) as http:
            metrics = http.get("/metrics")[1].decode()
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert line.startswith("recording has stopped: No space left on device")
    assert "flights go on" in line
    assert "worldvln_recording 0.0" in metrics


def test_recording_ends_before_the_disk_is_full_and_its_files_are_whole(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recorder_module.shutil, "disk_usage", lambda folder: shutil_usage(free=9_000_000))
    config = {"flush_s": 0.05, "least_free_bytes": 5_000_000}
    with recording_server(NullPolicy(), tmp_path, config=config) as server:
        fly_two(server)
        monkeypatch.setattr(recorder_module.shutil, "disk_usage", lambda folder: shutil_usage(free=4_000_000))
        fly_two(server)
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert "4 MB are free" in line
    assert "5 MB are left to others" in line
    (path,) = files(tmp_path)
    assert Recording(path).problems == []


def test_recording_that_ends_for_room_between_two_parts_is_whole(tmp_path, monkeypatch, caplog):
    left = iter([9_000_000] * 2)
    monkeypatch.setattr(recorder_module.shutil, "disk_usage", lambda folder: shutil_usage(next(left, 4_000_000)))
    config = {"flush_s": 60.0, "least_free_bytes": 5_000_000, "part_bytes": 8000}
    with recording_server(NullPolicy(), tmp_path, config=config) as server, SessionClient(server.url) as client:
        client.start("go")
        client.observe(JPEGS)
    assert "4 MB are free" in caplog.text
    assert "internal error" not in caplog.text
    first, second = files(tmp_path)
    assert Recording(first).problems == []
    assert len(pictures(Recording(second))) < 49


def shutil_usage(free: int):
    return type("Usage", (), {"free": free})


def test_metrics_count_what_was_recorded(tmp_path):
    with recording_server(NullPolicy(), tmp_path) as server:
        fly_two(server)
        time.sleep(0.3)
        with HttpCalls(server) as http:
            metrics = http.get("/metrics")[1].decode()
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("worldvln_record"))
    assert lines["worldvln_recording"] == "1.0"
    assert float(lines["worldvln_recorded_bytes"]) > sum(map(len, JPEGS[:17]))
    assert (lines["worldvln_recorder_lost_frames"], lines["worldvln_recorder_lost_events"]) == ("0.0", "0.0")


def test_info_says_that_a_recording_was_cut(whole, tmp_path):
    path = written(tmp_path, whole[: chunk_ends(whole)[10] + 5])
    result = CliRunner().invoke(cli.main, ["record", "info", str(path)])
    assert result.exit_code == 0
    assert "problem      flight.000.mcap: was cut at" in result.output
    refused = CliRunner().invoke(cli.main, ["record", "info", str(written(tmp_path, b"x"))])
    assert (refused.exit_code, refused.output[:7]) == (1, "error: ")
