"""The flight recorder of a server: every session into MCAP files of its own, by a thread that nobody waits for.

    20261121T235900.250Z-<uid>.000.mcap     the session's first part; a part that is full is followed by .001, .002, ...

What cannot be written (a disk that is full, or nearly) ends the recording with a line in the log and in the metrics;
the flight goes on. What comes faster than it can be written is left out and counted, in the file, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from worldvln_edge.runtime.recording.event_queue import EventQueue, Queued, without_decoded_frames
from worldvln_edge.runtime.recording.recording_file import RecordingFile
from worldvln_edge.runtime.recording.recording_messages import FlightSettings, Message, Opening, Picture, Prediction
from worldvln_edge.runtime.recording.session_track import SessionTrack, messages_of, opening_of
from worldvln_edge.runtime.sessions.policy import PolicyInfo
from worldvln_edge.runtime.sessions.session_events import SessionClosed, SessionEvent, SessionOpened

_log = logging.getLogger(__name__)
SUFFIX = ".mcap"
_PAUSE_S = 0.1


class _NearlyFullError(Exception):
    """There is room to end the files, and no more."""


class RecordingError(RuntimeError):
    """The folder for recordings cannot be used. The message says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class RecorderConfig:
    part_bytes: int = 512 * 2**20
    """A file that is larger is followed by another one."""
    flush_s: float = 1.0
    """A power cut loses so much at most."""
    queue_bytes: int = 256 * 2**20
    """Of pictures that wait to be written."""
    least_free_bytes: int = 512 * 2**20
    """That other programs, and the journal, find on the disk: recording ends before."""
    close_within_s: float = 30.0
    """Time to write what waits when the server goes down."""


@dataclass(eq=False)
class _OpenRecording:
    opening: Opening
    stem: str
    file: RecordingFile
    flushed_s: float
    track: SessionTrack = field(default_factory=SessionTrack)


