"""What `ros simulate` refuses, and what it needs of a configuration."""

import sys

import msgspec
import pytest
from click.testing import CliRunner
from lockstep_desk import LIMITS, TOPICS
from memory_wire import MemoryTopics, MemoryWire

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig
from worldvln_edge.ros_bridge.cli import ros
from worldvln_edge.ros_bridge.ports.opening import WireMissingError, open_wire
from worldvln_edge.ros_bridge.ports.topics import TopicError, TopicsConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig
from worldvln_edge.ros_bridge.simulation.simulator_node import SimulatorConfigError, SimulatorNode

_URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("topics", "rate_hz", "message"),
    [
        (TopicsConfig(use_sim_time=True), 40, "topics.use_sim_time without topics.lockstep: .*set both.*set neither"),
        (TopicsConfig(image_is_compressed=True), 40, "this simulator speaks sensor_msgs/Image.*image_is_compressed"),
        (TopicsConfig(setpoint_kind="px4"), 40, "this simulator speaks .*setpoint_kind = .velocity"),
        (TOPICS, 20, "setpoint.rate_hz 20 is also the camera's here.*frame_clock.max_skew_s .0.04 s.; set 40"),
    ],
)
def test_a_configuration_that_the_simulator_cannot_serve_is_named(topics, rate_hz, message):
    config = BridgeConfig(limits=LIMITS, topics=topics, setpoint=SetpointConfig(rate_hz=rate_hz, hold_after_s=0.04))
    with pytest.raises(SimulatorConfigError, match=message):
        SimulatorNode(config, MemoryWire(MemoryTopics()), _URL, (64, 64))


@pytest.mark.parametrize("options", [{}, {"use_sim_time": True, "setpoint_kind": "pose"}])
def test_lockstep_needs_simulated_time_and_velocities(options):
    with pytest.raises(TopicError, match=r"topics\.lockstep needs use_sim_time = true"):
        TopicsConfig(lockstep=True, **options)


def test_a_way_that_is_none_is_named():
    with pytest.raises(ValueError, match="'smoke' is no way to the wire; choose one of dds, ros1"):
        open_wire("smoke", BridgeConfig(limits=LIMITS))


def test_without_ros_1_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rosgraph", None)
    monkeypatch.delitem(sys.modules, "worldvln_edge.ros_bridge.ports.rospy_wire", raising=False)
    with pytest.raises(WireMissingError, match=r"ROS 1 is not to be found .*; install python3-rospy"):
        open_wire("ros1", BridgeConfig(limits=LIMITS))


def test_the_command_says_what_runs_beside_it():
    text = CliRunner().invoke(ros, ["simulate", "--help"]).output
    assert "ros run" in text
    assert "sim serve" in text


def test_server_settings_reach_the_client():
    config = msgspec.toml.decode(
        '[limits]\ngeofence_min_m = [0, 0, 0]\ngeofence_max_m = [1, 1, 5]\n[server]\nframe_format = "rgb8"\n',
        type=BridgeConfig,
    )
    from worldvln_edge.ros_bridge.server_connection import server_client

    assert server_client(config.server)()._config.frame_format == "rgb8"
