"""ROS 2's topics through rclpy, where ROS 2 is installed: its own middleware, its own node, and actions.

What messages hold is `messages`'s affair; here are node, executor and subscriptions only. The node has a context of its
own, so that signals stay with the process that opened it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from worldvln_edge.ros_bridge.ports.topics import TopicsConfig
from worldvln_edge.ros_bridge.ports.wire import DeafWireError

try:
    import rclpy
    from rclpy.context import Context
    from rclpy.executors import MultiThreadedExecutor
    from rclpy.node import Node
    from rclpy.publisher import Publisher
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

    from worldvln_edge.ros_bridge.ports.rclpy_types import rclpy_types
except ImportError as missing:
    raise ImportError(
        f"ROS 2 is not to be found ({missing}); source /opt/ros/<distribution>/setup.bash, and start with the Python "
        "that it was built for; without ROS 2 fly with --via dds"
    ) from missing

_log = logging.getLogger(__name__)
_DEPTH = 5
_SPIN_S = 0.1
_LOOK_FOR_PUBLISHERS_S = 1.0
_THREADS = 4
"""One for messages; a goal keeps another until its flight is over (`rclpy_fly_action`), and a newer goal one more."""


class RclpyError(RuntimeError):
    """ROS 2 cannot be used as configured. The message says what to do."""


class RclpyWire:
    """See `wire.Wire`.

    Args:
        name: of the node.
        topics: say whether PX4's messages are needed.

    Raises:
        RclpyError: px4_msgs is needed and not there.
    """

    def __init__(self, name: str, topics: TopicsConfig):
        try:
            self.types = rclpy_types(with_px4="px4" in (topics.setpoint_kind, topics.odometry_kind))
        except ModuleNotFoundError as missing:
            raise RclpyError(
                f"topics.setpoint_kind or odometry_kind is px4, and px4_msgs is not to be found ({missing}); build "
                "px4_msgs of your PX4's version in your workspace, and source its install/setup.bash"
            ) from missing
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = Node(name, context=self._context)
        self._publishers: dict[str, Publisher] = {}
        self._sources: dict[str, int] = {}
        self._executor = MultiThreadedExecutor(_THREADS, context=self._context)
        self._executor.add_node(self.node)
        self._stopping = threading.Event()
        self._is_deaf = False
        self._thread = threading.Thread(target=self._spin, name="rclpy", daemon=True)
        self._thread.start()

    def publish(self, topic: str, message: Any) -> None:
        if self._is_deaf:
            raise DeafWireError
        self._publisher(topic, type(message)).publish(message)

    def subscribe(
        self, topic: str, kind: Any, receive: Callable[[Any, str], None], *, must_arrive: bool = False
    ) -> None:
        """Callbacks of all subscriptions share the node's own group, so they run one at a time."""
        received = self._sources[topic] = 1

        def take(message: Any) -> None:
            nonlocal received
            received += 1
            # rclpy does not say who published a message. Those that are known take turns, so that none is overlooked.
            receive(message, f"publisher {received % self._sources[topic] + 1}")

        reliability = ReliabilityPolicy.RELIABLE if must_arrive else ReliabilityPolicy.BEST_EFFORT
        self.node.create_subscription(kind, topic, take, _qos(reliability))
        self.node.create_timer(_LOOK_FOR_PUBLISHERS_S, lambda: self._look_for_publishers(topic))

    def readers(self, topic: str, kind: Any) -> int:
        return self._publisher(topic, kind).get_subscription_count()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _spin(self) -> None:
        try:
            while not self._stopping.is_set():
                self._executor.spin_once(timeout_sec=_SPIN_S)
        except Exception:  # of a callback: `publish` says so to who cannot see this thread
            _log.exception("handling a message failed")
            self._is_deaf = True

    def _publisher(self, topic: str, kind: Any) -> Publisher:
        publisher = self._publishers.get(topic)
        if publisher is None:
            publisher = self._publishers[topic] = self.node.create_publisher(
                kind, topic, _qos(ReliabilityPolicy.RELIABLE)
            )
        return publisher

    def _look_for_publishers(self, topic: str) -> None:
        self._sources[topic] = max(1, len(self.node.get_publishers_info_by_topic(topic)))


def _qos(reliability: ReliabilityPolicy) -> QoSProfile:
    """Reliable writers satisfy every reader, best-effort readers accept every writer; PX4's are best effort."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST, depth=_DEPTH, reliability=reliability, durability=DurabilityPolicy.VOLATILE
    )
