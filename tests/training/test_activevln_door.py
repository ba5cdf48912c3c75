"""ActiveVLN's client against the environment server: its routes, its bodies, and our world behind them."""

import base64
import http.client
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from worldvln_edge.poses import integrate_actions
from worldvln_edge.tasks import SceneRef, Task, write_task
from worldvln_edge.training.environments.pool import PoolConfig
from worldvln_edge.training.environments.server import BackgroundEnvironmentServer, EnvironmentServerConfig
from worldvln_edge.training.sim.simulator import Simulator
from worldvln_edge.training.sim.tasks import generate_task

HW = (24, 32)
START = (-100.0, 0.0, 200.0, 0.0, 0.0, 0.0)
GOAL = (200.0, 0.0, 200.0, 0.0, 0.0, 0.0)
TASK = Task(
    instruction="Fly forward three meters and stop.",
    initial_pos=START,
    end_pos=GOAL,
    reference_path_raw=tuple((x, 0.0, 200.0, 0.0, 0.0, 0.0) for x in np.linspace(-100.0, 200.0, 49).tolist()),
    scene=SceneRef(family="rooms", seed=0),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("episodes")
    write_task(TASK, folder / "7.json")
    write_task(Task(instruction="go", initial_pos=START, scene=TASK.scene), folder / "rxr-8.json")
    config = EnvironmentServerConfig(pool=PoolConfig(per_process=6), activevln_image_hw=HW, task_root=folder)
    with BackgroundEnvironmentServer(config) as server:
        yield server.url


def post(url: str, path: str, **body: object) -> tuple[int, dict]:
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    line.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = line.getresponse()
    result = answer.status, json.loads(answer.read())
    line.close()
    return result


def wish(**config: object) -> dict:
    """As the published trainer writes it."""
    return {
        "env_name": "vlnce",
        "env_config": {
            "env_name": "vlnce",
            "prompt_format": "no_think_no_tag",
            "max_actions_per_step": 3,
            "action_sep": ",",
            "image_placeholder": "<image>",
            "special_token_list": ["<|im_end|>"],
            "episode_id": 7,
            "history_actions": [],
            "data_source": "r2r",
            "action_space": "r2r",
            "step_budget": 10,
            "turn_budget": 40,
            "reward_type": "weighted_success_ndtw",
            "success_reward_base": 15.0,
            "ndtw_reward_base": 0.0,
            "format_reward": 0,
            "experiment_name": "x",
            "save_as_video": False,
            **config,
        },
    }


def picture(observation: dict) -> np.ndarray:
    (image,) = observation["multi_modal_data"]["<image>"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["__pil_image__"]))))


def frame_after(actions_N6: np.ndarray) -> np.ndarray:
    with Simulator.for_task(TASK, image_hw=HW) as simulator:
        frame = simulator.reset(START)
        for action in actions_N6:
            frame = simulator.step(action).frame
    return frame


def test_client_flies_a_batch_from_creation_to_success(url):
    history = ["move forward 75cm", "turn left 15 degrees", "turn right 15 degrees", "move forward 25cm"]
    wishes = {"a": wish(), "b": wish(history_actions=history, success_reward_base=10.0, ndtw_reward_base=5.0)}
    assert post(url, "/batch/warmup", cfgs=[wishes["a"]["env_config"]]) == (200, {"success": True})
    assert post(url, "/environments", ids2configs=wishes) == (200, {"success": True})
    status, answer = post(url, "/batch/reset", ids2seeds={"a": 42, "b": 42})
    assert status == 200
    (first,), nothing = answer["results"]["a"]
    assert nothing == {}
    assert first["obs_str"].startswith(f"[Initial Observation]:\n<image>\nInstruction: {TASK.instruction}\n")
    assert np.array_equal(picture(first), frame_after(np.zeros((0, 6))))
    shown, _ = answer["results"]["b"]
    assert [each.get("response") for each in shown] == [None, ", ".join(history[:3]), "move forward 25cm"]
    flown = np.zeros((6, 6))
    flown[[0, 1, 2, 5], 0], flown[3, 4], flown[4, 4] = 25, -15, 15
    assert np.allclose(integrate_actions(np.array(START), flown)[-1], (0, 0, 200, 0, 0, 0))
    assert np.array_equal(picture(shown[-1]), frame_after(flown))

    turns = {"a": "move forward 75cm, move forward 75cm, move forward 75cm<|im_end|>", "b": "move forward 75cm"}
    status, answer = post(url, "/batch/step", ids2actions=turns)
    observation, reward, done, info = answer["results"]["a"]
    assert (reward, done, info["end_reason"], info["env_local_step"]) == (0.0, False, "", 3)
    assert info["distance_to_goal"] == pytest.approx(0.75)
    assert info["actions"] == ["move forward 75cm"] * 3
    assert observation["obs_str"].startswith("After that, the observation is:\n<image>\n")
    forward = np.zeros((9, 6))
    forward[:, 0] = 25
    assert np.array_equal(picture(observation), frame_after(forward))

    status, answer = post(
        url, "/batch/step", ids2actions={"a": "stop", "b": "move forward 75cm,move forward 50cm,stop"}
    )
    _, reward, done, info = answer["results"]["a"]
    assert (reward, done, info["task_success"]) == (pytest.approx(15 * 0.75), True, True)
    _, reward, done, info = answer["results"]["b"]
    assert (done, info["end_reason"]) == (True, "successfully reached the goal.")
    assert (info["env_local_step"], info["env_global_step"], info["global_start_step"]) == (4, 8, 4)
    assert info["reward_components"]["success_reward"] == pytest.approx(10.0)  # it stands on the goal
    assert info["reward_components"]["ndtw_reward"] == pytest.approx(5.0)  # and went where the expert went
    assert post(url, "/batch/close", env_ids=["a", "b"]) == (200, {"status": "success"})


