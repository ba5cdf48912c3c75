"""Velocities, poses and PX4's own messages over real DDS, each read by a peer that speaks DDS itself."""

import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cyclonedds", reason="needs the extra dds")

from cyclonedds.domain import Domain
from setpoint_flights import LIMITS, forward_chunk

from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.conversions import attitude_of_px4, enu_to_ned, yaw_of_quaternion
from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports import px4_types as px4
from worldvln_edge.ros_bridge.ports.dds_wire import DdsWire, cyclone_xml
from worldvln_edge.ros_bridge.ports.message_port import MessagePort
from worldvln_edge.ros_bridge.ports.messages import px4_odometry_sample
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig
from worldvln_edge.ros_bridge.setpoints.policy_link import Alive, Chunk, LinkListener, PolicyLink
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_logic import SetpointLogic
from worldvln_edge.ros_bridge.setpoints.setpoint_process import SetpointProcess

_DDS = DdsConfig(domain_id=1 + (os.getpid() + 100) % 200)
_NORTH = [1.0, 0.0, 0.0, 0.0]


class Autopilot:
    """The other end of the wire: keeps what it reads, with the time of arrival."""

    def __init__(self, topics: dict[str, type]):
        self.wire = DdsWire(_DDS)
        self.read: dict[str, list[tuple[float, Any]]] = defaultdict(list)
        for topic, kind in topics.items():
            self.wire.subscribe(topic, kind, self._keeper(topic))

    def _keeper(self, topic: str):
        return lambda message, source: self.read[topic].append((time.monotonic(), message))

    def wait(self, *topics: str, count: int = 1) -> None:
        give_up_s = time.monotonic() + 15
        while any(len(self.read[topic]) < count for topic in topics):
            assert time.monotonic() < give_up_s, {topic: len(read) for topic, read in self.read.items()}
            time.sleep(0.01)

    def publish_px4_odometry(self, north_m: float = 0.0) -> None:
        message = px4.VehicleOdometry(
            timestamp=1,
            timestamp_sample=time.time_ns() // 1000,
            pose_frame=1,
            position=[north_m, 0.0, -3.0],
            q=_NORTH,
            velocity_frame=1,
            velocity=[0.0] * 3,
            angular_velocity=[0.0] * 3,
            position_variance=[0.0] * 3,
            orientation_variance=[0.0] * 3,
            velocity_variance=[0.0] * 3,
            reset_counter=0,
            quality=0,
        )
        self.wire.publish("/fmu/out/vehicle_odometry", message)


@pytest.fixture(scope="module", autouse=True)
def domain() -> Iterator[None]:
    """On the loopback, for all of the process: a domain is opened once."""
    kept = Domain(_DDS.domain_id, cyclone_xml("lo"))
    yield
    del kept


@pytest.fixture
def opened() -> Iterator[list]:
    """Ends of wires to be closed."""
    ends: list = []
    yield ends
    for end in ends:
        end.close()


def _until_read(autopilot: Autopilot, publish, *topics: str) -> None:
    """Publish until the peers have found each other."""
    give_up_s = time.monotonic() + 15
    while not all(autopilot.read[topic] for topic in topics):
        assert time.monotonic() < give_up_s
        publish()
        time.sleep(0.05)


def test_a_pose_and_the_chunk_are_read_as_they_were_written(opened):
    topics = TopicsConfig(setpoint_kind="pose")
    assert topics.setpoint == "/mavros/setpoint_position/local"
    autopilot = Autopilot({topics.setpoint: dds.PoseStamped, topics.chunk: dds.MultiDOFJointTrajectory})
    port = MessagePort(DdsWire(_DDS), topics)
    opened += [autopilot.wire, port]
    poses = np.array([[0.0, 0.0, 2.0, 0.0], [0.5, 0.25, 2.0, math.pi / 2], [1.0, 0.5, 2.5, math.pi / 2]])

    def publish() -> None:
        port.publish_setpoint_pose(poses[1])
        port.publish_chunk(poses, 16.0)

    _until_read(autopilot, publish, topics.setpoint, topics.chunk)
    pose = autopilot.read[topics.setpoint][0][1].pose
    assert (pose.position.x, pose.position.y, pose.position.z) == (0.5, 0.25, 2.0)
    assert pose.orientation.z == pytest.approx(math.sqrt(0.5))
    chunk = autopilot.read[topics.chunk][0][1]
    assert chunk.joint_names == ["base_link"]
    assert [point.time_from_start.nanosec for point in chunk.points] == [0, 62_500_000, 125_000_000]
    assert chunk.points[1].velocities[0].linear == dds.Vector3(8.0, 4.0, 8.0)
    assert chunk.points[2].velocities[0].linear == dds.Vector3(0.0, 0.0, 0.0)
    assert chunk.points[1].transforms[0].translation == dds.Vector3(0.5, 0.25, 2.0)


