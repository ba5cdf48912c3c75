"""DDS without a ROS installation: whom a wire hears, what a failing callback does, and what a wire leaves behind."""

import gc
import os
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("cyclonedds", reason="needs the extra dds")

from cyclonedds.core import Policy, Qos
from cyclonedds.domain import DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.topic import Topic

from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports.dds_wire import DdsError, DdsWire
from worldvln_edge.ros_bridge.ports.wire import DeafWireError

CONFIG = DdsConfig(domain_id=1 + os.getpid() % 200, network_interface="lo")


@pytest.fixture
def wire() -> Iterator[DdsWire]:
    wire = DdsWire(CONFIG)
    yield wire
    wire.close()


def wait_until(is_so) -> None:
    give_up_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_words_that_must_arrive_are_read_from_reliable_writers_only(wire):
    participant = DomainParticipant(CONFIG.domain_id)

    def writer(topic: str, reliability: Policy) -> DataWriter:
        return DataWriter(participant, Topic(participant, dds.topic_name(topic), dds.String), qos=Qos(reliability))

    sure = [writer(topic, Policy.Reliability.Reliable(0)) for topic in ("/words", "/pictures")]
    hasty = [writer(topic, Policy.Reliability.BestEffort) for topic in ("/words", "/pictures")]
    came: list[str] = []
    wire.subscribe("/words", dds.String, lambda message, source: came.append(message.data), must_arrive=True)
    wire.subscribe("/pictures", dds.String, lambda message, source: None)
    wait_until(lambda: all(each.get_matched_subscriptions() for each in (*sure, hasty[1])))
    assert not hasty[0].get_matched_subscriptions()
    sure[0].write(dds.String("stop"))
    wait_until(lambda: came == ["stop"])


def test_a_callback_that_fails_comes_out_of_the_next_publish(wire, caplog):
    wire.subscribe("/words", dds.String, lambda message, source: [].pop())
    with pytest.raises(DeafWireError, match="no more are received: start this process again"):
        wait_until(lambda: wire.publish("/words", dds.String("go")))
    assert "pop from empty list" in caplog.text


def test_closed_wire_gives_its_domain_back_though_it_is_still_known():
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            wire = DdsWire(CONFIG)
            wire.subscribe("/words", dds.String, lambda message, source, wire=wire: wire.close())
            wire.publish("/other", dds.String("a"))
            with pytest.raises(DdsError, match="cannot be joined over lo"):
                DdsWire(CONFIG)
            wire.close()
            wire.close()
    finally:
        gc.enable()
