"""The bridge's port over any wire: which message goes to which topic, and what is made of the ones that come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worldvln_edge.ros_bridge.diagnostics import Diagnostic
from worldvln_edge.ros_bridge.ports.messages import (
    TF,
    MessageBuilder,
    compressed_image_sample,
    image_sample,
    ns_of_time,
    odometry_sample,
    px4_odometry_sample,
)
from worldvln_edge.ros_bridge.ports.port import ImageSample, OdometrySample
from worldvln_edge.ros_bridge.ports.topics import CLOCK, TopicsConfig
from worldvln_edge.ros_bridge.ports.wire import Wire


class MessagePort:
    """See `port.Port`; it owns the wire and closes it."""

    def __init__(self, wire: Wire, topics: TopicsConfig):
        self._wire, self._topics, self._types = wire, topics, wire.types
        self._build = MessageBuilder(self._types, topics, self.now_ns)
        self._clock_ns = 0
        self._clock_receivers: list[Callable[[int], None]] = []
        if topics.use_sim_time:
            wire.subscribe(CLOCK, self._types.Clock, self._take_clock)

    def now_ns(self) -> int:
        """Wall clock; with `topics.use_sim_time` the last /clock, 0 before it came."""
        return self._clock_ns if self._topics.use_sim_time else time.time_ns()

    def subscribe_clock(self, receive: Callable[[int], None]) -> None:
        self._clock_receivers = [*self._clock_receivers, receive]

    def subscribe_image(self, receive: Callable[[ImageSample], None]) -> None:
        if self._topics.image_is_compressed:
            kind, read = self._types.CompressedImage, compressed_image_sample
        else:
            kind, read = self._types.Image, image_sample
        self._wire.subscribe(self._topics.image, kind, lambda message, source: receive(read(message, source)))

    def subscribe_odometry(self, receive: Callable[[OdometrySample], None]) -> None:
        is_px4 = self._topics.odometry_kind == "px4"
        kind, read = (
            (self._types.VehicleOdometry, px4_odometry_sample) if is_px4 else (self._types.Odometry, odometry_sample)
        )
        transform = self._build.px4_body_transform if is_px4 else self._build.body_transform

        def take(message: Any, source: str) -> None:
            receive(read(message))
            tf = transform(message) if self._topics.publish_tf else None
            if tf is not None:
                self._wire.publish(TF, tf)

        self._wire.subscribe(self._topics.odometry, kind, take)

    def subscribe_instruction(self, receive: Callable[[str], None]) -> None:
        self._subscribe_words(self._topics.instruction, receive)

    def subscribe_command(self, receive: Callable[[str], None]) -> None:
        self._subscribe_words(self._topics.command, receive)

    def _subscribe_words(self, topic: str, receive: Callable[[str], None]) -> None:
        """Said once, so a loss would not be made good by the next message as with images."""
        self._wire.subscribe(topic, self._types.String, lambda text, _: receive(text.data), must_arrive=True)

    def announce_setpoints(self) -> None:
        topics, types = self._topics, self._types
        setpoint = {"velocity": "TwistStamped", "pose": "PoseStamped", "px4": "TrajectorySetpoint"}[
            topics.setpoint_kind
        ]
        self._wire.readers(topics.setpoint, getattr(types, setpoint))
        if topics.setpoint_kind == "px4":
            self._wire.readers(topics.offboard_control_mode, types.OffboardControlMode)
        self._wire.readers(topics.path, types.Path)
        self._wire.readers(topics.chunk, types.MultiDOFJointTrajectory)

    def publish_setpoint(self, velocity_m_s: Sequence[float], yaw_rate_rad_s: float) -> None:
        if self._topics.setpoint_kind == "px4":
            self._wire.publish(self._topics.offboard_control_mode, self._build.px4_control_mode())
            self._wire.publish(self._topics.setpoint, self._build.px4_setpoint(velocity_m_s, yaw_rate_rad_s))
        else:
            self._wire.publish(self._topics.setpoint, self._build.velocity(velocity_m_s, yaw_rate_rad_s))

    def publish_setpoint_pose(self, pose_4: np.ndarray) -> None:
        self._wire.publish(self._topics.setpoint, self._build.pose(pose_4))

    def publish_path(self, poses_N4: np.ndarray) -> None:
        self._wire.publish(self._topics.path, self._build.path(poses_N4))

    def publish_chunk(self, poses_N4: np.ndarray, fps: float) -> None:
        self._wire.publish(self._topics.chunk, self._build.chunk(poses_N4, fps))

    def publish_diagnostics(self, checks: Sequence[Diagnostic]) -> None:
        self._wire.publish(self._topics.diagnostics, self._build.diagnostics(checks))

    def publish_step_done(self, stamp_ns: int) -> None:
        self._wire.publish(self._topics.step_done, self._build.clock(stamp_ns))

    def close(self) -> None:
        self._wire.close()

    def _take_clock(self, message: Any, source: str) -> None:
        self._clock_ns = ns_of_time(message.clock)
        for receive in self._clock_receivers:
            receive(self._clock_ns)
