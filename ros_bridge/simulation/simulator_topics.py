"""The topics as a simulator uses them: the other ends of what `ports.message_port` reads and writes."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from worldvln_edge.ros_bridge.conversions import pose_to_ros, yaw_to_ros
from worldvln_edge.ros_bridge.diagnostics import Level
from worldvln_edge.ros_bridge.flight import FLIGHT, is_flying
from worldvln_edge.ros_bridge.ports.messages import MessageBuilder, ns_of_time
from worldvln_edge.ros_bridge.ports.topics import CLOCK, TopicsConfig
from worldvln_edge.ros_bridge.ports.wire import Wire
from worldvln_edge.ros_bridge.simulation.simulated_drone import STILL, SimulatedDrone

CAMERA_FRAME = "camera_optical_frame"


class SimulatorTopics:
    """Thread-safe where the wire calls back.

    Attributes:
        velocity_4: newest setpoint; zero where there is none.
        answered_ns: newest stamp of a setpoint or of `step_done`.
        flights_begun: how often the policy has said that it flies, after something else.
    """

    def __init__(self, wire: Wire, topics: TopicsConfig):
        self._wire, self._topics, self._types = wire, topics, wire.types
        self._now_ns = 0
        self._build = MessageBuilder(self._types, topics, lambda: self._now_ns)
        self.velocity_4, self.answered_ns, self.flights_begun = STILL, 0, 0
        self._answered = threading.Condition()
        self._checks: dict[str, tuple[int, Level, str]] = {}
        types = self._types
        wire.subscribe(topics.setpoint, types.TwistStamped, self._take_setpoint)
        wire.subscribe(topics.diagnostics, types.DiagnosticArray, self._take_diagnostics)
        if topics.lockstep:
            wire.subscribe(topics.step_done, types.Clock, self._take_step_done)

    def show(self, drone: SimulatedDrone, now_ns: int) -> None:
        """Publish the clock (with `use_sim_time`), odometry and image of this moment."""
        self._now_ns = now_ns
        if self._topics.use_sim_time:
            self._wire.publish(CLOCK, self._build.clock(now_ns))
        self._wire.publish(self._topics.odometry, self._odometry(drone))
        self._publish_image(self._image(drone.view.frame_HW3))

    def instruct(self, text: str) -> None:
        self._wire.publish(self._topics.instruction, self._types.String(data=text))

    def command(self, word: str) -> None:
        self._wire.publish(self._topics.command, self._types.String(data=word))

    def has_listeners(self) -> bool:
        """Whether somebody reads instructions and commands."""
        string = self._types.String
        return all(self._wire.readers(topic, string) > 0 for topic in (self._topics.instruction, self._topics.command))

    def wait_for_answer(self, stamp_ns: int, timeout_s: float) -> bool:
        """Until a setpoint or `step_done` carries this stamp or a later one; False if none does in time."""
        with self._answered:
            return self._answered.wait_for(lambda: self.answered_ns >= stamp_ns, timeout_s)

    def check_since(self, name: str, stamp_ns: int) -> tuple[Level, str] | None:
        """Level and message of a diagnostic (`setpoint/faults`) if it is not older than this stamp."""
        since_ns, level, message = self._checks.get(name, (-1, Level.STALE, ""))
        return (level, message) if since_ns >= stamp_ns else None

    def _take_setpoint(self, message: Any, source: str) -> None:
        linear = message.twist.linear
        velocity_4 = np.array([linear.x, linear.y, linear.z, message.twist.angular.z], np.float64)
        if not np.isfinite(velocity_4).all():
            velocity_4 = STILL
        with self._answered:
            self.velocity_4, self.answered_ns = velocity_4, ns_of_time(message.header.stamp)
            self._answered.notify_all()

    def _take_step_done(self, message: Any, source: str) -> None:
        with self._answered:
            self.velocity_4, self.answered_ns = STILL, ns_of_time(message.clock)
            self._answered.notify_all()

    def _take_diagnostics(self, message: Any, source: str) -> None:
        stamp_ns = ns_of_time(message.header.stamp)
        for status in message.status:
            if not status.name.startswith("worldvln/"):
                continue  # others speak on this topic, too
            level = Level(status.level[0] if isinstance(status.level, bytes) else status.level)
            name = status.name.removeprefix("worldvln/")
            before = self._checks.get(name, (0, Level.STALE, ""))[2]
            self._checks[name] = (stamp_ns, level, status.message)
            if name == FLIGHT and is_flying(status.message) and status.message != before:
                self.flights_begun += 1

    def _odometry(self, drone: SimulatedDrone) -> Any:
        types = self._types
        position, orientation = pose_to_ros(drone.view.pose)
        yaw = float(yaw_to_ros(drone.view.pose[4]))
        x, y, z, turning = (float(value) for value in drone.velocity_4)
        ahead, left = x * math.cos(yaw) + y * math.sin(yaw), y * math.cos(yaw) - x * math.sin(yaw)
        unknown = [0.0] * 36
        pose = types.Pose(position=self._xyz(types.Point, position), orientation=self._quaternion(orientation))
        twist = types.Twist(
            linear=self._xyz(types.Vector3, [ahead, left, z]), angular=self._xyz(types.Vector3, [0.0, 0.0, turning])
        )
        return types.Odometry(
            header=self._build.header(),
            child_frame_id=self._topics.body_frame,
            pose=types.PoseWithCovariance(pose=pose, covariance=unknown),
            twist=types.TwistWithCovariance(twist=twist, covariance=unknown),
        )

    def _publish_image(self, image: Any) -> None:
        self._wire.publish(self._topics.image, image)

    def _image(self, frame_HW3: np.ndarray) -> Any:
        height, width, _ = frame_HW3.shape
        header = self._build.header()
        header.frame_id = CAMERA_FRAME
        return self._types.Image(
            header=header,
            height=height,
            width=width,
            encoding="rgb8",
            is_bigendian=0,
            step=3 * width,
            data=frame_HW3.tobytes(),
        )

    def _xyz(self, kind: Any, values: Any) -> Any:
        x, y, z = (float(value) for value in values)
        return kind(x=x, y=y, z=z)

    def _quaternion(self, orientation_xyzw: np.ndarray) -> Any:
        x, y, z, w = (float(value) for value in orientation_xyzw)
        return self._types.Quaternion(x=x, y=y, z=z, w=w)
