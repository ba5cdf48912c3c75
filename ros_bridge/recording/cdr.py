"""Messages as the bytes that ROS 2 has on the wire (CDR), by the way on which they came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NoCdrError(ValueError):
    """A way whose messages are no ROS 2 messages. The message says what to use."""


def cdr_encoder(via: str) -> Callable[[Any], bytes]:
    """What makes bytes, with their encapsulation header, of a message. Raises NoCdrError: with ros1 there are none."""
    if via == "dds":
        return _from_dds
    if via == "ros2":
        from rclpy.serialization import serialize_message

        return serialize_message
    raise NoCdrError(f"--via {via} has no rosbag2 recording; use `rosbag record`")


def _from_dds(message: Any) -> bytes:
    return message.serialize(use_version_2=False)
