"""Writes a rosbag2 folder: one MCAP file with messages in CDR, and metadata.yaml, which is written when it is closed.

A chunk ends after a second, and is handed to the system then: a cut leaves all but the last second, and `mcap recover`
and `ros2 bag reindex` make a bag of it again. Not thread-safe.
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

    Raises:
        RosbagError: the folder is there already, or cannot be made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._name = f"{folder.name}_0.mcap"
        try:
            folder.mkdir(parents=True, mode=0o700)  # whoever can read it sees what the camera saw
            self._file = (folder / self._name).open("wb")
        except FileExistsError as failure:
            raise RosbagError(f"{folder} exists already; give a new folder") from failure
        except OSError as failure:
            raise RosbagError(f"{folder} cannot be made ({failure.strerror}); give a folder of your own") from failure
        self._mcap = Writer(self._file, chunk_size=_CHUNK_BYTES, compression=CompressionType.NONE)
        self._mcap.start(profile="ros2", library=f"worldvln-edge {__version__}")
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        self._types: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._first_ns, self._last_ns, self._flushed_ns = 0, 0, 0

    @property
    def messages(self) -> int:
        """How many were written."""
        return sum(self._counts.values())

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
            channel = self._channel(topic, message_type)
            self._mcap.add_message(channel, log_time=at_ns, data=cdr, publish_time=at_ns, sequence=self._counts[topic])
            if at_ns - self._flushed_ns >= _FLUSH_NS:
                self._mcap.flush()
                self._flushed_ns = at_ns
        except OSError as failure:
            raise RosbagError(f"{self.folder} cannot be written ({failure.strerror}); free some space") from failure
        self._counts[topic] += 1
        self._first_ns = at_ns if self.messages == 1 else min(self._first_ns, at_ns)
        self._last_ns = max(self._last_ns, at_ns)

    def close(self) -> None:
        """Write the index and the metadata. Raises RosbagError."""
        try:
            self._mcap.finish()
            self._file.close()
            (self.folder / "metadata.yaml").write_text(self._metadata())
        except OSError as failure:
            self._file.close()
            raise RosbagError(
                f"{self.folder} was not closed ({failure.strerror}); free some space, then run mcap recover"
            ) from failure

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
            self._types[topic], self._counts[topic] = message_type, 0
        return self._channels[topic]

    def _metadata(self) -> str:
        """Names of topics and types hold letters, digits, _ and / only, so they need no quoting."""
        duration_ns = self._last_ns - self._first_ns
        lines = [
            "rosbag2_bagfile_information:",
            "  version: 5",
            "  storage_identifier: mcap",
            f"  duration:\n    nanoseconds: {duration_ns}",
            f"  starting_time:\n    nanoseconds_since_epoch: {self._first_ns}",
            f"  message_count: {self.messages}",
            "  topics_with_message_count:" + ("" if self._types else " []"),
        ]
        for topic, message_type in self._types.items():
            lines += [
                "    - topic_metadata:",
                f"        name: {topic}",
                f"        type: {message_type}",
                "        serialization_format: cdr",
                '        offered_qos_profiles: ""',
                f"      message_count: {self._counts[topic]}",
            ]
        lines += [
            '  compression_format: ""',
            '  compression_mode: ""',
            "  relative_file_paths:",
            f"    - {self._name}",
            "  files:",
            f"    - path: {self._name}",
            f"      starting_time:\n        nanoseconds_since_epoch: {self._first_ns}",
            f"      duration:\n        nanoseconds: {duration_ns}",
            f"      message_count: {self.messages}",
        ]
        return "\n".join(lines) + "\n"
