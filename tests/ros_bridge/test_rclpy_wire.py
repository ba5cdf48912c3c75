"""The adapter to rclpy, against messages with the fields of ROS 2's definitions; rclpy itself is played."""

import math
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="needs the extra dev")

from ros2_on_the_desk import GoalHandle, Transition, forget_module, install
from setpoint_flights import LIMITS

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, DdsConfig
from worldvln_edge.ros_bridge.diagnostics import error, ok
from worldvln_edge.ros_bridge.flight import Flight
from worldvln_edge.ros_bridge.ports.message_port import MessagePort
from worldvln_edge.ros_bridge.ports.opening import WireMissingError, goals_served, open_wire
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig
from worldvln_edge.ros_bridge.ports.wire import DeafWireError
from worldvln_edge.ros_bridge.running_bridge import RunningBridge


@pytest.fixture
def graph(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def opened(graph):
    """Opens ports with topics of the test's choice, and closes them."""
    ports = []

    def open_with(**topics: object) -> MessagePort:
        config = BridgeConfig(limits=LIMITS, topics=TopicsConfig(**topics))
        ports.append(MessagePort(open_wire("ros2", config, name="test"), config.topics))
        return ports[-1]

    yield open_with
    for port in ports:
        port.close()


def _node(graph, topic: str, message_type: str):
    """Somebody else's publisher."""
    node = sys.modules["rclpy.node"].Node("other")
    package, _, name = message_type.split("/")
    kind = getattr(sys.modules[f"{package}.msg"], name)
    return kind, node.create_publisher(kind, topic, None)


def _time(seconds: int):
    return sys.modules["builtin_interfaces.msg"].Time(sec=seconds, nanosec=5)


def test_words_are_read_reliably_and_the_camera_takes_any_publisher(graph, opened):
    port = opened()
    port.subscribe_image(list)
    port.subscribe_instruction(list)
    port.subscribe_command(list)
    topics = TopicsConfig()
    assert [graph.reliability[topic] for topic in (topics.image, topics.instruction, topics.command)] == [
        "BEST_EFFORT",
        "RELIABLE",
        "RELIABLE",
    ]


def test_a_failure_within_the_executor_comes_out_of_the_next_publish(graph, opened):
    port = opened()
    port.subscribe_command(list)
    port.publish_step_done(1)
    port._wire.node.create_timer(0.0, lambda: [].pop())

    def publish_for_a_while() -> None:
        give_up_s = time.monotonic() + 10
        while time.monotonic() < give_up_s:
            port.publish_step_done(1)

    with pytest.raises(DeafWireError, match="handling a message failed, see the log"):
        publish_for_a_while()


def test_images_and_odometry_come_with_their_stamps(graph, opened):
    images, poses = [], []
    port = opened()
    port.subscribe_image(images.append)
    port.subscribe_odometry(poses.append)
    image, camera = _node(graph, "/camera/image_raw", "sensor_msgs/msg/Image")
    header = sys.modules["std_msgs.msg"].Header(stamp=_time(3), frame_id="camera")
    camera.publish(image(header=header, height=1, width=2, encoding="rgb8", step=6, data=bytes(range(6))))
    assert bytes(images[0].image.data) == bytes(range(6))
    assert (images[0].stamp_ns, images[0].image.width, images[0].source) == (3_000_000_005, 2, "publisher 1")
    odometry, tracker = _node(graph, "/odom", "nav_msgs/msg/Odometry")
    message = odometry(header=header)
    message.pose.pose.position.x, message.pose.pose.orientation.w = 4.0, 1.0
    tracker.publish(message)
    assert (poses[0].position_3[0], poses[0].yaw_rad) == (4.0, 0.0)
    message.pose.pose.orientation.w = 0.0
    tracker.publish(message)
    assert math.isnan(poses[1].yaw_rad)


def test_two_cameras_are_two_sources(graph, opened):
    images = []
    port = opened()
    port.subscribe_image(images.append)
    image, camera = _node(graph, "/camera/image_raw", "sensor_msgs/msg/Image")
    _node(graph, "/camera/image_raw", "sensor_msgs/msg/Image")
    give_up_s = time.monotonic() + 10
    while len({sample.source for sample in images}) < 2:
        assert time.monotonic() < give_up_s
        camera.publish(image(header=sys.modules["std_msgs.msg"].Header(stamp=_time(1))))
        time.sleep(0.01)


def test_what_is_published_has_the_fields_of_ros_2(graph, opened):
    port = opened(publish_tf=True, use_sim_time=True)
    clock, simulator = _node(graph, "/clock", "rosgraph_msgs/msg/Clock")
    simulator.publish(clock(clock=_time(9)))
    assert port.now_ns() == 9_000_000_005
    port.publish_setpoint((1.0, 2.0, 3.0), 0.5)
    port.publish_path(np.zeros((3, 4)))
    port.publish_chunk(np.array([[0.0, 0, 0, 0], [1, 0, 0, 0]]), 16.0)
    port.publish_diagnostics([error("a/b", "wrong", "mend it"), ok("c")])
    twist = graph.sent["/mavros/setpoint_velocity/cmd_vel"][0]
    assert (twist.twist.linear.y, twist.twist.angular.z, twist.header.stamp.sec) == (2.0, 0.5, 9)
    assert len(graph.sent["/worldvln/path"][0].poses) == 3
    assert graph.sent["/worldvln/chunk"][0].points[0].velocities[0].linear.x == 16.0
    status = graph.sent["/diagnostics"][0].status
    assert [(check.level, check.name) for check in status] == [(b"\x02", "worldvln/a/b"), (b"\x00", "worldvln/c")]
    port.subscribe_odometry(lambda sample: None)
    odometry, tracker = _node(graph, "/odom", "nav_msgs/msg/Odometry")
    tracker.publish(odometry())
    assert graph.sent["/tf"][0].transforms[0].child_frame_id == "base_link"


def test_poses_and_px4_messages_are_published_as_configured(graph, opened):
    opened(setpoint_kind="pose").publish_setpoint_pose(np.array([1.0, 2.0, 3.0, math.pi]))
    pose = graph.sent["/mavros/setpoint_position/local"][0].pose
    assert (pose.position.y, pose.orientation.z) == (2.0, 1.0)
    port = opened(setpoint_kind="px4", odometry_kind="px4")
    port.publish_setpoint((1.0, 2.0, 3.0), 0.5)
    setpoint = graph.sent["/fmu/in/trajectory_setpoint"][0]
    assert (list(setpoint.velocity), setpoint.yawspeed) == ([2.0, 1.0, -3.0], -0.5)
    assert math.isnan(setpoint.position[0])
    assert math.isnan(setpoint.yaw)
    assert graph.sent["/fmu/in/offboard_control_mode"][0].velocity
    poses = []
    port.subscribe_odometry(poses.append)
    odometry, tracker = _node(graph, "/fmu/out/vehicle_odometry", "px4_msgs/msg/VehicleOdometry")
    tracker.publish(odometry(pose_frame=1, position=[1.0, 2.0, -3.0], q=[1.0, 0.0, 0.0, 0.0], timestamp_sample=7))
    assert poses[0].position_3.tolist() == [2.0, 1.0, 3.0]
    assert poses[0].yaw_rad == pytest.approx(math.pi / 2)  # north
    assert poses[0].stamp_ns == 7000


def test_px4_messages_that_are_not_built_are_named(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "px4_msgs.msg", None)
    config = BridgeConfig(limits=LIMITS, topics=TopicsConfig(setpoint_kind="px4"))
    with pytest.raises(RuntimeError, match=r"px4_msgs is not to be found .*; build px4_msgs of your PX4's version"):
        open_wire("ros2", config)


def test_without_ros_2_the_message_says_what_to_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    forget_module(monkeypatch, "worldvln_edge.ros_bridge.ports.rclpy_wire")
    with pytest.raises(
        WireMissingError, match=r"ROS 2 is not to be found .*; source /opt/ros/<distribution>/setup.bash"
    ):
        open_wire("ros2", BridgeConfig(limits=LIMITS))


@pytest.fixture
def goals(graph, opened):
    """Flights by instruction, asked for by goals of the action."""
    flights: dict[str, Flight] = {}

    def request(instruction: str) -> Flight:
        flights[instruction] = Flight(instruction)
        return flights[instruction]

    with goals_served(opened()._wire, request):
        yield graph.actions["/worldvln/fly_instruction"], flights
    assert graph.actions == {}


def _asked(flights: dict[str, Flight], instruction: str) -> Flight:
    give_up_s = time.monotonic() + 10
    while instruction not in flights:
        assert time.monotonic() < give_up_s
        time.sleep(0.005)
    return flights[instruction]


def test_a_goal_is_flown_with_feedback(goals):
    server, flights = goals
    goal = GoalHandle(server, instruction="Fly ahead.")
    flight = _asked(flights, "Fly ahead.")
    flight.begin()
    flight.chunk_sent()
    flight.flown(3.0)
    time.sleep(0.25)
    flight.end(ok("policy/flight", "flown: Fly ahead."))
    result = goal.wait()
    assert (goal.status, result.was_flown, result.chunks) == ("succeeded", True, 1)
    assert (goal.feedback[-1].state, goal.feedback[-1].chunk, goal.feedback[-1].actions_flown) == ("flying", 1, 3.0)


def test_a_cancelled_goal_ends_its_flight_and_one_that_fails_says_what_to_do(goals):
    server, flights = goals
    goal = GoalHandle(server, instruction="Fly ahead.")
    flight = _asked(flights, "Fly ahead.")
    goal.cancel()
    give_up_s = time.monotonic() + 10
    while not flight.is_cancelled:
        assert time.monotonic() < give_up_s
        time.sleep(0.005)
    flight.end(error("policy/flight", "the flight was stopped", "send the next instruction"))
    assert (goal.wait().was_flown, goal.status) == (False, "canceled")
    goal = GoalHandle(server, instruction="Turn.")
    _asked(flights, "Turn.").end(error("policy/flight", "no camera", "look at it"))
    result = goal.wait()
    assert (goal.status, result.message, result.what_to_do) == ("aborted", "no camera", "look at it")


def test_a_goal_without_words_is_rejected(goals, graph):
    server, _ = goals
    answer = sys.modules["rclpy.action"].GoalResponse
    goal = sys.modules["worldvln_edge_msgs.action"].FlyInstruction.Goal
    assert server.goal_callback(goal(instruction="  ")) is answer.REJECT
    assert server.goal_callback(goal(instruction="Fly.")) is answer.ACCEPT


def test_without_the_action_package_the_topic_still_works_and_a_warning_says_so(graph, opened, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "worldvln_edge_msgs.action", None)
    with goals_served(opened()._wire, Flight):
        assert graph.actions == {}
    assert "build ros_bridge/ros2 with colcon, or send instructions on their topic" in caplog.text


def _lifecycle_node():
    from worldvln_edge.ros_bridge.lifecycle_node import BridgeNode

    return BridgeNode()


def test_a_node_whose_geofence_is_not_set_does_not_become_inactive(graph):
    node = _lifecycle_node()
    assert node.on_configure(None) is Transition.FAILURE
    assert "parameter limits.geofence_min_m is not set; give the corner of the box" in node.logged[0]


def test_the_node_starts_the_bridge_when_active_and_ends_it_when_inactive(graph, monkeypatch):
    started = []

    class Bridge:
        why_ended = None

        def __init__(self, via, config):
            started.append((via, config))
            self.is_running = True

        def stop(self) -> None:
            self.is_running = False
            started.append("stopped")

    node = _lifecycle_node()
    monkeypatch.setattr(sys.modules["worldvln_edge.ros_bridge.lifecycle_node"], "RunningBridge", Bridge)
    node.parameters |= {"limits.geofence_min_m": [-9.0, -9.0, 0.0], "limits.geofence_max_m": [9.0, 9.0, 9.0]}
    assert node.on_configure(None) is Transition.SUCCESS
    assert node.on_activate(None) is Transition.SUCCESS
    via, config = started[0]
    assert (via, config.limits.geofence_max_m) == ("ros2", (9.0, 9.0, 9.0))
    assert node.descriptors["setpoint.rate_hz"].floating_point_range[0].to_value == 50.0
    Bridge.why_ended = "the setpoint process ended with status 1"
    node.timers[0][1]()
    assert started[1] == "stopped"
    assert "the bridge ended: the setpoint process ended with status 1" in node.logged
    assert node.on_cleanup(None) is Transition.SUCCESS


def test_a_bridge_whose_setpoint_process_dies_says_so():
    pytest.importorskip("cyclonedds", reason="needs the extra dds")
    config = BridgeConfig(limits=LIMITS, dds=DdsConfig(domain_id=212, network_interface="nowhere0"))
    before = threading.active_count()
    bridge = RunningBridge("dds", config)
    give_up_s = time.monotonic() + 30
    while bridge.why_ended is None:
        assert time.monotonic() < give_up_s
        time.sleep(0.05)
    assert "the setpoint process ended with status 1; its last lines say why" in bridge.why_ended
    bridge.stop()
    assert threading.active_count() == before
