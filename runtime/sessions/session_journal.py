"""The write-ahead journal: what a session was told and answered, kept on disk until it ends.

A server that was killed and started again finds its sessions here. One file a session, under a name that no client
chooses: records of length, checksum and msgpack, appended in the order in which things happened. A record that was cut
off, and what follows it, is left out. Frames are kept as sessions work with them, so a restored session computes the
same. Records are written before a request is answered, by a thread of their own, while the device computes.

What cannot be written (a full disk) is given up with a line in the log: that session goes on without a journal.
Source: spec/session_protocol.md 2.8, 7.4.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from typing import Any, Literal

import msgspec
import numpy as np

from worldvln_edge.runtime.sessions.policy import ActionChunk, Emit

_log = logging.getLogger(__name__)
_SUFFIX = ".journal"
_FRAME = Struct("<II")  # bytes of the record, CRC-32 of them
_VERSION = 1

Key = tuple[str, str]
"""(peer, session name), as in `session_table`."""


class JournalError(RuntimeError):
    """The journal's folder cannot be used. The message says why, and what to do."""


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag="opening"):
    """How a session began."""

    version: int = _VERSION
    peer: str
    name: str
    prompt: str
    seed: int
    negative_prompt: str
    emit: Emit
    horizons: int | None
    policy: str
    """What computed; another policy cannot go on."""


class Frames(msgspec.Struct, frozen=True, kw_only=True, tag="frames"):
    """Frames of one size that follow the stored ones."""

    shape: tuple[int, int, int, int]  # N H W 3
    pixels: bytes
    t_ns: list[int] | None


class Settings(msgspec.Struct, frozen=True, kw_only=True, tag="settings"):
    """What holds from the next segment on."""

    prompt: str
    seed: int
    negative_prompt: str


class Segment(msgspec.Struct, frozen=True, kw_only=True, tag="segment"):
    """What was answered."""

    segment: int
    actions: bytes  # float32 [N, 6]
    observed_frames: int
    seed: int
    head: Literal["latent", "rgb"]
    profile: str
    profile_reason: str
    hold: str | None


Record = Opening | Frames | Settings | Segment
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


@dataclass(kw_only=True)
class RecordedSession:
    """A session as its journal tells it."""

    opening: Opening
    settings: Settings
    frames: list[np.ndarray] = field(default_factory=list)  # uint8 [H, W, 3] each
    capture_ns: dict[int, int] = field(default_factory=dict)
    chunks: dict[int, ActionChunk] = field(default_factory=dict)

    @property
    def emitted(self) -> int:
        return max(self.chunks, default=-1)

    def add(self, record: Record) -> None:
        """Take over what happened next."""
        if isinstance(record, Frames):
            if record.t_ns is not None:
                self.capture_ns.update(enumerate(record.t_ns, start=len(self.frames) + 1))
            self.frames.extend(np.frombuffer(record.pixels, np.uint8).reshape(record.shape))
        elif isinstance(record, Settings):
            self.settings = record
        elif isinstance(record, Segment):
            fields = {name: getattr(record, name) for name in record.__struct_fields__ if name != "actions"}
            actions = np.frombuffer(record.actions, np.float32).reshape(-1, 6)
            self.chunks[record.segment] = ActionChunk(actions=actions, **fields)


