"""The client of the simulator's service: against the service itself, and against what is none."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import numpy as np
import pytest

from worldvln_edge.ros_bridge.simulation.simulated_drone import SimulatedDrone
from worldvln_edge.ros_bridge.simulation.simulator_client import SimulatorClient, SimulatorError
from worldvln_edge.tasks import SceneRef, Task

TASK = Task(
    task_id="t1", instruction="Fly.", initial_pos=(100, 200, 300, 0, 90, 0), scene=SceneRef(family="city", seed=0)
)


class _Answers(BaseHTTPRequestHandler):
    """Answers every request as its server says."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, body = self.server.answers.get(self.path, (404, b"<html>"))  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.answers = {"/v1/env/create": (200, msgspec.msgpack.encode({"failed": {}}))}  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _client(server: ThreadingHTTPServer) -> SimulatorClient:
    return SimulatorClient(f"http://127.0.0.1:{server.server_port}", (64, 64))


@pytest.mark.parametrize("url", ["127.0.0.1:8765", "https://host", "http://", "http://host/path"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(
        SimulatorError, match=r"is no address of a simulator; give one such as http://127\.0\.0\.1:8765"
    ):
        SimulatorClient(url, (64, 64))


def test_a_simulator_that_is_not_there_is_named():
    with pytest.raises(SimulatorError, match=r"no simulator answers at http://127\.0\.0\.1:9 .*start one with"):
        SimulatorClient("http://127.0.0.1:9", (64, 64)).reset(TASK)


@pytest.mark.parametrize(
    ("call", "status", "answer", "message"),
    [
        ("create", 404, b"<html>", "answered 404, but not as a simulator; it must be a `worldvln-edge sim serve`"),
        ("create", 401, {"error": {"message": "show a key"}}, "refused to create: show a key"),
        ("create", 500, {}, "refused to create: no reason was given"),
        ("reset", 200, {"results": {}}, "answered reset without a frame or a pose"),
    ],
)
def test_what_does_not_answer_as_a_simulator_is_named(server, call, status, answer, message):
    body = answer if isinstance(answer, bytes) else msgspec.msgpack.encode(answer)
    server.answers[f"/v1/env/{call}"] = (status, body)
    with pytest.raises(SimulatorError, match=message):
        _client(server).reset(TASK)


def test_a_task_that_cannot_be_flown_and_a_drone_that_fails_are_named(server):
    client = _client(server)
    fault = {"error": {"code": "bad_task", "message": "no such scene"}}
    server.answers["/v1/env/create"] = (200, msgspec.msgpack.encode({"failed": {client._id: fault}}))
    with pytest.raises(SimulatorError, match="cannot fly task 't1': no such scene"):
        client.reset(TASK)
    server.answers["/v1/env/step"] = (200, msgspec.msgpack.encode({"results": {client._id: fault}}))
    with pytest.raises(SimulatorError, match="failed: no such scene"):
        client.step(np.zeros(6))


@pytest.mark.slow
def test_setpoints_fly_in_the_simulator_itself():
    pytest.importorskip("mujoco", reason="flies in the simulator, which needs the extra sim")
    from worldvln_edge.training.environments.pool import PoolConfig
    from worldvln_edge.training.environments.server import BackgroundEnvironmentServer, EnvironmentServerConfig

    with BackgroundEnvironmentServer(EnvironmentServerConfig(pool=PoolConfig(per_process=1))) as server:
        client = SimulatorClient(server.url, (48, 64))
        drone = SimulatedDrone(client)
        drone.reset(TASK)
        assert drone.view.frame_HW3.shape == (48, 64, 3)
        # East is ahead of yaw 0; this drone looks to the right of that, so to the south.
        drone.fly(np.array([1.0, -2.0, 0.5, 0.1]), 0.5)
        assert drone.view.pose == pytest.approx([150, 300, 325, 0, 90 - np.degrees(0.05), 0], abs=1e-6)
        client.close()
