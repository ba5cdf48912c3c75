"""ROS 2's topics over bare DDS: for computers that have no ROS, and readable by every ROS 2 node in the same domain.

Writers are reliable, which satisfies every reader; readers are best effort, which accepts every writer. One thread
waits for samples and calls back.
"""

from __future__ import annotations

import logging
import math
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from cyclonedds.core import (
    DDSException,
    GuardCondition,
    InstanceState,
    Policy,
    Qos,
    ReadCondition,
    SampleState,
    ViewState,
    WaitSet,
)
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic

from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.conversions import quaternion_of_yaw, yaw_of_quaternion
from worldvln_edge.ros_bridge.diagnostics import Diagnostic
from worldvln_edge.ros_bridge.image_decoding import CompressedImage, RawImage
from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports.port import ImageSample, OdometrySample
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

_log = logging.getLogger(__name__)
_DEPTH = 5
_BLOCKED_NS = 5_000_000
"""Longest wait for a slow reliable reader; the setpoint loop must not stand still."""
_WAIT_NS = 100_000_000
_READ = Qos(Policy.Reliability.BestEffort, Policy.Durability.Volatile, Policy.History.KeepLast(_DEPTH))
_WRITE = Qos(Policy.Reliability.Reliable(_BLOCKED_NS), Policy.Durability.Volatile, Policy.History.KeepLast(_DEPTH))


class DdsError(RuntimeError):
    """DDS cannot be opened. The message says with which settings."""


def cyclone_xml(network_interface: str | None) -> str | None:
    """Configuration of Cyclone DDS for an interface; None: its own defaults."""
    if network_interface is None:
        return None
    interface = f"<NetworkInterface name={quoteattr(network_interface)}"
    if network_interface != "lo":
        return f"<CycloneDDS><Domain><General><Interfaces>{interface}/></Interfaces></General></Domain></CycloneDDS>"
    return (
        f'<CycloneDDS><Domain><General><Interfaces>{interface} multicast="false"/></Interfaces></General>'
        "<Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>31</MaxAutoParticipantIndex>"
        '<Peers><Peer Address="localhost"/></Peers></Discovery></Domain></CycloneDDS>'
    )


