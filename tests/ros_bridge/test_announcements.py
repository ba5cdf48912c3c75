"""Topics are announced before the first message, which no reader would get otherwise."""

from typing import Any

import numpy as np
import pytest
from memory_wire import MemoryTopics, MemoryWire

from worldvln_edge.ros_bridge.ports.message_port import MessagePort
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig


class NotingWire(MemoryWire):
    """Notes what is announced: `Wire.readers` does it."""

    def __init__(self, topics: MemoryTopics):
        super().__init__(topics)
        self.announced: dict[str, str] = {}

    def readers(self, topic: str, kind: Any) -> int:
        self.announced[topic] = kind.__name__
        return super().readers(topic, kind)


@pytest.mark.parametrize("kind", ["velocity", "pose", "px4"])
def test_what_flies_the_drone_is_announced_with_the_type_in_which_it_is_published(kind):
    topics = MemoryTopics()
    wire = NotingWire(topics)
    port = MessagePort(wire, TopicsConfig(setpoint_kind=kind))
    port.announce_setpoints()
    assert topics.published == {}
    poses_N4 = np.array([[0.0, 0.0, 3.0, 0.0], [0.5, 0.0, 3.0, 0.0]])
    if kind == "pose":
        port.publish_setpoint_pose(poses_N4[1])
    else:
        port.publish_setpoint((0.5, 0.0, 0.0), 0.0)
    port.publish_path(poses_N4)
    port.publish_chunk(poses_N4, 16.0)
    assert wire.announced == {topic: type(messages[0]).__name__ for topic, messages in topics.published.items()}