class SessionJournal:
    """All journals of a server.

    Args:
        folder: made if it is not there; readable by its owner only.
        max_bytes: of all files together; beyond it, the file that was not written for the longest time goes.
        ttl_s: files that were not written for so long when the server starts are removed.

    Raises:
        JournalError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 2 * 2**30, ttl_s: float = 600.0):
        self._folder, self._max_bytes = folder, max_bytes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._files: dict[Path, Any] = {}
        self._sizes: dict[Path, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime):
                if time.time() - path.stat().st_mtime > ttl_s:
                    path.unlink()
                else:
                    self._sizes[path] = path.stat().st_size
            probe = folder / f".{os.getpid()}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise JournalError(
                f"the journal's folder {folder} cannot be used ({error.strerror}); name another one (--journal)"
            ) from error

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

    def read(self, key: Key) -> Future[RecordedSession | None]:
        """The session as it was left, and ready to go on; None where there is no journal of it."""
        return self._writer.submit(self._read, key)

    def close(self) -> None:
        """Write what waits, and keep the files."""
        self._writer.shutdown(wait=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, key: Key) -> Path:
        name = hashlib.sha256(f"{len(key[0])}:{key[0]}{key[1]}".encode()).hexdigest()
        return self._folder / f"{name}{_SUFFIX}"

    def _guarded(self, path: Path, work: Any, record: Record) -> None:
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
        data = msgspec.msgpack.encode(record)
        whole = memoryview(_FRAME.pack(len(data), zlib.crc32(data)) + data)
        while whole:
            whole = whole[file.write(whole) :]
        self._sizes[path] = self._sizes.pop(path) + _FRAME.size + len(data)  # the one written last stands last
        self._make_room(path)

    def _make_room(self, spared: Path) -> None:
        for path in [path for path in self._sizes if path != spared]:
            if sum(self._sizes.values()) <= self._max_bytes:
                return
            _log.warning("the journal holds more than %d bytes; the oldest session goes: %s", self._max_bytes, path)
            self._remove(path)

    def _remove(self, path: Path) -> None:
        file = self._files.pop(path, None)
        if file is not None:
            file.close()
        self._sizes.pop(path, None)
        path.unlink(missing_ok=True)

    def _read(self, key: Key) -> RecordedSession | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        found: RecordedSession | None = None
        good = 0
        for record, end in _records(data):
            if found is None:
                if not isinstance(record, Opening) or record.version != _VERSION or (record.peer, record.name) != key:
                    return None
                settings = Settings(prompt=record.prompt, seed=record.seed, negative_prompt=record.negative_prompt)
                found = RecordedSession(opening=record, settings=settings)
            else:
                found.add(record)
            good = end
        if found is not None:
            self._go_on(path, good)
        return found

    def _go_on(self, path: Path, good_bytes: int) -> None:
        """Write behind the last whole record from now on."""
        if path in self._files:
            return
        try:
            os.truncate(path, good_bytes)
            self._files[path] = path.open("ab", buffering=0)
            self._sizes[path] = good_bytes
        except OSError as error:
            _log.error("a session goes on without a journal: %s (%s)", path, error.strerror)


class SessionLog:
    """One session's way into the journal."""

    def __init__(self, journal: SessionJournal, key: Key):
        self._journal, self._key = journal, key
        self._last: Future[None] | None = None

    def open(self, opening: Opening) -> None:
        """Begin; see `SessionJournal.open`."""
        self._last = self._journal.open(opening)

    def add(self, *records: Record) -> None:
        """Append, in this order."""
        for record in records:
            self._last = self._journal.add(self._key, record)

    async def written(self) -> None:
        """Wait until everything so far stands in the file."""
        if self._last is not None:
            await asyncio.wrap_future(self._last)


def _records(data: bytes) -> Iterator[tuple[Record, int]]:
    """Whole records, each with the place behind it."""
    start = 0
    while start + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, start)
        start += _FRAME.size
        payload = data[start : start + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return
        start += length
        try:
            yield _decoder.decode(payload), start
        except msgspec.MsgspecError:
            return


def frames_record(frames: list[np.ndarray], t_ns: list[int] | None) -> list[Frames]:
    """Records of uint8 [H, W, 3] frames; neighbours of one size share one."""
    records: list[Frames] = []
    first = 0
    for end in range(1, len(frames) + 1):
        if end == len(frames) or frames[end].shape != frames[first].shape:
            group = np.stack(frames[first:end])
            stamps = None if t_ns is None else t_ns[first:end]
            n, h, w, channels = group.shape
            records.append(Frames(shape=(n, h, w, channels), pixels=group.tobytes(), t_ns=stamps))
            first = end
    return records


def segment_record(chunk: ActionChunk) -> Segment:
    """A chunk as it was answered."""
    return Segment(
        segment=chunk.segment,
        actions=np.ascontiguousarray(chunk.actions, np.float32).tobytes(),
        observed_frames=chunk.observed_frames,
        seed=chunk.seed,
        head=chunk.head,
        profile=chunk.profile,
        profile_reason=chunk.profile_reason,
        hold=chunk.hold,
    )
