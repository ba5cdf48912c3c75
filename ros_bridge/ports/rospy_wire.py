"""ROS 1's topics through rospy, as Debian ships it: `apt-get install python3-rospy` and the message packages.

The master is the one that ROS's own `ROS_MASTER_URI` names. A process is one node; several wires in it share that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

try:
    import rosgraph
    import rospy

    from worldvln_edge.ros_bridge.ports import rospy_types
except ImportError as missing:
    raise ImportError(
        f"ROS 1 is not to be found ({missing}); install python3-rospy and the packages of docs/ros.md, and let this "
        "Python see the distribution's packages"
    ) from missing

_log = logging.getLogger(__name__)
_QUEUE = 5
"""Messages that wait for a slow reader; the oldest fall out, so that publishing never blocks."""
_RECEIVE_BYTES = 1 << 22
"""More than an image: rospy reads a socket in pieces of this size, and drops old messages only within a piece."""


class RospyError(RuntimeError):
    """ROS 1 cannot be used as configured. The message says what to do."""


def check_topics(topics: TopicsConfig) -> None:
    """Raises RospyError: PX4's own messages are asked for, which ROS 1 does not have."""
    if "px4" in (topics.setpoint_kind, topics.odometry_kind):
        raise RospyError(
            "topics.setpoint_kind and topics.odometry_kind px4 are ROS 2's; with ROS 1 fly PX4 through MAVROS: "
            'setpoint_kind = "velocity" and odometry_kind = "odometry"'
        )


class RospyWire:
    """See `wire.Wire`.

    Args:
        name: of the node; a number is appended, so that several may run.

    Raises:
        RospyError: no master answers.
    """

    types = rospy_types

    def __init__(self, name: str = "worldvln"):
        _join(name)
        self._publishers: dict[str, Any] = {}
        self._subscribers: list[Any] = []
        self._one_at_a_time = threading.Lock()  # rospy has a thread for every publisher

    def publish(self, topic: str, message: Any) -> None:
        try:
            self._publisher(topic, type(message)).publish(message)
        except rospy.ROSException as failure:  # the node is shutting down, or a field does not fit its type
            _log.warning("%s was not written: %s", topic, failure)

    def subscribe(
        self, topic: str, kind: Any, receive: Callable[[Any, str], None], *, must_arrive: bool = False
    ) -> None:
        """Over TCP, which loses nothing, whatever `must_arrive` says."""

        def take(message: Any) -> None:
            with self._one_at_a_time:
                receive(message, message._connection_header["callerid"])

        self._subscribers = [
            *self._subscribers,
            rospy.Subscriber(topic, kind, take, queue_size=_QUEUE, buff_size=_RECEIVE_BYTES, tcp_nodelay=True),
        ]

    def readers(self, topic: str, kind: Any) -> int:
        return self._publisher(topic, kind).get_num_connections()

    def close(self) -> None:
        for end in (*self._subscribers, *self._publishers.values()):
            end.unregister()
        self._subscribers, self._publishers = [], {}

    def _publisher(self, topic: str, kind: Any) -> Any:
        publisher = self._publishers.get(topic)
        if publisher is None:
            publisher = self._publishers[topic] = rospy.Publisher(topic, kind, queue_size=_QUEUE, tcp_nodelay=True)
        return publisher


def _join(name: str) -> None:
    """Become a node, once in a process."""
    if rospy.core.is_initialized():
        return
    uri = rosgraph.get_master_uri()
    if not rosgraph.is_master_online():  # rospy itself would ask for ever
        raise RospyError(f"no ROS master answers at {uri}; start roscore, or set ROS_MASTER_URI")
    logging.getLogger("rospy").setLevel(logging.WARNING)  # it tells of every connection
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # Signals and time stay ours; nothing of ours is said on /rosout.
    rospy.init_node(name, argv=[name], anonymous=True, disable_signals=True, disable_rosout=True, disable_rostime=True)
    root.handlers[:] = handlers  # rospy replaces them by its own, and writes files
    root.setLevel(level)
    logging.getLogger("rospy").setLevel(logging.WARNING)
