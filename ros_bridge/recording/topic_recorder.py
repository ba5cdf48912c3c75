"""Records the bridge's topics as they are on the wire, from a process of its own: it cannot delay what flies.

The wire's thread fills a bounded queue, the thread that calls `run` writes. When the disk does not keep up, messages
are dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from worldvln_edge.ros_bridge.ports.messages import TF
from worldvln_edge.ros_bridge.ports.topics import CLOCK, TopicsConfig
from worldvln_edge.ros_bridge.ports.wire import Wire
from worldvln_edge.ros_bridge.recording.rosbag_writer import RosbagWriter

_log = logging.getLogger(__name__)
_WAITING = 256
_LOOK_S = 0.2
_SAY_S = 10.0


def recorded_topics(topics: TopicsConfig) -> dict[str, str]:
    """Topic -> message type, of everything that comes in and goes out."""
    recorded = {
        topics.image: "sensor_msgs/msg/CompressedImage" if topics.image_is_compressed else "sensor_msgs/msg/Image",
        topics.odometry: {"odometry": "nav_msgs/msg/Odometry", "px4": "px4_msgs/msg/VehicleOdometry"}[
            topics.odometry_kind
        ],
        topics.instruction: "std_msgs/msg/String",
        topics.command: "std_msgs/msg/String",
        topics.setpoint: {
            "velocity": "geometry_msgs/msg/TwistStamped",
            "pose": "geometry_msgs/msg/PoseStamped",
            "px4": "px4_msgs/msg/TrajectorySetpoint",
        }[topics.setpoint_kind],
        topics.path: "nav_msgs/msg/Path",
        topics.chunk: "trajectory_msgs/msg/MultiDOFJointTrajectory",
        topics.diagnostics: "diagnostic_msgs/msg/DiagnosticArray",
        TF: "tf2_msgs/msg/TFMessage",
    }
    if topics.setpoint_kind == "px4":
        recorded[topics.offboard_control_mode] = "px4_msgs/msg/OffboardControlMode"
    if topics.use_sim_time:
        recorded[CLOCK] = "rosgraph_msgs/msg/Clock"
    if topics.lockstep:
        recorded[topics.step_done] = "rosgraph_msgs/msg/Clock"
    return recorded


class TopicRecorder:
    """
    Args:
        wire: topics come from it.
        topics: which.
        to_cdr: what makes bytes, with their encapsulation header, of a message of the wire.
        bag: where they go; closed by `run`.
        without_images: leave the camera out.
    """

    def __init__(
        self,
        wire: Wire,
        topics: TopicsConfig,
        to_cdr: Callable[[Any], bytes],
        bag: RosbagWriter,
        *,
        without_images: bool = False,
    ):
        self._to_cdr, self._bag = to_cdr, bag
        self._queue: queue.Queue[tuple[str, str, Any, int]] = queue.Queue(_WAITING)
        self._stopping = threading.Event()
        self.dropped = 0
        """Messages that did not fit into the queue."""
        for topic, message_type in recorded_topics(topics).items():
            if not (without_images and topic == topics.image):
                kind = getattr(wire.types, message_type.rpartition("/")[2])
                wire.subscribe(topic, kind, self._receiver(topic, message_type))

    def stop(self) -> None:
        """Return from `run` soon, with everything written that has come."""
        self._stopping.set()

    def run(self) -> None:
        """Write until `stop`. Raises RosbagError: the disk is full; what was written before stays."""
        said_s, said = time.monotonic(), 0
        try:
            while not (self._stopping.is_set() and self._queue.empty()):
                try:
                    topic, message_type, message, at_ns = self._queue.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                self._bag.write(topic, message_type, self._to_cdr(message), at_ns)
                if self.dropped > said and time.monotonic() - said_s > _SAY_S:
                    said_s, said = time.monotonic(), self.dropped
                    _log.warning("%d messages were dropped: the disk does not keep up", self.dropped)
        finally:
            self._bag.close()

    def _receiver(self, topic: str, message_type: str) -> Callable[[Any, str], None]:
        def receive(message: Any, source: str) -> None:
            if self._stopping.is_set():
                return
            try:
                self._queue.put_nowait((topic, message_type, message, time.time_ns()))
            except queue.Full:
                self.dropped += 1

        return receive
