"""ROS 2's topics over bare DDS: for computers that have no ROS, and readable by every ROS 2 node in the same domain.

Writers are reliable, which satisfies every reader; readers are best effort, which accepts every writer, unless messages
must arrive. One thread waits for samples and calls back.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from xml.sax.saxutils import quoteattr

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
from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports.px4_types import OffboardControlMode, TrajectorySetpoint, VehicleOdometry
from worldvln_edge.ros_bridge.ports.wire import DeafWireError

_log = logging.getLogger(__name__)
_DEPTH = 5
_BLOCKED_NS = 5_000_000
"""Longest wait for a slow reliable reader; the setpoint loop must not stand still."""
_WAIT_NS = 100_000_000
_READ = Qos(Policy.Reliability.BestEffort, Policy.Durability.Volatile, Policy.History.KeepLast(_DEPTH))
_READ_ALL = Qos(Policy.Reliability.Reliable(0), Policy.Durability.Volatile, Policy.History.KeepLast(_DEPTH))
_WRITE = Qos(Policy.Reliability.Reliable(_BLOCKED_NS), Policy.Durability.Volatile, Policy.History.KeepLast(_DEPTH))
_TYPES = SimpleNamespace(
    **vars(dds),
    TrajectorySetpoint=TrajectorySetpoint,
    OffboardControlMode=OffboardControlMode,
    VehicleOdometry=VehicleOdometry,
    level=int,
)


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


class DdsWire:
    """See `wire.Wire`.

    Raises:
        DdsError: no such network interface, or the domain cannot be joined.
    """

    types = _TYPES

    def __init__(self, config: DdsConfig):
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
        self._callbacks: list[tuple[DataReader, ReadCondition, Callable[[Any, str], None]]] = []
        self._stopping = GuardCondition(self._participant)
        self._waiting = WaitSet(self._participant)
        self._waiting.attach(self._stopping)
        self._thread: threading.Thread | None = None
        self._is_open = True
        self._is_deaf = False

    def publish(self, topic: str, message: Any) -> None:
        if self._is_deaf:
            raise DeafWireError
        try:
            self._writer(topic, type(message)).write(message)
        except DDSException as failure:  # a reader that does not keep up; the next message is the better one
            _log.warning("%s was not written: %s", topic, failure)

    def subscribe(
        self, topic: str, kind: Any, receive: Callable[[Any, str], None], *, must_arrive: bool = False
    ) -> None:
        dds_topic: Topic[Any] = Topic(self._participant, dds.topic_name(topic), kind)
        reader = DataReader(self._participant, dds_topic, qos=_READ_ALL if must_arrive else _READ)
        condition = ReadCondition(reader, SampleState.Any | ViewState.Any | InstanceState.Any)
        self._callbacks = [*self._callbacks, (reader, condition, receive)]
        self._waiting.attach(condition)
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="dds", daemon=True)
            self._thread.start()

    def readers(self, topic: str, kind: Any) -> int:
        return len(self._writer(topic, kind).get_matched_subscriptions())

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if self._thread is not None:
            self._stopping.set(True)
            self._thread.join()
            self._thread = None
        # Children before parents. Who reads a topic often knows this wire; until the garbage collector came, the domain
        # would stay, and this process could not join it again with settings.
        del self._waiting
        self._callbacks, self._writers = [], {}
        del self._stopping, self._participant, self._domain

    def _writer(self, topic: str, kind: Any) -> DataWriter:
        writer = self._writers.get(topic)
        if writer is None:
            dds_topic: Topic[Any] = Topic(self._participant, dds.topic_name(topic), kind)
            writer = self._writers[topic] = DataWriter(self._participant, dds_topic, qos=_WRITE)
        return writer

    def _listen(self) -> None:
        try:
            self._receive()
        except Exception:  # of a callback: `publish` says so to who cannot see this thread
            _log.exception("handling a message failed")
            self._is_deaf = True

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
                        receive(sample, f"dds:{sample.sample_info.publication_handle:x}")
