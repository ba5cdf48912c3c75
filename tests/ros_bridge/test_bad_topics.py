"""Bad input on real topics, of ROS 1 and over DDS: each has a diagnostic that names it, and the drone holds."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="flies against a server, which needs the extra serve")

from bridge_processes import BridgeProcesses, bridge_processes
from lockstep_desk import GreySimulator

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, read_bridge_config
from worldvln_edge.ros_bridge.flight import FLIGHT, is_flying
from worldvln_edge.ros_bridge.ports.opening import open_wire
from worldvln_edge.ros_bridge.ports.wire import Wire
from worldvln_edge.ros_bridge.simulation.simulated_drone import SimulatedDrone
from worldvln_edge.ros_bridge.simulation.simulated_flights import SimulatedFlights
from worldvln_edge.ros_bridge.simulation.simulator_topics import SimulatorTopics
from worldvln_edge.ros_bridge.simulation.world import RealTimeWorld
from worldvln_edge.tasks import Task

_TASK = Task(task_id="ahead", instruction="Fly ahead.", initial_pos=(0, 0, 300, 0, 0, 0))
_NS = 1_000_000_000
# Loose, for machines under load: what is looked for here is no matter of milliseconds.
_SETTINGS = """
[camera]
missing_after_s = 2

[frame_clock]
max_skew_s = 0.4

[odometry]
stale_after_s = 1
"""


class FaultyTopics(SimulatorTopics):
    """A drone whose topics can be spoilt. `fault`: how; empty: not at all."""

    fault = ""

    def show(self, drone, now_ns):
        super().show(drone, now_ns - 5 * _NS if self.fault == "jump back" else now_ns)

    def _image(self, frame_HW3):
        image = super()._image(frame_HW3)
        if self.fault == "encoding":
            image.encoding = "32FC1"
        elif self.fault == "bytes":
            image.data = image.data[:-1]
        elif self.fault == "size":
            image = super()._image(frame_HW3[:8])
        return image

    def _publish_image(self, image):
        if self.fault != "missing":
            super()._publish_image(image)

    def _odometry(self, drone):
        odometry = super()._odometry(drone)
        if self.fault == "odometry":
            odometry.pose.pose.position.x = math.nan
        return odometry


class Desk:
    """A bridge of real processes and a drone of this one, which the test steps."""

    def __init__(self, via: str, config: BridgeConfig, wire: Wire, bridge: BridgeProcesses):
        self.via, self.config, self.bridge = via, config, bridge
        self.topics = FaultyTopics(wire, config.topics)
        self.drone = SimulatedDrone(GreySimulator())  # type: ignore[arg-type]
        self.world = RealTimeWorld(self.drone, self.topics, 0.025)
        self.flights = SimulatedFlights(self.drone, self.topics, self.world)

    def fly(self) -> None:
        """From the start, until the drone moves."""
        self.topics.fault = ""
        self.flights.stand(_TASK)
        for check in ("camera/publishers", "camera/rate"):
            self.wait(lambda check=check: self.has(check, "ok"), f"a {check} that is well")
        self.topics.instruct(_TASK.instruction)
        self.wait(lambda: self.topics.velocity_4[0] > 0.2, "a flight")

    def has(self, check: str, text: str) -> bool:
        found = self.topics.check_since(check, 0)
        return found is not None and text in found[1]

    def holds(self) -> bool:
        return not self.topics.velocity_4.any()

    def wait(self, is_so: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < give_up_s, (what, self.bridge.log("run")[-2000:])
            self.world.step()


@pytest.fixture(
    scope="module", params=[pytest.param("dds", marks=pytest.mark.slow), pytest.param("ros1", marks=pytest.mark.ros)]
)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as running:
        if request.param == "ros1":
            request.getfixturevalue("roscore")
        else:
            pytest.importorskip("cyclonedds", reason="needs the extra dds")
        bridge = running.enter_context(bridge_processes(folder, request.param, _SETTINGS))
        bridge.start("server")
        bridge.start("run")
        config = read_bridge_config(bridge.config)
        wire = open_wire(request.param, config, name="desk")
        running.callback(wire.close)
        yield Desk(request.param, config, wire, bridge)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("encoding", "camera/images: encoding '32FC1' is not known"),
        ("bytes", "camera/images: 767 bytes of data, but 16 rows of 48 bytes are 768"),
        ("size", "camera/images: image size changed from 16x16 to 16x8"),
        ("missing", "camera/rate: the last image came 2."),
        ("jump back", "camera/stamps: capture times jumped back by"),
    ],
)
def test_bad_images_end_the_flight_and_are_named(desk, fault, text):
    desk.fly()
    desk.topics.fault = fault
    desk.wait(lambda: desk.has(FLIGHT, text), "the diagnostic")
    desk.wait(desk.holds, "a hold")


def test_two_cameras_on_the_topic_end_the_flight_and_are_named(desk):
    desk.fly()
    arguments = [str(Path(__file__).with_name("second_camera.py")), desk.via, str(desk.bridge.config)]
    camera = subprocess.Popen([sys.executable, *arguments])
    try:
        desk.wait(lambda: desk.has(FLIGHT, "camera/publishers: 2 publishers on the camera topic"), "the diagnostic")
        desk.wait(desk.holds, "a hold")
    finally:
        camera.kill()
        camera.wait()


def test_odometry_that_is_not_finite_holds_until_it_is_good(desk):
    desk.fly()
    desk.topics.fault = "odometry"
    desk.wait(lambda: desk.has("setpoint/mode", "hold: odometry is not finite"), "the diagnostic")
    assert desk.holds()
    desk.topics.fault = ""
    desk.wait(lambda: not desk.has("setpoint/mode", "odometry"), "a mode that is well")


def test_an_unspoilt_flight_is_flown_to_its_end(desk):
    desk.topics.fault = ""
    flight = desk.flights.fly(_TASK)
    assert flight.is_flown
    # Roughly: while this machine stalls, the drone flies on with the setpoint that it has.
    assert flight.final_pose[0] == pytest.approx(240, abs=80)
    assert not is_flying(flight.outcome)