def test_px4_is_flown_by_its_own_messages_and_both_stop_when_the_policy_is_gone(tmp_path, opened):
    topics = TopicsConfig(setpoint_kind="px4", odometry_kind="px4", publish_tf=True)
    autopilot = Autopilot(
        {
            topics.setpoint: px4.TrajectorySetpoint,
            topics.offboard_control_mode: px4.OffboardControlMode,
            "/tf": dds.TFMessage,
        }
    )
    port = MessagePort(DdsWire(_DDS), topics)
    opened += [autopilot.wire, port]
    listener = LinkListener(tmp_path / "line.sock")
    process = SetpointProcess(SetpointLogic(SetpointConfig(), LIMITS), port, listener)
    thread = threading.Thread(target=process.run)
    thread.start()
    link = PolicyLink(listener.path)
    try:
        _until_read(autopilot, autopilot.publish_px4_odometry, "/tf")
        began_s, last_beat_s, has_chunk = time.monotonic(), 0.0, False
        while time.monotonic() < began_s + 2.5:
            autopilot.publish_px4_odometry()
            if time.monotonic() < began_s + 1.0:
                last_beat_s = time.monotonic()
                link.send(Alive(seen_ns=time.monotonic_ns()))
                if not has_chunk:
                    actions = [tuple(action) for action in forward_chunk().tolist()]
                    link.send(Chunk(number=1, actions=actions, fps=16.0, seen_ns=time.monotonic_ns()))
                    has_chunk = True
            time.sleep(0.01)
    finally:
        process.stop()
        thread.join()
        link.close()
        listener.close()
    setpoints = [message for _, message in autopilot.read[topics.setpoint]]
    fastest = max(setpoints, key=lambda message: message.velocity[0])
    assert fastest.velocity[0] > 0.3  # ahead is north
    assert abs(fastest.velocity[1]) < 0.05
    assert all(math.isnan(value) for value in (*fastest.position, *fastest.acceleration, fastest.yaw))
    modes = [message for _, message in autopilot.read[topics.offboard_control_mode]]
    assert all(mode.velocity and not mode.position and not mode.attitude for mode in modes)
    assert abs(modes[-1].timestamp - time.time_ns() // 1000) < 10_000_000  # microseconds
    for topic in (topics.setpoint, topics.offboard_control_mode):
        assert autopilot.read[topic][-1][0] - last_beat_s < 1.2
    transform = autopilot.read["/tf"][0][1].transforms[0]
    assert (transform.header.frame_id, transform.child_frame_id) == ("odom", "base_link")
    assert transform.transform.translation == dds.Vector3(0.0, 0.0, 3.0)
    assert transform.transform.rotation.z == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("yaw_ned", [0.0, 0.5, -2.0, math.pi / 2])
def test_px4_attitudes_become_ros_attitudes(yaw_ned):
    q_wxyz = np.array([math.cos(yaw_ned / 2), 0.0, 0.0, math.sin(yaw_ned / 2)])
    expected = math.pi / 2 - yaw_ned
    difference = yaw_of_quaternion(attitude_of_px4(q_wxyz)) - expected
    assert math.remainder(difference, 2 * math.pi) == pytest.approx(0, abs=1e-12)


def test_a_px4_that_pitches_down_pitches_down_in_ros():
    """Nose down is a negative pitch in PX4 (right-handed about right) and a positive one in ROS (about left)."""
    pitch = -0.3
    x, y, z, w = attitude_of_px4(np.array([math.cos(pitch / 2), 0.0, math.sin(pitch / 2), 0.0]))
    forward = np.array([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)])
    assert forward[2] < 0
    assert enu_to_ned(forward)[0] == pytest.approx(math.cos(pitch))  # still to the north


@pytest.mark.parametrize("changes", [{"pose_frame": 0}, {"position": [math.nan] * 3}, {"q": [math.nan, 0.0, 0.0, 0.0]}])
def test_px4_odometry_without_a_pose_is_not_finite(changes):
    fields = {"pose_frame": 1, "position": [0.0] * 3, "q": _NORTH, "timestamp_sample": 1, **changes}
    sample = px4_odometry_sample(type("VehicleOdometry", (), fields))
    assert not np.isfinite([*sample.position_3, sample.yaw_rad]).all()
