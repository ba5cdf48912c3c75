"""What a session's journal says: the records, how they stand in a file, and the session that they tell of.

A file is a row of records: three numbers (bytes of the record, its CRC-32, CRC-32 of these two), then msgpack. The
process may be killed while it writes, so the last record may be cut off; it was not acknowledged and is left out.
Anything else that is not as it was written is damage: what was acknowledged behind it cannot be told any more.
Source: spec/session_protocol.md 2.8, 7.4.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import Literal

import msgspec
import numpy as np

from worldvln_edge.runtime.sessions.policy import ActionChunk, Emit

JOURNAL_VERSION = 2
_SIZE, _CHECK = Struct("<II"), Struct("<I")
_HEAD_BYTES = _SIZE.size + _CHECK.size

FramesSent = tuple[int, int]
"""(first frame, count): what a call that said where its frames belong has sent."""


class JournalDamageError(ValueError):
    """A session cannot be told from its journal. The message says why."""


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag="opening"):
    """How a session began."""

    version: int = JOURNAL_VERSION
    peer: str
    name: str
    prompt: str
    seed: int
    negative_prompt: str
    emit: Emit
    horizons: int | None
    reply: str
    """What an answer holds where the client chose it (openpi)."""
    policy: str
    """What computed; another policy cannot go on."""


class Frames(msgspec.Struct, frozen=True, kw_only=True, tag="frames"):
    """Frames of one size that follow the stored ones."""

    shape: tuple[int, int, int, int]  # N H W 3
    pixels: bytes
    t_ns: list[int] | None
    arrived_s: float
    """When they reached the server: seconds since 1970."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, tag="settings"):
    """What holds from the next segment on."""

    prompt: str
    seed: int
    negative_prompt: str
    is_held: bool = False
    """An operator holds the drone."""
    said_prompt: str | None = None
    """As the client said it last, where `prompt` is an operator's."""


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
    answers: FramesSent | None
    """The call that it answered, if that may be repeated."""


Record = Opening | Frames | Settings | Segment
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


@dataclass(kw_only=True)
class RecordedSession:
    """A session as its journal tells it."""

    opening: Opening
    settings: Settings
    frames: list[np.ndarray] = field(default_factory=list)  # uint8 [H, W, 3] each
    arrived_s: list[float] = field(default_factory=list)
    """When each frame reached the server: seconds since 1970."""
    capture_ns: dict[int, int] = field(default_factory=dict)
    chunks: dict[int, ActionChunk] = field(default_factory=dict)
    last_call: tuple[FramesSent, int] | None = None
    """The last call that may be repeated and was answered with a segment, and that segment."""
    whole_bytes: int = 0
    """Where the last whole record ends in the file."""

    @property
    def emitted(self) -> int:
        return max(self.chunks, default=-1)

    def add(self, record: Record) -> None:
        """Take over what happened next.

        Raises:
            ValueError: the record contradicts itself.
        """
        if isinstance(record, Frames):
            frames = np.frombuffer(record.pixels, np.uint8).reshape(record.shape)
            if record.t_ns is not None:
                self.capture_ns.update(enumerate(record.t_ns, start=len(self.frames) + 1))
            self.frames.extend(frames)
            self.arrived_s.extend([record.arrived_s] * len(frames))
        elif isinstance(record, Settings):
            self.settings = record
        elif isinstance(record, Segment):
            own = ("actions", "answers")
            fields = {name: getattr(record, name) for name in record.__struct_fields__ if name not in own}
            actions = np.frombuffer(record.actions, np.float32).reshape(-1, 6)
            self.chunks[record.segment] = ActionChunk(actions=actions, **fields)
            if record.answers is not None:
                self.last_call = (record.answers, record.segment)
        else:
            raise ValueError("the session begins twice")


def encode_record(record: Record) -> bytes:
    """A record as it stands in a file."""
    data = msgspec.msgpack.encode(record)
    size = _SIZE.pack(len(data), zlib.crc32(data))
    return size + _CHECK.pack(zlib.crc32(size)) + data


def read_records(data: bytes, key: tuple[str, str]) -> RecordedSession:
    """The session that a file tells of.

    Args:
        data: of the file.
        key: (peer, name) of the session that it should be.

    Raises:
        JournalDamageError: it is not all there, or not as it was written, or tells of something else.
    """
    found: RecordedSession | None = None
    for record, end in _whole_records(data):
        if found is not None:
            try:
                found.add(record)
            except ValueError as error:
                raise JournalDamageError(f"the record that ends at byte {end} contradicts itself ({error})") from error
        elif not isinstance(record, Opening):
            raise JournalDamageError("its first record does not say how the session began")
        elif record.version != JOURNAL_VERSION:
            raise JournalDamageError(f"it has version {record.version}, this program reads {JOURNAL_VERSION}")
        elif (record.peer, record.name) != key:
            raise JournalDamageError("it tells of another session")
        else:
            settings = Settings(prompt=record.prompt, seed=record.seed, negative_prompt=record.negative_prompt)
            found = RecordedSession(opening=record, settings=settings)
        found.whole_bytes = end
    if found is None:
        raise JournalDamageError(f"it ends within its first record, after {len(data)} bytes")
    return found


def _whole_records(data: bytes) -> Iterator[tuple[Record, int]]:
    """Each with the place behind it; one that was cut off at the end is left out."""
    start = 0
    while start + _HEAD_BYTES <= len(data):
        behind_size, behind_head = start + _SIZE.size, start + _HEAD_BYTES
        length, checksum = _SIZE.unpack_from(data, start)
        if _CHECK.unpack_from(data, behind_size) != (zlib.crc32(data[start:behind_size]),):
            raise JournalDamageError(f"the head of the record at byte {start} is not as it was written")
        payload = data[behind_head : behind_head + length]
        if len(payload) < length:
            return
        if zlib.crc32(payload) != checksum:
            raise JournalDamageError(f"the record at byte {start} is not as it was written")
        start = behind_head + length
        try:
            record = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise JournalDamageError(f"the record that ends at byte {start} is of another version ({error})") from error
        yield record, start


def frames_records(frames: list[np.ndarray], t_ns: list[int] | None, *, arrived_s: float) -> list[Frames]:
    """Records of uint8 [H, W, 3] frames; neighbours of one size share one.

    Args:
        frames: that are stored, in order.
        t_ns: when each was captured.
        arrived_s: when they reached the server: seconds since 1970.
    """
    records: list[Frames] = []
    first = 0
    for end in range(1, len(frames) + 1):
        if end == len(frames) or frames[end].shape != frames[first].shape:
            group = np.stack(frames[first:end])
            stamps = None if t_ns is None else t_ns[first:end]
            n, h, w, channels = group.shape
            shape = (n, h, w, channels)
            records.append(Frames(shape=shape, pixels=group.tobytes(), t_ns=stamps, arrived_s=arrived_s))
            first = end
    return records


def segment_record(chunk: ActionChunk, answers: FramesSent | None = None) -> Segment:
    """A chunk as it was answered.

    Args:
        chunk: what was answered.
        answers: the call that it answers, if that may be repeated.
    """
    return Segment(
        segment=chunk.segment,
        actions=np.ascontiguousarray(chunk.actions, np.float32).tobytes(),
        observed_frames=chunk.observed_frames,
        seed=chunk.seed,
        head=chunk.head,
        profile=chunk.profile,
        profile_reason=chunk.profile_reason,
        hold=chunk.hold,
        answers=answers,
    )
