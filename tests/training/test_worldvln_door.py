"""WorldVLN's simulator protocol: the recorded rollout as recorded, and refusals that move nothing."""

import base64
import http.client
import io
import json
import math
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from worldvln_edge.poses import BodyOrder, integrate_actions
from worldvln_edge.tasks import SceneRef, Task, write_task
from worldvln_edge.training.environments.pool import PoolConfig
from worldvln_edge.training.environments.server import BackgroundEnvironmentServer, EnvironmentServerConfig
from worldvln_edge.training.sim.placed_object import CAR, PERSON, PlacedObject, with_object
from worldvln_edge.training.sim.scene import build_scene
from worldvln_edge.training.sim.simulator import Simulator

POSE = [100.0, -50.0, 200.0, 1.0, 30.0, -2.0]
FORWARD = [10.0, 0.0, 0.0, 0.0, 5.0, 0.0]
SCENE = SceneRef(family="rooms", seed=0)


class Service:
    """Calls of one client."""

    def __init__(self, order: BodyOrder = "trans_first", **config):
        self.background = BackgroundEnvironmentServer(
            EnvironmentServerConfig(
                pool=PoolConfig(per_process=2, order=order), image_hw=(24, 32), scene=SCENE, **config
            )
        )
        self.server = self.background.server

    def __enter__(self) -> "Service":
        self.background.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.background.__exit__()

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.bound_port, timeout=30)
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
        answer = connection.getresponse()
        result = answer.status, json.loads(answer.read())
        connection.close()
        return result

    def reset(self, **fields: object) -> tuple[int, dict]:
        return self.ask("POST", "/reset", {"session_id": "s", "prompt": "go", "initial_pose": POSE, **fields})

    def step(self, *actions: object, **fields: object) -> tuple[int, dict]:
        return self.ask("POST", "/step_actions", {"session_id": "s", "actions": list(actions), **fields})


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


def pixels(data_url: str, image_format: str = "jpeg") -> np.ndarray:
    head, _, data = data_url.partition(",")
    assert head == f"data:image/{image_format};base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.golden
def test_recorded_rollout_is_answered_as_recorded(golden, tmp_path):
    exchanges = json.loads((golden("protocol") / "simulator.json").read_text())["exchanges"]
    by_task = exchanges[-1]["response"]["body"]
    task = Task(instruction=by_task["instruction"], initial_pos=tuple(by_task["world_poses"][0]))
    write_task(task, tmp_path / by_task["task_json_name"])
    with Service(task_root=tmp_path, order="yaw_first") as service:
        for exchange in exchanges:
            request, expected = exchange["request"], exchange["response"]
            status, answer = service.ask(request["method"], request["path"], request.get("body"))
            wanted = {500: 409 if "mismatch" in str(expected["body"]) else 400}.get(
                expected["status"], expected["status"]
            )
            assert status == wanted, exchange["case"]
            assert answer.keys() >= expected["body"].keys(), exchange["case"]
            for key, value in expected["body"].items():
                if key == "images_base64":
                    assert [pixels(image).shape for image in answer[key]] == [(24, 32, 3)] * len(value)
                elif key == "world_poses":
                    assert np.allclose(answer[key], value, atol=1e-6), exchange["case"]
                else:
                    assert answer[key] == value, exchange["case"]


def test_rollout_of_three_segments_gives_forty_nine_poses(service):
    _, start = service.reset(seed=1, traj_id="t", video_path="", gt_pose_json="")
    poses, done = list(start["world_poses"]), []
    for segment in range(3):
        status, answer = service.step(*[FORWARD] * 16, segment_index=segment)
        assert (status, len(answer["images_base64"])) == (200, 16)
        poses += answer["world_poses"]
        done.append(answer["done"])
    assert done == [False, False, True]
    assert np.allclose(poses[1:], integrate_actions(np.array(POSE), np.array([FORWARD] * 48)))
    assert not np.array_equal(pixels(start["images_base64"][0]), pixels(answer["images_base64"][-1]))
    status, health = service.ask("GET", "/health/")
    assert (status, health["status"], health["active_session"], health["frame_index"]) == (200, "ok", "s", 49)
    assert (health["capacity"], health["free"], health["processes"]) == (2, 1, 1)
    assert answer["collided"] == [False] * 16


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([FORWARD, [1, 2, 3, 4, 5]], "each action must be a 6D list"),
        ([FORWARD, [1, 2, 3, 4, 5, "x"]], "each action must be a 6D list"),
        ([FORWARD, [1, 2, 3, 4, 5, True]], "each action must be a 6D list"),
        ([FORWARD, [1e300, 0, 0, 0, 0, 0]], "each action must be a 6D list"),
        ([FORWARD] * 257, "at most 256 actions a call, found 257"),
    ],
)
def test_refused_actions_do_not_move_the_drone(service, actions, message):
    service.reset()
    assert service.step(*actions) == (400, {"error": message})
    assert np.allclose(service.step(FORWARD)[1]["world_poses"], integrate_actions(np.array(POSE), np.array([FORWARD])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"session_id": 5}, "session_id must be text"),
        ({"initial_pose": [1, 2, 3]}, "initial_pose must be 6 finite numbers (cm, deg)"),
        ({"initial_pose": "here"}, "initial_pose must be 6 finite numbers (cm, deg)"),
        ({"max_frames": -1}, "max_frames must be an integer from 0 to 1000000"),
        ({"task_id": "../x"}, "task_id must be 1 to 128 of A-Z a-z 0-9 . _ - and not start with a dot"),
        ({"task_id": ".x"}, "task_id must be 1 to 128 of A-Z a-z 0-9 . _ - and not start with a dot"),
        ({"task_json_path": "/etc/passwd"}, "task_json_path is outside of the folder of tasks"),
        ({"obj_info": 1}, "obj_info must be an object"),
        ({"obj_info": {"use_obj": 1, "obj_id": 0}}, "obj_pos and obj_rot must be 3 finite numbers each"),
        (
            {"obj_info": {"use_obj": 3, "obj_id": 0, "obj_pos": [0, 0, 0]}},
            "use_obj must be 1 (a person) or 2 (a car), found 3",
        ),
    ],
)
def test_refused_reset_leaves_the_active_session(service, fields, message):
    service.reset()
    assert service.reset(**fields) == (400, {"error": message})
    assert service.step(FORWARD)[0] == 200


