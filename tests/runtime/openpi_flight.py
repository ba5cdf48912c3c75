"""A program for an environment that has openpi-client and nothing of ours: flies both reply modes, prints what it saw.

python openpi_flight.py HOST PORT
"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def pixels(index: int) -> np.ndarray:
    return np.full((8, 8, 3), index, np.uint8)


def fly_segments(policy: WebsocketClientPolicy) -> dict:
    results, start = [], 0
    for count in (1, 16, 16):
        frames = np.stack([pixels(index) for index in range(start, start + count)])
        results.append(policy.infer({"images": frames, "prompt": "go", "seed": np.int64(5)}))
        start += count
    return {
        "actions": np.concatenate([result["actions"] for result in results]).tolist(),
        "done": [result["done"] for result in results],
        "dtype": str(results[0]["actions"].dtype),
        "prev_total_ms": results[1]["server_timing"]["prev_total_ms"],
    }


def refused(policy: WebsocketClientPolicy, **observation: object) -> str:
    try:
        policy.infer(observation)
    except RuntimeError as error:
        return str(error)
    return ""


class Camera(Environment):
    """Shows one frame after the other until the flight is done."""

    def __init__(self) -> None:
        self.actions: list = []
        self.is_done = False

    def reset(self) -> None:
        pass

    def is_episode_complete(self) -> bool:
        return self.is_done

    def get_observation(self) -> dict:
        return {
            "observation/image": pixels(len(self.actions)),
            "observation/state": np.zeros(7),
            "prompt": "go",
            "reply": "step",
            "seed": 5,
        }

    def apply_action(self, action: dict) -> None:
        self.actions.append(np.asarray(action["actions"]).reshape(-1).tolist())
        self.is_done = bool(action["done"])


def fly_steps(policy: object) -> list:
    camera = Camera()
    Runtime(camera, PolicyAgent(policy), [], max_episode_steps=60).run()
    return camera.actions


def main() -> None:
    host, port = sys.argv[1], int(sys.argv[2])
    first = WebsocketClientPolicy(host, port)
    report = {
        "metadata": first.get_server_metadata()["protocol"],
        "refused_first": refused(first, image=pixels(0)),
        "refused_image": refused(first, image=pixels(0).astype(np.float32), prompt="go"),
        "segments": fly_segments(first),
        "steps": fly_steps(WebsocketClientPolicy(f"ws://{host}:{port}/openpi")),
        "broker": fly_steps(ActionChunkBroker(WebsocketClientPolicy(host, port), action_horizon=1)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