class Recorder:
    """Give `watch` to `SessionEvents.subscribe`.

    Args:
        folder: made if it is not there; readable by its owner only.
        info, settings: of the policy; they stand in every file.
        config: sizes and times.
        clock_ns: nanoseconds since 1970. It is read once: a clock that is set in flight would turn the order of
            messages round.

    Raises:
        RecordingError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        info: PolicyInfo,
        settings: FlightSettings | None = None,
        *,
        config: RecorderConfig | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ):
        self._folder, self._info, self._settings = folder, info, settings or FlightSettings()
        self._config = config or RecorderConfig()
        self._epoch_ns = clock_ns() - time.monotonic_ns()
        self._queue = EventQueue(self._config.queue_bytes)
        self._open: dict[str, _OpenRecording] = {}
        self._stopped_because = ""
        self.written_bytes = 0
        """Of messages, in all files."""
        prepare_folder(folder)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    @property
    def is_recording(self) -> bool:
        return not self._stopped_because

    @property
    def stopped_because(self) -> str:
        """Why nothing is recorded any more; empty while it is."""
        return self._stopped_because

    @property
    def lost_frames(self) -> int:
        """That came faster than they could be written."""
        return self._queue.lost_frames

    @property
    def lost_events(self) -> int:
        """Of any kind, those with frames included."""
        return self._queue.lost_events

    def watch(self, event: SessionEvent) -> None:
        """Take an event; returns at once. See `session_events.SessionWatcher`."""
        if not self._stopped_because:
            self._queue.put(without_decoded_frames(event), self._epoch_ns + time.monotonic_ns())

    def wait_until_written(self) -> None:
        """Return once everything that was told so far was given to the file; for measurements."""
        self._queue.wait_until_done()

    def close(self) -> None:
        """Write what waits, end the files, and let the thread end."""
        self._queue.close()
        self._thread.join(self._config.close_within_s)
        if self._thread.is_alive():
            _log.error("recording: what waited could not be written within %g s", self._config.close_within_s)

    def _run(self) -> None:
        try:
            while not self._queue.is_over:
                queued = self._queue.take(_PAUSE_S)
                if queued is not None:
                    try:
                        self._write(queued)
                    finally:
                        self._queue.done(queued)
                self._flush_old()
            self._finish_all()
        except _NearlyFullError as error:
            self._stop(str(error))
        except OSError as error:
            self._stop(f"{error.strerror} ({self._folder})")
        except Exception as error:  # the thread's end: whatever it is, the flight goes on and somebody is told
            _log.error("recording: internal error", exc_info=error)
            self._stop(f"internal error: {type(error).__name__}")

    def _write(self, queued: Queued) -> None:
        event, time_ns = queued.event, queued.time_ns
        if isinstance(event, SessionOpened):
            self._begin(event, time_ns)
        recording = self._open.get(event.uid)
        if recording is None:
            return  # its beginning was lost
        if queued.gap is not None:
            self._add(recording, queued.gap, time_ns)
        for message in messages_of(event, recording.opening.horizon):
            self._add(recording, message, time_ns)
        if isinstance(event, SessionClosed):
            del self._open[event.uid]
            recording.file.finish()

    def _begin(self, event: SessionOpened, time_ns: int) -> None:
        self._check_room()
        began = time.strftime("%Y%m%dT%H%M%S", time.gmtime(time_ns // 10**9))
        stem = f"{began}.{time_ns // 10**6 % 1000:03d}Z-{event.uid}"
        opening = opening_of(event, self._info, self._settings)
        file = self._new_file(stem, 0)
        self._open[event.uid] = recording = _OpenRecording(opening, stem, file, time.monotonic())
        self._add(recording, opening, time_ns)

    def _new_file(self, stem: str, part: int) -> RecordingFile:
        file = RecordingFile(part_path(self._folder, stem, part))
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # not every file system has a way to say this of folders
                os.fsync(folder)  # a file that is on the disk is found there only if its name is, too
        finally:
            os.close(folder)
        return file

    def _add(self, recording: _OpenRecording, message: Message, time_ns: int) -> None:
        before = recording.file.size_bytes
        if isinstance(message, Picture):
            recording.file.add_picture(message, time_ns)
        elif isinstance(message, Prediction):
            recording.file.add_prediction(message, time_ns)
        else:
            recording.file.add_note(message, time_ns)
            for topic, data in recording.track.draw(message, time_ns):
                recording.file.add(topic, data, time_ns)
        self.written_bytes += recording.file.size_bytes - before
        if recording.file.size_bytes >= self._config.part_bytes:
            self._check_room()
            recording.file.finish()
            recording.opening = msgspec.structs.replace(recording.opening, part=recording.opening.part + 1)
            recording.file = self._new_file(recording.stem, recording.opening.part)
            recording.file.add_note(recording.opening, time_ns)

    def _flush_old(self) -> None:
        now_s, any_flushed = time.monotonic(), False
        for recording in self._open.values():
            if now_s - recording.flushed_s >= self._config.flush_s and not recording.file.is_flushed:
                recording.file.flush()
                recording.flushed_s, any_flushed = now_s, True
        if any_flushed:
            self._check_room()

    def _check_room(self) -> None:
        free, least = shutil.disk_usage(self._folder).free, self._config.least_free_bytes
        if free < least:
            self._finish_all()
            raise _NearlyFullError(
                f"{free / 1e6:.0f} MB are free in {self._folder}, and {least / 1e6:.0f} MB are left to others"
            )

    def _finish_all(self) -> None:
        for recording in self._open.values():
            recording.file.finish()
        self._open.clear()

    def _stop(self, why: str) -> None:
        """Record nothing more; sessions fly on."""
        self._stopped_because = why
        for recording in self._open.values():
            recording.file.abandon()
        self._open.clear()
        self._queue.close()
        self._queue.clear()
        _log.error(
            "recording has stopped: %s; flights go on. Make room, and start the server again to record again", why
        )


def prepare_folder(folder: Path) -> None:
    """Make the folder for recordings, readable by its owner only, unless it is there.

    Raises:
        RecordingError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecordingError(
            f"recordings cannot be written to {folder} ({error.strerror}); name another folder (--record)"
        ) from error


def part_path(folder: Path, stem: str, part: int) -> Path:
    """File of a part of a recording."""
    return folder / f"{stem}.{part:03d}{SUFFIX}"