def test_task_file_gives_scene_pose_and_instruction(tmp_path):
    task = Task(instruction="turn left", initial_pos=tuple(POSE), scene=SceneRef(family="city", seed=3))
    write_task(task, tmp_path / "t.json")
    (tmp_path / "broken.json").write_text("{")
    write_task(
        Task(instruction="go", initial_pos=tuple(POSE), scene=SceneRef(family="sea", seed=0)), tmp_path / "u.json"
    )
    with Service(task_root=tmp_path, image_format="png") as service:
        status, answer = service.ask("POST", "/reset", {"session_id": "s", "task_id": "t"})
        assert (status, answer["instruction"], answer["world_poses"]) == (200, "turn left", [POSE])
        with Simulator.for_task(task, image_hw=(24, 32)) as simulator:  # png is exact
            assert np.array_equal(pixels(answer["images_base64"][0], "png"), simulator.reset(POSE))
        by_path = service.reset(prompt=None, initial_pose=None, task_json_path=str(tmp_path / "t.json"))
        assert (by_path[0], by_path[1]["task_json_name"]) == (200, "t.json")
        assert by_path[1]["images_base64"] == answer["images_base64"]
        assert service.reset()[1]["images_base64"] != answer["images_base64"]  # the scene of tasks that name none
        status, answer = service.reset(task_id="broken")
        assert (status, answer["error"].startswith("broken.json: not JSON")) == (400, True)
        assert "unknown scene family 'sea'" in service.reset(task_id="u")[1]["error"]


def test_object_of_the_request_stands_in_the_scene(service):
    _, empty = service.reset()
    ahead = [100 + 400 * math.cos(math.radians(30)), -50 + 400 * math.sin(math.radians(30)), 100.0]
    _, occupied = service.reset(obj_info={"use_obj": 1, "obj_id": 19, "obj_pos": ahead, "obj_rot": [0, 0, 0]})
    assert empty["images_base64"] != occupied["images_base64"]
    _, absent = service.reset(obj_info={"use_obj": 0, "obj_id": 0, "obj_pos": ahead})
    assert absent["images_base64"] == empty["images_base64"]


def test_car_stands_on_the_ground_and_turns_by_quarters():
    scene = build_scene("rooms", 0)
    car = with_object(scene, PlacedObject(kind=CAR, look=1, position_cm=(100, 200, 90), yaw_deg=80)).solids[-1]
    assert (car.base_m, car.size_m) == ((1.0, 2.0, 0.0), (1.8, 4.4, 1.5))
    person = with_object(scene, PlacedObject(kind=PERSON, look=1, position_cm=(0, 0, 90))).solids[-1]
    assert person.base_m == (0.0, 0.0, 0.9)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "payload is not JSON"),
        (b'{"x": NaN}', 400, "payload is not JSON"),
        (b"\xff", 400, "payload is not JSON"),
        (b"[" * 10_000, 400, "payload is not JSON"),
    ],
)
def test_bad_body_is_refused(service, body, status, message):
    assert service.ask("POST", "/reset", body) == (status, {"error": message})


@pytest.mark.parametrize("way", ["killed", "lease"])
def test_session_whose_drone_is_gone_says_so_and_is_begun_again(service, way):
    service.reset()
    if way == "killed":
        os.kill(service.server.pool.pids[0], signal.SIGKILL)
        status, answer = service.step(FORWARD)
        assert status == 500
        assert "was killed by signal 9" in answer["error"]
        assert answer["error"].endswith("(call /reset)")
    else:
        service.server._leased.close(["worldvln"])
    assert service.step(FORWARD) == (400, {"error": "no active session; call /reset first"})
    assert service.reset()[0] == 200
    assert service.step(FORWARD)[0] == 200


def test_session_finds_no_room_when_every_environment_is_lent(service):
    service.server._leased.close(["worldvln"])
    others = {f"other-{i}": Task(instruction="go", initial_pos=tuple(POSE), scene=SCENE) for i in range(2)}
    assert service.server.pool.create(others, image_hw=(8, 8)) == {}
    status, answer = service.reset()
    assert (status, answer["error"].startswith("1 environments were asked for and 0 of 2 are free")) == (409, True)
    service.server.pool.close(list(others))
    assert service.reset()[0] == 200
