"""The drone of `ros bench`, over DDS."""

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("cyclonedds", reason="needs the extra dds")

from cyclonedds.domain import DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.topic import Topic

from worldvln_edge.ros_bridge.bench.desk_drone import DeskDrone
from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

CONFIG, TOPICS = DdsConfig(domain_id=1 + os.getpid() % 200, network_interface="lo"), TopicsConfig()


@pytest.fixture
def drone() -> Iterator[DeskDrone]:
    with DeskDrone(CONFIG, TOPICS) as drone:
        yield drone


def fly_forward(drone: DeskDrone, speed: float) -> None:
    """One setpoint of a writer that then goes, which leaves a mark in the topic."""
    participant = DomainParticipant(CONFIG.domain_id)
    writer = DataWriter(participant, Topic(participant, dds.topic_name(TOPICS.setpoint), dds.TwistStamped))
    drone.wait(writer.get_matched_subscriptions, "a reader of setpoints")
    forward = dds.Twist(dds.Vector3(speed, 0.0, 0.0), dds.Vector3(0.0, 0.0, 0.0))
    writer.write(dds.TwistStamped(dds.Header(dds.Time(sec=1, nanosec=0), ""), forward))
    drone.wait(lambda: drone.setpoints and drone.setpoints[-1].speed == speed, "the setpoint")


def test_it_flies_what_the_next_process_says_when_one_has_gone(drone):
    fly_forward(drone, 1.0)
    fly_forward(drone, 0.5)
    seen = drone.position[0]
    drone.wait(lambda: drone.position[0] > seen, "motion")
    assert [setpoint.speed for setpoint in drone.setpoints] == [1.0, 0.5]
