"""Held-out tasks through real topics: camera in, setpoints out, four processes, and the shipped model.

On simulated time the flights are those of the direct client on the same seeds, wherever they end; in real time the
real-time factor is printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="flies the shipped model, which needs the extra cpu")
pytest.importorskip("mujoco", reason="flies in the simulator, which needs the extra sim")

from bridge_processes import free_port

from worldvln_edge.client import ServerUnreachableError, SessionClient
from worldvln_edge.tasks import write_task_list
from worldvln_edge.training.evaluation.bundle_source import ensure_bundle
from worldvln_edge.training.evaluation.closed_loop import FlownFlight, SceneSimulators, ServerPilot, fly_task
from worldvln_edge.training.sim.tasks import generate_task, score_flight

_ROOT = Path(__file__).parents[2]
_TASKS = 4
_START_S = 180.0
# 32 setpoints a second are two for each action, and on simulated time nothing limits them: then frames are taken where
# the actions end.
_CONFIG = """
[limits]
geofence_min_m = [-500, -500, -10]
geofence_max_m = [500, 500, 100]
min_height_m = 0.1
max_speed_m_s = 20
max_climb_m_s = 20
max_descent_m_s = 20
max_yaw_rate_rad_s = 20
max_acceleration_m_s2 = {acceleration}
max_yaw_acceleration_rad_s2 = {acceleration}

[server]
url = "ws://127.0.0.1:{server}"
frame_format = "rgb8"
answer_timeout_s = 120

[setpoint]
rate_hz = 32
{setpoint}
[dds]
domain_id = {domain}
network_interface = "lo"

[topics]
use_sim_time = {simulated}
lockstep = {simulated}
"""
# In real time, for machines under load: nothing that is merely late ends the flight.
_PATIENT = """stale_after_s = 50

[camera]
missing_after_s = 5

[frame_clock]
max_skew_s = 0.5

[odometry]
stale_after_s = 2
memory_s = 55

"""


@dataclass
class Services:
    """Model and simulator, served; `direct`: what the direct client flew."""

    folder: Path
    server_port: int
    simulator_port: int
    direct: list[FlownFlight]

    def config(self, name: str, *, simulated: bool) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(
            _CONFIG.format(
                server=self.server_port,
                domain=101 + free_port() % 100,
                simulated=str(simulated).lower(),
                setpoint="" if simulated else _PATIENT,
                acceleration=99 if simulated else 3,
            )
        )
        return path

    def fly(self, via: str, config: Path, count: int) -> list[dict]:
        """What `ros simulate --json` prints, with `ros run` beside it."""
        log = config.with_suffix(".log")
        simulate = ["--via", via, "--config", str(config), "--simulator", f"http://127.0.0.1:{self.simulator_port}"]
        simulate += ["--tasks", str(self.folder / "tasks.json"), "--count", str(count), "--image-size", "64", "--json"]
        with _started(["ros", "run", "--via", via, "--config", str(config)], log):
            done = subprocess.run(
                [sys.executable, "-m", "worldvln_edge", "ros", "simulate", *simulate],
                stdout=subprocess.PIPE,
                check=False,
            )
        assert done.returncode == 0, log.read_text()
        return json.loads(done.stdout)


def _started(arguments: list[str], log: Path) -> ExitStack:
    """A process that ends with the `with`."""
    running = ExitStack()
    output = running.enter_context(log.open("wb"))
    process = subprocess.Popen([sys.executable, "-m", "worldvln_edge", *arguments], stdout=output, stderr=output)
    running.callback(process.wait, 60)
    running.callback(process.terminate)
    return running


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder, bundle = tmp_path_factory.mktemp("services"), _ROOT / "runs/bench/bundle"
    ensure_bundle(_ROOT / "worldvln_edge/checkpoints/nano", bundle)
    tasks = [generate_task("test", index) for index in range(_TASKS)]
    write_task_list(tasks, folder / "tasks.json")
    server, simulator = free_port(), free_port()
    with (
        _started(["serve", str(bundle), "--ws", f"127.0.0.1:{server}"], folder / "serve.log"),
        _started(["sim", "serve", "--port", str(simulator)], folder / "sim.log"),
        ExitStack() as flying,
    ):
        client = flying.enter_context(_connected(f"ws://127.0.0.1:{server}", folder / "serve.log"))
        simulators = flying.enter_context(SceneSimulators((64, 64)))
        direct = [fly_task(task, ServerPilot(client), simulators.for_task(task), seed=0) for task in tasks]
        yield Services(folder, server, simulator, direct)


def _connected(url: str, log: Path) -> SessionClient:
    give_up_s = time.monotonic() + _START_S
    while True:
        try:
            return SessionClient(url, frame_format="rgb8").__enter__()
        except ServerUnreachableError:
            assert time.monotonic() < give_up_s, log.read_text()
            time.sleep(0.5)


@pytest.fixture(
    scope="module", params=[pytest.param("dds", marks=pytest.mark.slow), pytest.param("ros1", marks=pytest.mark.ros)]
)
def via(request: pytest.FixtureRequest) -> str:
    if request.param == "ros1":
        request.getfixturevalue("roscore")
    else:
        pytest.importorskip("cyclonedds", reason="needs the extra dds")
    return request.param


def test_on_simulated_time_flights_are_those_of_the_direct_client(services, via):
    flights = services.fly(via, services.config(f"{via}-simulated", simulated=True), _TASKS)
    for flight, direct in zip(flights, services.direct, strict=True):
        assert flight["is_flown"], flight
        pose = np.array(flight["final_pose"])
        score = score_flight(direct.task, pose[None], flight["collided"])
        assert flight["success"] == score.success == direct.score.success
        assert pose[:3] == pytest.approx(direct.poses[-1, :3], abs=5)  # cm
        assert pose[4] == pytest.approx(direct.poses[-1, 4], abs=1)
        print(f"{via}: {flight['task_id']} {flight['success']}, real-time factor {flight['real_time_factor']:.2f}")


def test_in_real_time_a_task_is_flown_to_its_end(services, via):
    (flight,) = services.fly(via, services.config(f"{via}-real", simulated=False), 1)
    assert flight["is_flown"], flight
    assert 0 < flight["real_time_factor"] <= 1.02
    distance_cm = np.linalg.norm(np.array(flight["final_pose"][:3]) - services.direct[0].poses[0, :3])
    assert distance_cm > 100  # of an instruction to fly 5 m
    print(f"{via}: real time, success {flight['success']}, real-time factor {flight['real_time_factor']:.2f}")