class DdsPort:
    """See `port.Port`.

    Raises:
        DdsError: no such network interface, or the domain cannot be joined.
    """

    def __init__(self, config: DdsConfig, topics: TopicsConfig):
        self._topics = topics
        xml = cyclone_xml(config.network_interface)
        try:
            # A domain lives as long as its object: kept, though never used again.
            self._domain = None if xml is None else Domain(config.domain_id, xml)
            self._participant = DomainParticipant(config.domain_id)
        except DDSException as failure:
            where = "the default network interface" if config.network_interface is None else config.network_interface
            raise DdsError(
                f"DDS domain {config.domain_id} cannot be joined over {where} ({failure}); check dds.network_interface "
                "and dds.domain_id"
            ) from failure
        self._writers: dict[str, DataWriter] = {}
        self._callbacks: list[tuple[DataReader, ReadCondition, Callable[[Any], None]]] = []
        self._stopping = GuardCondition(self._participant)
        self._waiting = WaitSet(self._participant)
        self._waiting.attach(self._stopping)
        self._clock_ns: int | None = None
        self._thread: threading.Thread | None = None
        if topics.use_sim_time:
            self._subscribe("/clock", dds.Clock, self._take_clock)

    def now_ns(self) -> int:
        """Wall clock; with `topics.use_sim_time` the last /clock, 0 before it came."""
        if not self._topics.use_sim_time:
            return time.time_ns()
        return self._clock_ns or 0

    def subscribe_image(self, receive: Callable[[ImageSample], None]) -> None:
        if self._topics.image_is_compressed:
            self._subscribe(self._topics.image, dds.CompressedImage, lambda sample: receive(_compressed_sample(sample)))
        else:
            self._subscribe(self._topics.image, dds.Image, lambda sample: receive(_image_sample(sample)))

    def subscribe_odometry(self, receive: Callable[[OdometrySample], None]) -> None:
        self._subscribe(self._topics.odometry, dds.Odometry, lambda sample: receive(_odometry_sample(sample)))

    def subscribe_instruction(self, receive: Callable[[str], None]) -> None:
        self._subscribe(self._topics.instruction, dds.String, lambda sample: receive(sample.data))

    def subscribe_command(self, receive: Callable[[str], None]) -> None:
        self._subscribe(self._topics.command, dds.String, lambda sample: receive(sample.data))

    def publish_setpoint(self, velocity_m_s: Sequence[float], yaw_rate_rad_s: float) -> None:
        x, y, z = (float(value) for value in velocity_m_s)
        twist = dds.Twist(linear=dds.Vector3(x, y, z), angular=dds.Vector3(0.0, 0.0, float(yaw_rate_rad_s)))
        self._publish(self._topics.setpoint, dds.TwistStamped(header=self._header(), twist=twist))

    def publish_path(self, poses_N4: np.ndarray) -> None:
        header = self._header()
        poses = [
            dds.PoseStamped(
                header=header,
                pose=dds.Pose(
                    position=dds.Point(float(x), float(y), float(z)),
                    orientation=dds.Quaternion(*(float(value) for value in quaternion_of_yaw(yaw))),
                ),
            )
            for x, y, z, yaw in poses_N4
        ]
        self._publish(self._topics.path, dds.Path(header=header, poses=poses))

    def publish_diagnostics(self, checks: Sequence[Diagnostic]) -> None:
        status = [
            dds.DiagnosticStatus(
                level=int(check.level),
                name=f"worldvln/{check.name}",
                message=check.message,
                hardware_id="",
                values=[dds.KeyValue(key="what to do", value=check.what_to_do)] if check.what_to_do else [],
            )
            for check in checks
        ]
        self._publish(self._topics.diagnostics, dds.DiagnosticArray(header=self._header(), status=status))

    def close(self) -> None:
        if self._thread is not None:
            self._stopping.set(True)
            self._thread.join()
            self._thread = None

    def _header(self) -> dds.Header:
        return dds.Header(stamp=dds.time_of_ns(self.now_ns()), frame_id=self._topics.odometry_frame)

    def _publish(self, name: str, sample: Any) -> None:
        writer = self._writers.get(name)
        if writer is None:
            topic = Topic(self._participant, dds.topic_name(name), type(sample))
            writer = self._writers[name] = DataWriter(self._participant, topic, qos=_WRITE)
        try:
            writer.write(sample)
        except DDSException as failure:  # a reader that does not keep up; the next sample is the better one
            _log.warning("%s was not written: %s", name, failure)

    def _subscribe(self, name: str, kind: type, receive: Callable[[Any], None]) -> None:
        topic: Topic[Any] = Topic(self._participant, dds.topic_name(name), kind)
        reader = DataReader(self._participant, topic, qos=_READ)
        condition = ReadCondition(reader, SampleState.Any | ViewState.Any | InstanceState.Any)
        self._callbacks = [*self._callbacks, (reader, condition, receive)]
        self._waiting.attach(condition)
        if self._thread is None:
            self._thread = threading.Thread(target=self._receive, name="dds", daemon=True)
            self._thread.start()

    def _receive(self) -> None:
        while not self._stopping.read():
            self._waiting.wait(_WAIT_NS)
            for reader, _, receive in self._callbacks:
                try:
                    samples = reader.take(_DEPTH)
                except (ValueError, IndexError, struct.error) as refusal:  # whatever a foreign peer wrote
                    _log.warning("a sample that cannot be read was dropped: %s", refusal)
                    continue
                for sample in samples:
                    if sample.sample_info.valid_data:
                        receive(sample)

    def _take_clock(self, sample: dds.Clock) -> None:
        self._clock_ns = dds.ns_of_time(sample.clock)


def _source(sample: Any) -> str:
    return f"dds:{sample.sample_info.publication_handle:x}"


def _image_sample(sample: dds.Image) -> ImageSample:
    image = RawImage(
        height=sample.height,
        width=sample.width,
        encoding=sample.encoding,
        is_bigendian=bool(sample.is_bigendian),
        step=sample.step,
        data=sample.data,
    )
    return ImageSample(image=image, stamp_ns=dds.ns_of_time(sample.header.stamp), source=_source(sample))


def _compressed_sample(sample: dds.CompressedImage) -> ImageSample:
    image = CompressedImage(format=sample.format, data=sample.data)
    return ImageSample(image=image, stamp_ns=dds.ns_of_time(sample.header.stamp), source=_source(sample))


def _odometry_sample(sample: dds.Odometry) -> OdometrySample:
    pose = sample.pose.pose
    turn = pose.orientation
    try:
        yaw = yaw_of_quaternion(np.array([turn.x, turn.y, turn.z, turn.w]))
    except ValueError:
        yaw = math.nan
    position = np.array([pose.position.x, pose.position.y, pose.position.z])
    return OdometrySample(position_3=position, yaw_rad=yaw, stamp_ns=dds.ns_of_time(sample.header.stamp))
