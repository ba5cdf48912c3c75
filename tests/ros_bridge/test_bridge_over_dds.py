"""The bridge's processes over real DDS: a flight, and what happens when something dies. Bounds are loose here, for
machines under load; `worldvln-edge ros bench` prints the figures."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cyclonedds", reason="needs the extra dds")
pytest.importorskip("starlette", reason="flies against a server, which needs the extra serve")

from bridge_processes import BridgeProcesses, bridge_processes

from worldvln_edge.ros_bridge.bench.desk_drone import DeskDrone
from worldvln_edge.ros_bridge.bridge_config import DdsConfig
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

_HOLD_S, _SILENT_S = 0.4, 1.2


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[BridgeProcesses]:
    with bridge_processes(tmp_path) as processes:
        processes.start("server")
        processes.start("setpoints")
        while not (tmp_path / "setpoints.sock").is_socket():
            assert processes.processes["setpoints"].poll() is None, processes.log("setpoints")
            time.sleep(0.02)
        processes.start("policy")
        yield processes


@pytest.fixture
def drone(bridge: BridgeProcesses) -> Iterator[DeskDrone]:
    with DeskDrone(DdsConfig(domain_id=bridge.domain_id, network_interface="lo"), TopicsConfig()) as drone:
        yield drone


def test_an_instruction_is_flown_to_its_end(bridge, drone):
    drone.instruct("Fly ahead.")
    drone.wait(lambda: "flown: Fly ahead." in bridge.log("policy"), what="the end of the flight")
    assert drone.position[0] == pytest.approx(2.4, abs=0.3)  # 48 actions of 5 cm
    drone.wait(lambda: drone.setpoints[-1].speed == 0, what="a hold at the end")
    drone.wait(lambda: drone.checks.get("worldvln/setpoint/mode", (9, ""))[0] == 0, what="a check that is well")


@pytest.mark.parametrize("victim", ["policy", "server"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_when_policy_or_server_dies_the_drone_holds_and_setpoints_stop(bridge, drone, victim, blow):
    drone.fly("Fly ahead.")
    bridge.processes[victim].send_signal(blow)
    struck_s = time.monotonic()
    time.sleep(2)
    assert drone.hold_after(struck_s) < _HOLD_S
    assert drone.setpoints[-1].at_s - struck_s < _SILENT_S
    assert drone.setpoints[-1].speed == 0
    if blow == signal.SIGSTOP:
        bridge.processes[victim].kill()
    bridge.processes[victim].wait()
    bridge.start(victim)
    drone.wait(lambda: time.monotonic() - drone.setpoints[-1].at_s < 0.2, what="setpoints again")
    drone.fly("Fly on.")


def test_a_camera_that_falls_silent_ends_the_flight_and_is_named(bridge, drone):
    drone.fly("Fly ahead.")
    drone.has_camera = False
    drone.wait(lambda: "camera/rate: the last image came" in bridge.log("policy"), what="the missing camera")
    drone.wait(lambda: drone.setpoints[-1].speed == 0, what="a hold")


def test_stop_ends_the_flight(bridge, drone):
    drone.fly("Fly ahead.")
    drone.command("stop")
    drone.wait(lambda: drone.setpoints[-1].speed == 0, "a hold", 2)
    drone.wait(lambda: "the flight was stopped" in bridge.log("policy"), what="the end of the flight")


def test_when_ros_run_is_killed_its_processes_end(tmp_path):
    with bridge_processes(tmp_path) as processes:
        run = processes.start("run")
        children: list[Path] = []
        give_up_s = time.monotonic() + 60
        while len(children) < 2:
            assert time.monotonic() < give_up_s, processes.log("run")
            time.sleep(0.05)
            children = [
                Path("/proc", pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            ]
        run.kill()
        while any("worldvln" in _command(child) for child in children):
            assert time.monotonic() < give_up_s, processes.log("run")
            time.sleep(0.05)
        assert "the process that started this one has ended, so setpoints end" in processes.log("run")


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_two_cameras_on_the_topic_are_named(bridge, drone):
    drone.add_camera()
    drone.wait(
        lambda: "2 publishers on the camera topic" in drone.checks.get("worldvln/camera/publishers", (0, ""))[1],
        "the diagnostic of two publishers",
    )
