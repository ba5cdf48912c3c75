"""Recordings, read in order: whole ones, ones that a power cut has ended, and all parts of one.

Files are read as a stream, without their index, because a cut file has none. Whatever the bytes are, reading ends with
the messages of the whole chunks in front, and with one sentence about what is wrong behind them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.message import DecodeError
from mcap.exceptions import InvalidMagic, RecordLengthLimitExceeded
from mcap.records import Channel
from mcap.records import Footer as FooterRecord
from mcap.records import Message as MessageRecord
from mcap.stream_reader import StreamReader

from worldvln_edge.runtime.recording.foxglove_messages import PICTURE_TOPICS, read_picture
from worldvln_edge.runtime.recording.recording_messages import NOTE_TOPICS, RECORDING_VERSION, Message, Opening

_PART = re.compile(r"(?P<stem>.+)\.(?P<part>\d{3,})\.mcap")
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    topic: msgspec.json.Decoder(kind) for topic, kind in NOTE_TOPICS.items()
}


class RecordingReadError(ValueError):
    """There is no recording that can be read. The message says what is there instead, and what to do."""


@dataclass(frozen=True)
class Timed:
    """A message with its time."""

    time_ns: int
    """Since 1970, by the clock of the computer that flew."""
    message: Message


class _DamageError(Exception):
    """Nothing can be read from here on."""


class _CutError(_DamageError):
    """There is nothing from here on."""


class Recording:
    """One session, of however many files; may be read several times.

    Args:
        path: any of its parts; those in the same folder belong to it.

    Raises:
        RecordingReadError: no such file, not one of ours, or cut before its first chunk was on the disk; or its first
            part is missing.
    """

    def __init__(self, path: Path):
        self.parts = _find_parts(path)
        self.problems: list[str] = []
        """What is wrong with the files, once they were read: cut, damaged, or a part is missing."""
        self.is_there_more = False
        """More was written than could be read: a part is damaged or missing, or is cut in front of another one."""
        first = next(self._part(self.parts[0], 0), None)
        if first is None:
            raise RecordingReadError(f"{self.problems[0]}; nothing can be read")
        assert isinstance(first.message, Opening)  # or it would have been damage
        self.opening = first.message

    def __iter__(self) -> Iterator[Timed]:
        """All messages; the openings of later parts are left out."""
        self.problems, self.is_there_more = [], False
        for number, path in enumerate(self.parts):
            for timed in self._part(path, number):
                if not (number and isinstance(timed.message, Opening)):
                    yield timed
            if self.problems:
                left = len(self.parts) - number - 1
                if left:
                    self.is_there_more = True
                    self.problems[-1] += f"; {left} parts behind it are not read"
                return

    def _part(self, path: Path, number: int) -> Iterator[Timed]:
        """Messages of a file; what ends them early becomes a problem."""
        try:
            is_first = True
            for timed in _messages(path):
                if is_first:
                    self._check_opening(timed.message, number)
                is_first = False
                yield timed
            if is_first:
                raise _DamageError("holds no message")
        except _DamageError as error:
            self.problems.append(f"{path.name}: {error}")
            self.is_there_more = not isinstance(error, _CutError)

    def _check_opening(self, message: Message, number: int) -> None:
        if not isinstance(message, Opening):
            raise _DamageError("does not begin with /session")
        if message.version != RECORDING_VERSION:
            raise _DamageError(f"has version {message.version}, this program reads {RECORDING_VERSION}")
        if message.part != number:
            raise _DamageError(f"is part {message.part}, and part {number} is missing; put all parts into one folder")
        if number and message.uid != self.opening.uid:
            raise _DamageError("is of another session")


def _find_parts(path: Path) -> tuple[Path, ...]:
    if not path.is_file():
        what = "a folder: name one of the files in it" if path.is_dir() else "not there"
        raise RecordingReadError(f"{path} is {what}")
    name = _PART.fullmatch(path.name)
    if name is None:
        return (path,)
    siblings = (_PART.fullmatch(each.name) for each in path.parent.iterdir())
    ours = [each for each in siblings if each and each["stem"] == name["stem"]]
    found = {int(each["part"]): path.with_name(each.string) for each in ours}
    if 0 not in found:
        raise RecordingReadError(f"{path}: part 0 of this recording is missing; put all parts into one folder")
    return tuple(found[part] for part in sorted(found))


def _messages(path: Path) -> Iterator[Timed]:
    topics: dict[int, str] = {}
    for record in _records(path):
        if isinstance(record, Channel):
            topics[record.id] = record.topic
        elif isinstance(record, MessageRecord):
            topic = topics.get(record.channel_id)
            if topic is None:
                raise _DamageError("is damaged: a message has no topic")
            message = _decoded(topic, record)
            if message is not None:
                yield Timed(record.log_time, message)


def _decoded(topic: str, record: MessageRecord) -> Message | None:
    """The message; None for those that only viewers need."""
    try:
        if topic in PICTURE_TOPICS:
            return read_picture(topic, record.data, record.sequence)
        if topic in _DECODERS:
            return _DECODERS[topic].decode(record.data)
    except (msgspec.MsgspecError, DecodeError, ValueError) as error:
        raise _DamageError(f"is damaged: a message of {topic} cannot be read ({error})") from error
    return None


def _records(path: Path) -> Iterator[object]:
    """Records in order, those in chunks included. Raises _DamageError behind the last one that is whole."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise _DamageError(f"cannot be read ({error.strerror})") from error
    with file:
        size = path.stat().st_size
        records = iter(StreamReader(file, validate_crcs=True, record_size_limit=size).records)
        while True:
            try:
                record = next(records, None)
            except InvalidMagic as error:
                raise _DamageError("is no MCAP file") from error
            except Exception as error:  # the boundary to foreign code: damaged bytes make it raise anything
                # A length that was read may point behind the end; what was cut shorter than that lies at the end.
                if file.tell() >= size or isinstance(error, RecordLengthLimitExceeded):
                    raise _CutError(
                        f"was cut at {size} bytes (the power or the program went away while it was written, or it is "
                        "still being written); what follows its last whole chunk is not there"
                    ) from error
                raise _DamageError(f"is damaged ({type(error).__name__}: {error})") from error
            if record is None or isinstance(record, FooterRecord):  # behind the footer there is nothing to lose
                return
            yield record
