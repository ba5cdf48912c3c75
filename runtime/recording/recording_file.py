"""One MCAP file that is being written: topics with their schemas, in chunks that are whole on the disk or not there.

Chunks are not compressed: camera pictures are compressed already, and the computer flies. A chunk ends when it is
large or old enough; then it is on the disk, whatever happens to the power.
Source: mcap.dev/spec.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path

import msgspec
from mcap.writer import CompressionType, Writer
from mcap_protobuf.schema import register_schema

from worldvln_edge import __version__
from worldvln_edge.runtime.recording.foxglove_messages import (
    PICTURE_TOPICS,
    VIEWER_TOPICS,
    picture_message,
    prediction_messages,
)
from worldvln_edge.runtime.recording.recording_messages import (
    NOTE_TOPICS,
    PREDICTION_TOPIC,
    Note,
    Picture,
    Prediction,
    json_schema,
)

_CHUNK_BYTES = 2**20
_TOPIC_OF = {kind: topic for topic, kind in NOTE_TOPICS.items()}


class RecordingFile:
    """Only one thread uses it.

    Args:
        path: new; readable by its owner only.

    Raises:
        OSError: it cannot be made. Every other method raises it, too, when it cannot write.
    """

    def __init__(self, path: Path):
        self.path = path
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._writer = Writer(self._file, chunk_size=_CHUNK_BYTES, compression=CompressionType.NONE)
        self._writer.start(profile="", library=f"worldvln-edge {__version__}")
        self._channels: dict[str, int] = {}
        self._since_flush_bytes = 0
        self.size_bytes = 0
        """Of the messages so far; the file is a little larger."""

    @property
    def is_flushed(self) -> bool:
        return self._since_flush_bytes == 0

    def add_note(self, note: Note, time_ns: int) -> None:
        """A message of our own."""
        self.add(_TOPIC_OF[type(note)], msgspec.json.encode(note), time_ns)

    def add_picture(self, picture: Picture, time_ns: int) -> None:
        """A picture; its index is the message's sequence number."""
        topic, data = picture_message(picture, time_ns)
        self.add(topic, data, time_ns, picture.index)

    def add_prediction(self, prediction: Prediction, time_ns: int) -> None:
        """Predicted frames; they stand at the times at which they should come true."""
        for index, at_ns, data in prediction_messages(prediction, time_ns):
            self.add(PREDICTION_TOPIC, data, at_ns, index)

    def add(self, topic: str, data: bytes, time_ns: int, sequence: int = 0) -> None:
        """An encoded message of a known topic.

        Args:
            topic: of `NOTE_TOPICS`, `PICTURE_TOPICS` or `VIEWER_TOPICS`.
            data: JSON or protobuf.
            time_ns: since 1970.
            sequence: of the message.
        """
        channel = self._channels.get(topic)
        if channel is None:
            channel = self._channels[topic] = self._new_channel(topic)
        self._writer.add_message(channel, time_ns, data, time_ns, sequence)
        self.size_bytes += len(data)
        self._since_flush_bytes += len(data)
        if self._since_flush_bytes >= _CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """End the chunk, and wait until it is on the disk."""
        self._writer.flush()
        os.fsync(self._file.fileno())
        self._since_flush_bytes = 0

    def finish(self) -> None:
        """Write the index that lets viewers jump, and close."""
        try:
            self._writer.finish()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close as it is; what is on the disk can be read. Raises nothing, twice does no harm."""
        with contextlib.suppress(OSError):  # its buffer cannot be written either; it is closed all the same
            self._file.close()

    def _new_channel(self, topic: str) -> int:
        protobuf = PICTURE_TOPICS.get(topic) or VIEWER_TOPICS.get(topic)
        if protobuf is not None:
            return self._writer.register_channel(topic, "protobuf", register_schema(self._writer, protobuf))
        kind = NOTE_TOPICS[topic]
        schema_id = self._writer.register_schema(f"worldvln.{kind.__name__}", "jsonschema", _schema(kind))
        return self._writer.register_channel(topic, "json", schema_id)


@cache
def _schema(kind: type[msgspec.Struct]) -> bytes:
    """Every session has a file, and making schemas takes as long as a segment's messages."""
    return msgspec.json.encode(json_schema(kind))
