"""Recordings are rosbag2 folders that ROS's own readers understand; definitions are those of ROS 2."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("cyclonedds", reason="needs the extra dds")
pytest.importorskip("mcap", reason="needs the extra dds")
pytest.importorskip("rosbags", reason="needs the extra dev")

from click.testing import CliRunner
from mcap.exceptions import EndOfFile
from mcap.records import Message
from mcap.stream_reader import StreamReader
from mcap.writer import Writer
from ros2_on_the_desk import forget_module
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from worldvln_edge.cli import main
from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports import px4_types as px4
from worldvln_edge.ros_bridge.ports.dds_wire import DdsWire
from worldvln_edge.ros_bridge.ports.messages import MessageBuilder
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig
from worldvln_edge.ros_bridge.recording import topic_recorder
from worldvln_edge.ros_bridge.recording.cdr import NoCdrError, cdr_encoder
from worldvln_edge.ros_bridge.recording.message_definitions import MESSAGES, message_definition
from worldvln_edge.ros_bridge.recording.rosbag_writer import RosbagError, RosbagWriter
from worldvln_edge.ros_bridge.recording.topic_recorder import TopicRecorder, recorded_topics

_ROS2 = get_typestore(Stores.ROS2_JAZZY)
_BUILD = MessageBuilder(DdsWire.types, TopicsConfig(), lambda: 5_000_000_007)
_POSES = np.array([[0.0, 0.0, 2.0, 0.0], [0.5, 0.0, 2.0, 0.1]])


class QuietWire:
    """Topics that the test fills itself."""

    types = DdsWire.types

    def __init__(self) -> None:
        self.receive = {}

    def subscribe(self, topic, kind, receive, *, must_arrive=False) -> None:
        self.receive[topic] = (kind, receive)


def _of(message_type: str):
    """The DDS type of a ROS message."""
    name = message_type.rpartition("/")[2]
    return getattr(px4 if message_type.startswith("px4") else dds, name)


@pytest.mark.parametrize("name", MESSAGES)
def test_definitions_are_those_of_ros_2_and_the_dds_types_have_their_fields(name):
    ours = get_types_from_msg(message_definition(name), name)
    if name in _ROS2.fielddefs:  # px4_msgs are not among them
        assert ours[name][1] == _ROS2.fielddefs[name][1]
    assert [field for field, _ in ours[name][1]] == list(_of(name).__dataclass_fields__)


def _message(message_type: str):
    """One with something in every field that the bridge fills."""
    header = _BUILD.header()
    return {
        "sensor_msgs/msg/Image": dds.Image(header, 2, 2, "rgb8", 0, 6, bytes(range(12))),
        "sensor_msgs/msg/CompressedImage": dds.CompressedImage(header, "jpeg", b"12345"),
        "nav_msgs/msg/Odometry": dds.Odometry(
            header,
            "base_link",
            dds.PoseWithCovariance(dds.Pose(dds.Point(1, 2, 3), dds.Quaternion(0, 0, 0, 1)), [0.5] * 36),
            dds.TwistWithCovariance(dds.Twist(dds.Vector3(4, 5, 6), dds.Vector3(0, 0, 7)), [0.25] * 36),
        ),
        "std_msgs/msg/String": dds.String("fly"),
        "rosgraph_msgs/msg/Clock": _BUILD.clock(7_000_000_001),
        "geometry_msgs/msg/TwistStamped": _BUILD.velocity((1, 2, 3), 0.5),
        "geometry_msgs/msg/PoseStamped": _BUILD.pose(_POSES[1]),
        "nav_msgs/msg/Path": _BUILD.path(_POSES),
        "trajectory_msgs/msg/MultiDOFJointTrajectory": _BUILD.chunk(_POSES, 16.0),
        "diagnostic_msgs/msg/DiagnosticArray": dds.DiagnosticArray(
            header, [dds.DiagnosticStatus(2, "a", "b", "", [dds.KeyValue("what to do", "c")])]
        ),
        "px4_msgs/msg/TrajectorySetpoint": _BUILD.px4_setpoint((1, 2, 3), 0.5),
        "px4_msgs/msg/OffboardControlMode": _BUILD.px4_control_mode(),
        "px4_msgs/msg/VehicleOdometry": px4.VehicleOdometry(
            1, 2, 1, [1, 2, 3], [1, 0, 0, 0], 1, [0] * 3, [0] * 3, [0] * 3, [0] * 3, [0] * 3, 4, -5
        ),
        "tf2_msgs/msg/TFMessage": _BUILD.body_transform(
            dds.Odometry(
                header,
                "base_link",
                dds.PoseWithCovariance(dds.Pose(dds.Point(1, 2, 3), dds.Quaternion(0, 0, 0, 1)), [0] * 36),
                dds.TwistWithCovariance(dds.Twist(dds.Vector3(0, 0, 0), dds.Vector3(0, 0, 0)), [0] * 36),
            )
        ),
    }[message_type]


def _all_topics() -> dict[str, str]:
    recorded = recorded_topics(TopicsConfig(use_sim_time=True))
    compressed = TopicsConfig(image="/jpeg", image_is_compressed=True, odometry_kind="px4", setpoint_kind="px4")
    return {**recorded, **recorded_topics(compressed), **recorded_topics(TopicsConfig(setpoint_kind="pose"))}


def test_a_bag_holds_every_message_as_ros_2_reads_it(tmp_path):
    bag = RosbagWriter(tmp_path / "flight")
    to_cdr = cdr_encoder("dds")
    topics = _all_topics()
    for index, (topic, message_type) in enumerate(topics.items()):
        for copy in range(2):
            bag.write(topic, message_type, to_cdr(_message(message_type)), 1_000_000_000 * (1 + index + copy))
    bag.close()
    with AnyReader([tmp_path / "flight"], default_typestore=get_typestore(Stores.EMPTY)) as reader:
        assert {connection.topic: connection.msgtype for connection in reader.connections} == topics
        assert reader.message_count == 2 * len(topics) == bag.messages
        assert (reader.start_time, reader.duration) == (1_000_000_000, 1_000_000_000 * len(topics) + 1)
        read = {c.topic: reader.deserialize(data, c.msgtype) for c, _, data in reader.messages()}
    assert bytes(read["/camera/image_raw"].data) == bytes(range(12))
    assert bytes(read["/jpeg"].data) == b"12345"
    assert read["/odom"].twist.twist.linear.z == 6
    assert list(read["/odom"].twist.covariance) == [0.25] * 36
    assert read["/mavros/setpoint_velocity/cmd_vel"].twist.angular.z == 0.5
    assert read["/mavros/setpoint_position/local"].header.frame_id == "odom"
    assert [point.time_from_start.nanosec for point in read["/worldvln/chunk"].points] == [0, 62_500_000]
    assert read["/worldvln/chunk"].points[0].velocities[0].linear.x == 8.0
    assert read["/worldvln/path"].poses[1].pose.position.x == 0.5
    assert read["/diagnostics"].status[0].values[0].value == "c"
    assert read["/tf"].transforms[0].child_frame_id == "base_link"
    assert read["/clock"].clock.nanosec == 1
    assert list(read["/fmu/in/trajectory_setpoint"].velocity) == [2, 1, -3]
    assert read["/fmu/in/offboard_control_mode"].velocity
    assert (read["/fmu/out/vehicle_odometry"].quality, read["/fmu/out/vehicle_odometry"].reset_counter) == (-5, 4)


def test_what_was_written_a_second_ago_survives_a_cut(tmp_path):
    bag = RosbagWriter(tmp_path / "flight")
    for second in range(4):
        bag.write("/a", "std_msgs/msg/String", cdr_encoder("dds")(dds.String(str(second))), second * 1_000_000_000)
    file = tmp_path / "flight" / "flight_0.mcap"  # not closed: as after a power cut
    records = []
    with file.open("rb") as stream, contextlib.suppress(EndOfFile):
        for record in StreamReader(stream).records:
            records.append(record)  # those in front of the cut
    assert sum(isinstance(record, Message) for record in records) >= 3


def test_a_bag_that_grows_is_split_and_the_files_that_were_full_are_whole(tmp_path):
    bag, folder = RosbagWriter(tmp_path / "flight", max_file_bytes=1000), tmp_path / "flight"
    words = [f"{index} " + "x" * 300 for index in range(9)]
    for index, word in enumerate(words):
        topic = "/b" if index == 8 else "/a"
        bag.write(topic, "std_msgs/msg/String", cdr_encoder("dds")(dds.String(word)), (1 + index) * 1_000_000_000)
    for number in (0, 1):
        with AnyReader([folder / f"flight_{number}.mcap"]) as reader:
            assert reader.message_count == 4
    bag.close()
    assert sorted(file.name for file in folder.iterdir()) == [
        "flight_0.mcap",
        "flight_1.mcap",
        "flight_2.mcap",
        "metadata.yaml",
    ]
    with AnyReader([folder]) as reader:
        assert [reader.deserialize(data, c.msgtype).data for c, _, data in reader.messages()] == words
        assert (reader.start_time, reader.duration) == (1_000_000_000, 8_000_000_001)
        assert {topic: info.msgcount for topic, info in reader.topics.items()} == {"/a": 8, "/b": 1}


def test_a_recorder_writes_what_came_until_it_is_stopped_and_counts_what_it_drops(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(topic_recorder, "_SAY_S", 0.0)
    wire, bag = QuietWire(), RosbagWriter(tmp_path / "flight")
    recorder = TopicRecorder(wire, TopicsConfig(), cdr_encoder("dds"), bag, without_images=True)
    assert "/camera/image_raw" not in wire.receive
    kind, receive = wire.receive["/worldvln/instruction"]
    assert kind is dds.String
    for index in range(300):
        receive(dds.String(f"fly {index}"), "test")
    assert recorder.dropped == 300 - 256
    recorder.stop()
    receive(dds.String("too late"), "test")
    recorder.run()
    assert bag.messages == 256
    assert "44 messages were dropped: the disk does not keep up" in caplog.text
    with AnyReader([tmp_path / "flight"]) as reader:
        assert [reader.deserialize(data, c.msgtype).data for c, _, data in reader.messages()][-1] == "fly 255"


def test_folders_and_disks_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    with pytest.raises(RosbagError, match="exists already; give a new folder"):
        RosbagWriter(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RosbagError, match="cannot be made"):
        RosbagWriter(tmp_path / "file" / "bag")
    bag = RosbagWriter(tmp_path / "flight")

    def full(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "add_message", full)
    with pytest.raises(RosbagError, match=r"flight cannot be written \(No space left on device\); free some space"):
        bag.write("/a", "std_msgs/msg/String", b"", 1)


def test_a_disk_that_is_full_ends_the_recording_and_says_how_to_restore_it(tmp_path, monkeypatch):
    wire, bag = QuietWire(), RosbagWriter(tmp_path / "flight")

    def full(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "add_message", full)
    monkeypatch.setattr(Writer, "finish", full)
    recorder = TopicRecorder(wire, TopicsConfig(), cdr_encoder("dds"), bag)
    wire.receive["/worldvln/instruction"][1](dds.String("fly"), "test")
    with pytest.raises(
        RosbagError, match=r"was not closed \(No space left on device\); free some space, then run mcap"
    ):
        recorder.run()


def test_an_empty_bag_can_be_read(tmp_path):
    RosbagWriter(tmp_path / "flight").close()
    with AnyReader([tmp_path / "flight"]) as reader:
        assert reader.message_count == 0


def test_ros_1_has_its_own_recorder(tmp_path):
    with pytest.raises(NoCdrError, match="--via ros1 has no rosbag2 recording; use `rosbag record`"):
        cdr_encoder("ros1")
    config = tmp_path / "drone.toml"
    config.write_text("[limits]\ngeofence_min_m = [-20, -20, 0]\ngeofence_max_m = [20, 20, 10]\n")
    arguments = ["ros", "record", "--via", "ros1", "--config", str(config), "--out", str(tmp_path / "bag")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "error: --via ros1 has no rosbag2 recording; use `rosbag record`" in result.output
    assert not (tmp_path / "bag").exists()


def test_the_command_records_what_is_on_the_topics_until_it_is_told_to_stop(tmp_path):
    config = tmp_path / "drone.json"
    limits = {"geofence_min_m": [-20, -20, 0], "geofence_max_m": [20, 20, 10]}
    domain = {"domain_id": 1 + (os.getpid() + 50) % 200, "network_interface": "lo"}
    config.write_text(json.dumps({"limits": limits, "dds": domain}))
    arguments = ["ros", "record", "--via", "dds", "--config", str(config), "--out", str(tmp_path / "bag")]
    arguments += ["--max-bag-size", "1"]
    wire = DdsWire(DdsConfig(**domain))
    with subprocess.Popen([sys.executable, "-m", "worldvln_edge", *arguments], stdout=subprocess.PIPE) as recorder:
        try:
            give_up_s = time.monotonic() + 30
            while not wire.readers("/worldvln/instruction", dds.String):
                assert time.monotonic() < give_up_s
                time.sleep(0.05)
            for word in ("first", "second"):
                wire.publish("/worldvln/instruction", dds.String(word))
            time.sleep(0.5)
            recorder.send_signal(signal.SIGTERM)
            said, _ = recorder.communicate(timeout=30)
        finally:
            recorder.kill()
            wire.close()
    assert recorder.returncode == 0
    assert len(list((tmp_path / "bag").glob("*.mcap"))) == 2
    assert said.decode() == f"{tmp_path / 'bag'}: 2 messages, 0 dropped\n"
    with AnyReader([tmp_path / "bag"]) as reader:
        assert [reader.deserialize(data, c.msgtype).data for c, _, data in reader.messages()] == ["first", "second"]


@pytest.mark.parametrize("command", ["record", "setpoints", "policy"])
def test_help_of_the_ways_names_all_three(command):
    output = CliRunner().invoke(main, ["ros", command, "--help"]).output
    assert "[dds|ros1|ros2]" in output
    assert f"Example: worldvln-edge ros {command}" in output


def test_without_ros_2_the_command_says_what_to_source_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    forget_module(monkeypatch, "worldvln_edge.ros_bridge.ports.rclpy_wire")
    config = tmp_path / "drone.toml"
    config.write_text("[limits]\ngeofence_min_m = [-20, -20, 0]\ngeofence_max_m = [20, 20, 10]\n")
    arguments = ["--via", "ros2", "--config", str(config), "--socket", str(tmp_path / "line.sock")]
    result = CliRunner().invoke(main, ["ros", "setpoints", *arguments])
    assert result.exit_code == 1
    assert "ROS 2 is not to be found" in result.output
    assert "source /opt/ros/<distribution>/setup.bash" in result.output
    assert not (tmp_path / "line.sock").exists()
