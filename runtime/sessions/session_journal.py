"""The write-ahead journal: what a session was told and answered, kept on disk until it ends.

A server that was killed and started again finds its sessions here. One file a session, under a name that no client
chooses: records (`journal_records.py`), appended in the order in which things happened. Frames are kept as sessions
work with them, so a restored session computes the same. Records are written before a request is answered, by a thread
of their own, while the device computes.

What cannot be written (a full disk) is given up with a line in the log: that session goes on without a journal.
What cannot be restored is set aside for its operator, so that it is in nobody's way.
Source: spec/session_protocol.md 2.8, 7.4.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from worldvln_edge.runtime.sessions.journal_records import (
    JournalDamageError,
    Opening,
    Record,
    RecordedSession,
    encode_record,
    read_records,
)

_log = logging.getLogger(__name__)
_SUFFIX = ".journal"
_ASIDE = ".aside"
_MOST_ASIDE = 8

Key = tuple[str, str]
"""(peer, session name), as in `session_table`."""


class JournalError(RuntimeError):
    """The journal's folder cannot be used. The message says why, and what to do."""


class SessionJournal:
    """All journals of a server.

    Args:
        folder: made if it is not there; readable by its owner only.
        max_bytes: of all files together. Beyond it, files that were set aside go, oldest first; then the journals that
            were not written for the longest time; a session that is too large alone is left out.
        ttl_s: a session that nobody asked for since it was written that long ago is forgotten.
        clock: seconds, monotonic.

    Raises:
        JournalError: the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = 2 * 2**30,
        ttl_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._max_bytes, self._clock = folder, max_bytes, clock
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._files: dict[Path, Any] = {}
        self._sizes: dict[Path, int] = {}  # the one written last stands last
        self._aside: dict[Path, int] = {}  # sizes, oldest first
        self._kept_until_s: dict[Path, float] = {}  # of journals that an earlier process has left
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._find(ttl_s)
            probe = folder / f".{os.getpid()}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise JournalError(
                f"the journal's folder {folder} cannot be used ({error.strerror}); name another one (--journal)"
            ) from error

    def _find(self, ttl_s: float) -> None:
        """What is there."""
        found = [(path, path.stat()) for path in self._folder.iterdir() if path.suffix in (_SUFFIX, _ASIDE)]
        for path, stat in sorted(found, key=lambda each: each[1].st_mtime):
            if path.suffix == _ASIDE:
                self._aside[path] = stat.st_size
                continue
            self._sizes[path] = stat.st_size
            # The clock that stamped the file may have been set since, so no age counts as less than none.
            self._kept_until_s[path] = self._clock() + ttl_s - max(0.0, time.time() - stat.st_mtime)
        self._forget_old()

    def open(self, opening: Opening) -> Future[None]:
        """Begin a session's journal, in the place of an older one."""
        path = self._path((opening.peer, opening.name))
        return self._writer.submit(self._guarded, path, self._begin, opening)

    def add(self, key: Key, record: Record) -> Future[None]:
        """Append; nothing happens where the session has no journal. The future ends when it is written."""
        return self._writer.submit(self._guarded, self._path(key), self._append, record)

    def forget(self, key: Key) -> Future[None]:
        """The session has ended."""
        return self._writer.submit(self._remove, self._path(key))

    def forget_old(self) -> Future[None]:
        """Forget sessions of an earlier process that nobody asked for within their time."""
        return self._writer.submit(self._forget_old)

    def read(self, key: Key) -> Future[RecordedSession | None]:
        """The session as it was left; None where there is no journal of it.

        The future raises JournalDamageError where there is one that cannot be read.
        """
        return self._writer.submit(self._read, key)

    def go_on(self, key: Key, recorded: RecordedSession) -> Future[None]:
        """Write behind what was read from now on."""
        return self._writer.submit(self._go_on, self._path(key), recorded.whole_bytes)

    def set_aside(self, key: Key) -> Future[Path | None]:
        """Rename a journal that cannot be restored; a few of them are kept.

        Returns:
            Where it is now; None: there is none, or it cannot be renamed.
        """
        return self._writer.submit(self._set_aside, self._path(key))

    def close(self) -> None:
        """Write what waits, and keep the files."""
        self._writer.shutdown(wait=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, key: Key) -> Path:
        name = hashlib.sha256(f"{len(key[0])}:{key[0]}{key[1]}".encode()).hexdigest()
        return self._folder / f"{name}{_SUFFIX}"

    def _guarded(self, path: Path, work: Callable[[Path, Any], None], record: Record) -> None:
        try:
            work(path, record)
        except OSError as error:
            _log.error("a session goes on without a journal: %s (%s)", path, error.strerror)
            self._remove(path)

    def _begin(self, path: Path, opening: Opening) -> None:
        self._remove(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._files[path], self._sizes[path] = os.fdopen(descriptor, "wb", buffering=0), 0
        self._append(path, opening)

    def _append(self, path: Path, record: Record) -> None:
        file = self._files.get(path)
        if file is None:
            return
        data = encode_record(record)
        whole = memoryview(data)
        while whole:
            whole = whole[file.write(whole) :]
        self._sizes[path] = self._sizes.pop(path) + len(data)
        self._make_room(path)

    def _make_room(self, spared: Path) -> None:
        """Remove what is needed least until the rest is within `max_bytes`; the file that grows goes last."""
        for path in [*self._aside, *(path for path in self._sizes if path != spared), spared]:
            if sum(self._aside.values()) + sum(self._sizes.values()) <= self._max_bytes:
                return
            if path not in self._aside:
                text = "the journal holds more than %d bytes; a session goes on without: %s"
                _log.warning(text, self._max_bytes, path)
            self._remove(path)

    def _remove(self, path: Path) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            file.close()
        self._sizes.pop(path, None)
        self._aside.pop(path, None)
        self._kept_until_s.pop(path, None)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.error("a journal that nobody needs cannot be removed: %s (%s)", path, error.strerror)

    def _forget_old(self) -> None:
        now_s = self._clock()
        for path in [path for path, until_s in self._kept_until_s.items() if now_s > until_s]:
            self._remove(path)

    def _read(self, key: Key) -> RecordedSession | None:
        self._forget_old()
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JournalDamageError(f"it cannot be read ({error.strerror})") from error
        return read_records(data, key)

    def _go_on(self, path: Path, whole_bytes: int) -> None:
        self._kept_until_s.pop(path, None)
        try:
            os.truncate(path, whole_bytes)
            self._files[path] = path.open("ab", buffering=0)
            self._sizes[path] = whole_bytes
        except OSError as error:
            _log.error("a session goes on without a journal: %s (%s)", path, error.strerror)
            self._remove(path)  # it would tell of a session that has gone on since

    def _set_aside(self, path: Path) -> Path | None:
        file = self._files.pop(path, None)
        if file is not None:
            file.close()
        self._kept_until_s.pop(path, None)
        size = self._sizes.pop(path, 0)
        aside = path.with_suffix(f".{time.time_ns()}{_ASIDE}")
        try:
            path.rename(aside)
        except OSError as error:
            _log.error("a journal cannot be renamed: %s (%s)", path, error.strerror)
            return None
        self._aside[aside] = size
        for oldest in list(self._aside)[:-_MOST_ASIDE]:
            self._remove(oldest)
        return aside


class SessionLog:
    """One session's way into the journal."""

    def __init__(self, journal: SessionJournal, key: Key):
        self._journal, self._key = journal, key
        self._last: Future[None] | None = None

    def open(self, opening: Opening) -> None:
        """Begin; see `SessionJournal.open`."""
        self._last = self._journal.open(opening)

    def go_on(self, recorded: RecordedSession) -> None:
        """Go on behind what was read; see `SessionJournal.go_on`."""
        self._last = self._journal.go_on(self._key, recorded)

    def add(self, *records: Record) -> None:
        """Append, in this order."""
        for record in records:
            self._last = self._journal.add(self._key, record)

    async def written(self) -> None:
        """Wait until everything so far stands in the file."""
        if self._last is not None:
            await asyncio.wrap_future(self._last)
