"""ROS 1 through rospy, with a real roscore. `make test-ros` runs these."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

pytest.importorskip("rospy", reason="needs ROS 1 (make test-ros)")

import rospy

from worldvln_edge.ros_bridge.diagnostics import error
from worldvln_edge.ros_bridge.ports.message_port import MessagePort
from worldvln_edge.ros_bridge.ports.rospy_wire import RospyError, RospyWire, check_topics
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures("roscore")]
_TOPICS = TopicsConfig(use_sim_time=True)
_JOIN = "from worldvln_edge.ros_bridge.ports.rospy_wire import RospyWire; RospyWire()"


@pytest.fixture(scope="module")
def wire(roscore: str) -> Iterator[RospyWire]:
    wire = RospyWire("test")
    yield wire
    wire.close()


def _received(wire: RospyWire, topic: str, kind: type, publish) -> tuple[object, str]:
    """What `publish()` sends on a topic, and from whom."""
    came, arrived = [], threading.Event()

    def take(message: object, source: str) -> None:
        came.append((message, source))
        arrived.set()

    wire.subscribe(topic, kind, take)
    for _ in range(100):  # until the subscriber is connected
        publish()
        if arrived.wait(0.2):
            return came[0]
    raise AssertionError(f"nothing came on {topic}")


def test_without_a_master_it_is_said_where_one_was_looked_for():
    settings = {**os.environ, "ROS_MASTER_URI": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", _JOIN], env=settings, capture_output=True, text=True, check=False)
    assert (
        "RospyError: no ROS master answers at http://127.0.0.1:9; start roscore, or set ROS_MASTER_URI" in done.stderr
    )


def test_the_process_keeps_its_log_and_ends_by_itself():
    program = f"import logging; logging.basicConfig(); {_JOIN}; logging.getLogger('ours').warning('still here')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "WARNING:ours:still here" in done.stderr


@pytest.mark.parametrize("kind", [{"setpoint_kind": "px4"}, {"odometry_kind": "px4"}])
def test_messages_that_ros_1_does_not_have_are_refused(kind):
    with pytest.raises(RospyError, match="px4 are ROS 2's; with ROS 1 fly PX4 through MAVROS"):
        check_topics(TopicsConfig(**kind))


def test_what_the_bridge_publishes_arrives_with_its_fields(wire):
    port = MessagePort(wire, _TOPICS)
    types = wire.types
    clock = types.Clock(clock=types.Time(sec=12, nanosec=34))
    _received(wire, "/clock", types.Clock, lambda: wire.publish("/clock", clock))
    assert port.now_ns() == 12_000_000_034
    setpoint, source = _received(
        wire, _TOPICS.setpoint, types.TwistStamped, lambda: port.publish_setpoint((1.0, -2.0, 0.5), 0.25)
    )
    assert source == rospy.get_name()
    assert (setpoint.twist.linear.x, setpoint.twist.linear.y, setpoint.twist.linear.z) == (1.0, -2.0, 0.5)
    assert setpoint.twist.angular.z == 0.25
    assert (setpoint.header.stamp.secs, setpoint.header.stamp.nsecs, setpoint.header.frame_id) == (12, 34, "odom")
    poses = np.array([[0.0, 0.0, 3.0, 0.0], [1.0, 0.0, 3.0, np.pi / 2]])
    path, _ = _received(wire, _TOPICS.path, types.Path, lambda: port.publish_path(poses))
    assert path.poses[1].pose.orientation.z == pytest.approx(np.sqrt(0.5))
    chunk, _ = _received(wire, _TOPICS.chunk, types.MultiDOFJointTrajectory, lambda: port.publish_chunk(poses, 16.0))
    assert chunk.points[1].time_from_start.to_sec() == pytest.approx(1 / 16)
    checks = [error("camera/rate", "no image", "look")]
    array, _ = _received(wire, _TOPICS.diagnostics, types.DiagnosticArray, lambda: port.publish_diagnostics(checks))
    status = array.status[0]
    assert (status.level, status.name, status.message, status.values[0].value) == (
        2,
        "worldvln/camera/rate",
        "no image",
        "look",
    )
    done, _ = _received(wire, _TOPICS.step_done, types.Clock, lambda: port.publish_step_done(7))
    assert done.clock.nsecs == 7


def test_images_and_odometry_are_read(wire):
    port, types = MessagePort(wire, _TOPICS), wire.types
    images, poses = [], []
    port.subscribe_image(images.append)
    port.subscribe_odometry(poses.append)
    header = types.Header(stamp=types.Time(sec=5, nanosec=6), frame_id="camera")
    image = types.Image(
        header=header, height=1, width=2, encoding="rgb8", is_bigendian=0, step=6, data=bytes([1, 2, 3, 4, 5, 6])
    )
    odometry = types.Odometry(header=header)
    odometry.pose.pose.position.x = 4.0
    _received(wire, _TOPICS.image, types.Image, lambda: wire.publish(_TOPICS.image, image))
    _received(wire, _TOPICS.odometry, types.Odometry, lambda: wire.publish(_TOPICS.odometry, odometry))
    assert bytes(images[0].image.data) == bytes([1, 2, 3, 4, 5, 6])
    assert images[0].stamp_ns == 5_000_000_006
    assert poses[0].position_3[0] == 4.0
    assert np.isnan(poses[0].yaw_rad)  # a quaternion of zeros


def test_closing_leaves_the_topics(wire):
    reader, string = RospyWire("test"), wire.types.String
    assert wire.readers("/left", string) == 0
    reader.subscribe("/left", string, lambda message, source: None)
    _wait(lambda: wire.readers("/left", string) == 1)
    reader.close()
    _wait(lambda: wire.readers("/left", string) == 0)


def _wait(is_so: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < give_up_s
        time.sleep(0.05)
