"""A drone on ROS 2's topics, for the desk: flies every setpoint exactly, publishes odometry and a small camera image.

It speaks DDS directly, so that what is measured passed the wire. Its camera shows one colour.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from cyclonedds.core import InstanceState, Policy, Qos, ReadCondition, SampleState, ViewState, WaitSet
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic

from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.conversions import quaternion_of_yaw
from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports.dds_wire import cyclone_xml
from worldvln_edge.ros_bridge.ports.messages import ns_of_time
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

_QOS = Qos(Policy.Reliability.Reliable(100_000_000), Policy.History.KeepLast(50))
_ODOMETRY_S, _CAMERA_S = 0.02, 0.04
_SIDE = 16
_REPEAT_S = 3.0


class DeskTimeoutError(TimeoutError):
    """Something that should have happened on the topics did not. The message says what, with the last diagnostics."""


@dataclass(frozen=True)
class ArrivedSetpoint:
    """`at_s`: monotonic time of arrival. `stamp_ns`: when it was published."""

    at_s: float
    stamp_ns: int
    velocity_m_s: tuple[float, float, float]
    yaw_rate_rad_s: float

    @property
    def speed(self) -> float:
        return math.hypot(*self.velocity_m_s)


class DeskDrone:
    """Odometry at 50 Hz and images at 25 Hz, from `with` on.

    Attributes:
        setpoints: all that arrived.
        checks: newest diagnostics, name -> (level, message).
        has_camera: whether images are published.
    """

    def __init__(self, config: DdsConfig, topics: TopicsConfig):
        xml = cyclone_xml(config.network_interface)
        self._domain = None if xml is None else Domain(config.domain_id, xml)
        self._participant = DomainParticipant(config.domain_id)
        self._cameras = [self._writer(topics.image, dds.Image)]
        self._odometry = self._writer(topics.odometry, dds.Odometry)
        self._instruction = self._writer(topics.instruction, dds.String)
        self._command = self._writer(topics.command, dds.String)
        self._setpoint_reader = self._reader(topics.setpoint, dds.TwistStamped)
        self._diagnostics_reader = self._reader(topics.diagnostics, dds.DiagnosticArray)
        self._image_topic = topics.image
        self.position, self.yaw = np.array([0.0, 0.0, 3.0]), 0.0
        self.setpoints: list[ArrivedSetpoint] = []
        self.checks: dict[str, tuple[int, str]] = {}
        self.has_camera = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._fly, name="desk drone", daemon=True)

    def __enter__(self) -> DeskDrone:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def instruction_readers(self) -> frozenset[int]:
        """Who listens for instructions, by handle. A process that was killed is among them until its lease ends."""
        return frozenset(self._instruction.get_matched_subscriptions())

    def wait_for_another_reader(self, known: frozenset[int], timeout_s: float = 20.0) -> None:
        """Until somebody listens for instructions who was not among these. Raises DeskTimeoutError."""
        self.wait(lambda: self.instruction_readers() - known, "another reader of instructions", timeout_s)

    def instruct(self, text: str) -> None:
        """Publish an instruction, once somebody listens. Raises DeskTimeoutError."""
        self._say(self._instruction, text)

    def add_camera(self) -> None:
        """Another publisher on the same topic, as when a driver was started twice."""
        self._cameras = [*self._cameras, self._writer(self._image_topic, dds.Image)]

    def command(self, word: str) -> None:
        """Publish a command, once somebody listens. Raises DeskTimeoutError."""
        self._say(self._command, word)

    def wait(self, is_so: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
        """Raises DeskTimeoutError: `is_so()` did not become true in time."""
        give_up_s = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > give_up_s:
                raise DeskTimeoutError(f"waited {timeout_s:g} s for {what}; diagnostics: {self.checks}")
            time.sleep(0.005)

    def wait_for_flight(self, timeout_s: float = 20.0) -> None:
        """Until setpoints move the drone. Raises DeskTimeoutError."""
        asked_s = time.monotonic()
        self.wait(
            lambda: self.setpoints and self.setpoints[-1].at_s >= asked_s and self.setpoints[-1].speed > 0.4,
            "setpoints that move",
            timeout_s,
        )

    def fly(self, text: str, timeout_s: float = 20.0, repeat_s: float = _REPEAT_S) -> None:
        """Publish an instruction until it is flown: the reader that is known may be that of a policy which has died.

        Args:
            repeat_s: longer than planning takes, which begins anew with every instruction.

        Raises DeskTimeoutError.
        """
        give_up_s = time.monotonic() + timeout_s
        while True:
            self.instruct(text)
            try:
                return self.wait_for_flight(repeat_s)
            except DeskTimeoutError:
                if time.monotonic() > give_up_s:
                    raise

    def hold_after(self, moment_s: float) -> float:
        """Seconds from a moment to the first setpoint of zero that arrived after it. Raises DeskTimeoutError: none."""
        for setpoint in list(self.setpoints):
            if setpoint.at_s >= moment_s and setpoint.speed == 0:
                return setpoint.at_s - moment_s
        raise DeskTimeoutError(f"no hold came; diagnostics: {self.checks}")

    def _say(self, writer: DataWriter, text: str) -> None:
        self.wait(writer.get_matched_subscriptions, "a reader of the topic")
        writer.write(dds.String(text))

    def _writer(self, name: str, kind: type) -> DataWriter:
        return DataWriter(self._participant, Topic(self._participant, dds.topic_name(name), kind), qos=_QOS)

    def _reader(self, name: str, kind: type) -> DataReader:
        return DataReader(self._participant, Topic(self._participant, dds.topic_name(name), kind), qos=_QOS)

    def _fly(self) -> None:
        waiting = WaitSet(self._participant)
        any_state = SampleState.Any | ViewState.Any | InstanceState.Any
        arrival = ReadCondition(self._setpoint_reader, any_state)
        waiting.attach(arrival)
        moved_s = odometry_due_s = camera_due_s = time.monotonic()
        velocity, yaw_rate = np.zeros(3), 0.0
        while not self._stopping.is_set():
            waiting.wait(max(1, round((min(odometry_due_s, camera_due_s) - time.monotonic()) * 1e9)))
            now_s = time.monotonic()
            self.position = self.position + velocity * (now_s - moved_s)
            self.yaw, moved_s = self.yaw + yaw_rate * (now_s - moved_s), now_s
            for sample in _taken(self._setpoint_reader):
                linear, yaw_rate = sample.twist.linear, sample.twist.angular.z
                velocity = np.array([linear.x, linear.y, linear.z])
                stamp_ns = ns_of_time(sample.header.stamp)
                self.setpoints.append(ArrivedSetpoint(now_s, stamp_ns, (linear.x, linear.y, linear.z), yaw_rate))
            if now_s >= odometry_due_s:
                odometry_due_s = max(odometry_due_s + _ODOMETRY_S, now_s)
                self._publish_odometry()
                for sample in _taken(self._diagnostics_reader):
                    self.checks.update({status.name: (status.level, status.message) for status in sample.status})
            if now_s >= camera_due_s:
                camera_due_s = max(camera_due_s + _CAMERA_S, now_s)
                if self.has_camera:
                    self._publish_image()

    def _header(self, frame: str) -> dds.Header:
        sec, nanosec = divmod(time.time_ns(), 1_000_000_000)
        return dds.Header(stamp=dds.Time(sec=sec, nanosec=nanosec), frame_id=frame)

    def _publish_odometry(self) -> None:
        position = dds.Point(*(float(value) for value in self.position))
        orientation = dds.Quaternion(*(float(value) for value in quaternion_of_yaw(self.yaw)))
        still = dds.Twist(dds.Vector3(0.0, 0.0, 0.0), dds.Vector3(0.0, 0.0, 0.0))
        unknown = [0.0] * 36
        self._odometry.write(
            dds.Odometry(
                header=self._header("odom"),
                child_frame_id="base_link",
                pose=dds.PoseWithCovariance(dds.Pose(position, orientation), unknown),
                twist=dds.TwistWithCovariance(still, unknown),
            )
        )

    def _publish_image(self) -> None:
        pixels = bytes([127]) * (_SIDE * _SIDE * 3)
        for camera in self._cameras:
            camera.write(dds.Image(self._header("camera"), _SIDE, _SIDE, "rgb8", 0, 3 * _SIDE, pixels))


def _taken(reader: DataReader) -> list[Any]:
    """What has arrived; without the marks that a writer leaves which has gone, as that of a killed policy."""
    return [sample for sample in reader.take(50) if sample.sample_info.valid_data]
