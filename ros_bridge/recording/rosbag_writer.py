"""Writes a rosbag2 folder: MCAP files with messages in CDR, and metadata.yaml, which is written when it is closed.

A chunk ends after a second, and is handed to the system then: a cut leaves all but the last second, and `mcap recover`
and `ros2 bag reindex` make a bag of it again. Files that were full before are whole. Not thread-safe.
Source: mcap.dev/spec (profile ros2); rosbag2_storage, metadata version 5.
"""

from __future__ import annotations

from pathlib import Path

from mcap.writer import CompressionType, Writer

from worldvln_edge import __version__
from worldvln_edge.ros_bridge.recording.message_definitions import message_definition

_CHUNK_BYTES = 1 << 20
_FLUSH_NS = 1_000_000_000


class RosbagError(OSError):
    """The bag cannot be written. The message says where and what to do."""


class RosbagWriter:
    """
    Args:
        folder: is made; must not exist yet.
        max_file_bytes: a file that has reached it is closed, and another one begun; 0: there is one file.

    Raises:
        RosbagError: the folder is there already, or cannot be made.
    """

    def __init__(self, folder: Path, *, max_file_bytes: int = 0):
        self.folder, self._max_file_bytes = folder, max_file_bytes
        try:
            folder.mkdir(parents=True, mode=0o700)  # whoever can read it sees what the camera saw
            self._files = [_BagFile(folder / f"{folder.name}_0.mcap")]
        except FileExistsError as failure:
            raise RosbagError(f"{folder} exists already; give a new folder") from failure
        except OSError as failure:
            raise RosbagError(f"{folder} cannot be made ({failure.strerror}); give a folder of your own") from failure

    @property
    def messages(self) -> int:
        """How many were written."""
        return sum(file.messages for file in self._files)

    def write(self, topic: str, message_type: str, cdr: bytes, at_ns: int) -> None:
        """
        Args:
            topic: ROS name (`/camera/image_raw`).
            message_type: one of `message_definitions.MESSAGES`.
            cdr: the message with its encapsulation header.
            at_ns: when it was received.

        Raises:
            RosbagError: the disk is full, or has gone.
        """
        try:
            if 0 < self._max_file_bytes <= self._files[-1].bytes:
                self._files[-1].close()
                self._files.append(_BagFile(self.folder / f"{self.folder.name}_{len(self._files)}.mcap"))
            self._files[-1].write(topic, message_type, cdr, at_ns)
        except OSError as failure:
            raise RosbagError(f"{self.folder} cannot be written ({failure.strerror}); free some space") from failure

    def close(self) -> None:
        """Write the index and the metadata. Raises RosbagError."""
        try:
            self._files[-1].close()
            (self.folder / "metadata.yaml").write_text(_metadata(self._files))
        except OSError as failure:
            self._files[-1].give_up()
            raise RosbagError(
                f"{self.folder} was not closed ({failure.strerror}); free some space, then run mcap recover"
            ) from failure


class _BagFile:
    """One file of a bag. Raises OSError where the disk does."""

    def __init__(self, path: Path):
        self.name = path.name
        self.types: dict[str, str] = {}
        """Of messages, by topic."""
        self.counts: dict[str, int] = {}
        """Of messages, by topic."""
        self.bytes = 0
        """Of all messages."""
        self.first_ns = self.last_ns = self._flushed_ns = 0
        self._stream = path.open("xb")
        self._mcap = Writer(self._stream, chunk_size=_CHUNK_BYTES, compression=CompressionType.NONE)
        self._mcap.start(profile="ros2", library=f"worldvln-edge {__version__}")
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}

    @property
    def messages(self) -> int:
        return sum(self.counts.values())

    def write(self, topic: str, message_type: str, cdr: bytes, at_ns: int) -> None:
        channel = self._channel(topic, message_type)
        self._mcap.add_message(channel, log_time=at_ns, data=cdr, publish_time=at_ns, sequence=self.counts[topic])
        if at_ns - self._flushed_ns >= _FLUSH_NS:
            self._mcap.flush()
            self._flushed_ns = at_ns
        self.counts[topic] += 1
        self.bytes += len(cdr)
        self.first_ns = at_ns if self.messages == 1 else min(self.first_ns, at_ns)
        self.last_ns = max(self.last_ns, at_ns)

    def close(self) -> None:
        """Write the index."""
        if not self._stream.closed:
            self._mcap.finish()
            self._stream.close()

    def give_up(self) -> None:
        """Leave it without an index."""
        self._stream.close()

    def _channel(self, topic: str, message_type: str) -> int:
        if topic not in self._channels:
            if message_type not in self._schemas:
                self._schemas[message_type] = self._mcap.register_schema(
                    name=message_type, encoding="ros2msg", data=message_definition(message_type).encode()
                )
            self._channels[topic] = self._mcap.register_channel(
                topic=topic,
                message_encoding="cdr",
                schema_id=self._schemas[message_type],
                metadata={"offered_qos_profiles": ""},
            )
            self.types[topic], self.counts[topic] = message_type, 0
        return self._channels[topic]


def _metadata(files: list[_BagFile]) -> str:
    """Names of topics and types hold letters, digits, _ and / only, so they need no quoting."""
    types = {topic: kind for file in files for topic, kind in file.types.items()}
    used = [file for file in files if file.messages]
    first_ns = min((file.first_ns for file in used), default=0)
    last_ns = max((file.last_ns for file in used), default=0)
    lines = [
        "rosbag2_bagfile_information:",
        "  version: 5",
        "  storage_identifier: mcap",
        f"  duration:\n    nanoseconds: {last_ns - first_ns}",
        f"  starting_time:\n    nanoseconds_since_epoch: {first_ns}",
        f"  message_count: {sum(file.messages for file in files)}",
        "  topics_with_message_count:" + ("" if types else " []"),
    ]
    for topic, message_type in types.items():
        lines += [
            "    - topic_metadata:",
            f"        name: {topic}",
            f"        type: {message_type}",
            "        serialization_format: cdr",
            '        offered_qos_profiles: ""',
            f"      message_count: {sum(file.counts.get(topic, 0) for file in files)}",
        ]
    lines += [
        '  compression_format: ""',
        '  compression_mode: ""',
        "  relative_file_paths:",
        *(f"    - {file.name}" for file in files),
        "  files:",
    ]
    for file in files:
        lines += [
            f"    - path: {file.name}",
            f"      starting_time:\n        nanoseconds_since_epoch: {file.first_ns}",
            f"      duration:\n        nanoseconds: {file.last_ns - file.first_ns}",
            f"      message_count: {file.messages}",
        ]
    return "\n".join(lines) + "\n"