def test_equal_environments_are_reset_instead_of_made_again(url):
    post(url, "/environments", ids2configs={"a": wish()})
    post(url, "/batch/reset", ids2seeds={"a": 0})
    post(url, "/batch/step", ids2actions={"a": "move forward 75cm, stop"})
    post(url, "/environments", ids2configs={"a": wish(step_budget=0)})
    (first,), _ = post(url, "/batch/reset", ids2seeds={"a": 0})[1]["results"]["a"]
    assert np.array_equal(picture(first), frame_after(np.zeros((0, 6))))
    _, _, done, info = post(url, "/batch/step", ids2actions={"a": "move forward 25cm"})[1]["results"]["a"]
    assert (done, info["end_reason"]) == (True, "number of steps exceeded.")
    post(url, "/batch/close", env_ids=["a"])


def test_episode_without_a_file_is_a_task_of_the_generator(url):
    post(url, "/environments", ids2configs={"g": wish(episode_id=3)})
    (first,), _ = post(url, "/batch/reset", ids2seeds={"g": 0})[1]["results"]["g"]
    assert f"Instruction: {generate_task('train', 3).instruction}\n" in first["obs_str"]
    post(url, "/batch/close", env_ids=["g"])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/environments", "ids2configs"),
        ("/batch/reset", "ids2seeds"),
        ("/batch/step", "ids2actions"),
        ("/batch/close", "env_ids"),
        ("/batch/warmup", "cfgs"),
    ],
)
def test_missing_or_misshapen_parameter_is_400(url, path, name):
    assert post(url, path) == (400, {"error": f"Missing required parameter: {name}"})
    status, answer = post(url, path, **{name: 1})
    assert (status, answer["error"].startswith(f"{name} must be ")) == (400, True)


def test_more_environments_than_there_are_is_409_with_the_capacity(url):
    status, answer = post(url, "/environments", ids2configs={str(i): wish() for i in range(7)})
    assert status == 409
    assert answer["error"].startswith("7 environments were asked for and there are 6; nothing was done")
    assert post(url, "/batch/warmup", cfgs=[wish()["env_config"]] * 7) == (409, answer)
    assert post(url, "/environments", ids2configs={str(i): wish() for i in range(5)})[0] == 200
    status, answer = post(url, "/environments", ids2configs={"c": wish(), "d": wish()})
    assert status == 409
    assert answer["error"].startswith("2 environments were asked for and 1 of 6 are free; nothing was created")
    assert post(url, "/batch/close", env_ids=list("01234"))[0] == 200


def test_failing_environments_leave_the_batch_alone(url):
    wishes = {
        "ok": wish(),
        "name": {"env_name": "sokoban"},
        "format": wish(prompt_format="free_think"),
        "history": wish(history_actions=["stop"]),
        "number": wish(episode_id=-1),
        "goal": wish(episode_id=8, data_source="rxr"),
    }
    status, answer = post(url, "/environments", ids2configs=wishes)
    assert (status, answer["success"]) == (200, False)
    messages = {id: each["error"]["message"] for id, each in answer["errors"].items()}
    assert messages["name"] == 'env_name must be "vlnce"'
    assert messages["format"].startswith("Invalid enum value 'free_think'")
    assert messages["history"].startswith("history_actions must be moves of the r2r action space")
    assert messages["number"] == "episode_id must be 0 to 999999, found -1"
    assert messages["goal"] == 'episode 8 has no "end_pos", so it has no goal'
    results = post(url, "/batch/reset", ids2seeds={"ok": 0, "name": 0})[1]["results"]
    assert len(results["ok"]) == 2
    assert results["name"]["error"]["code"] == "unknown_environment"
    results = post(url, "/batch/step", ids2actions={"ok": 5, "goal": "stop"})[1]["results"]
    assert results["ok"]["error"] == {"code": "bad_action", "message": "an action must be text"}
    assert results["goal"]["error"]["code"] == "unknown_environment"
    post(url, "/batch/close", env_ids=["ok"])
