"""The same frames, prompt and seed give the same actions through every door (spec/session_protocol.md 9, 3)."""

import base64
import io
import itertools
from typing import Any

import numpy as np
import pytest
from http_calls import HttpCalls
from openpi_calls import PolicyClient
from PIL import Image

from worldvln_edge.client import SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

PROMPT, SEED = "fly to the red tower", 11


@pytest.fixture(scope="module")
def policy(tiny_bundle) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, backend="cpu", threads=1)


@pytest.fixture(scope="module")
def points(policy) -> tuple[int, ...]:
    return policy.info.horizon.points


@pytest.fixture(scope="module")
def frames(points) -> np.ndarray:
    """The whole trajectory: uint8 [F, 24, 32, 3]."""
    return np.random.default_rng(3).integers(0, 256, (points[-1], 24, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def server(policy):
    with BackgroundServer(policy, zmq=ZmqConfig(endpoints=("tcp://127.0.0.1:*",))) as server:
        yield server


def fly_natively(server: BackgroundServer, groups: list[np.ndarray], **options: Any) -> np.ndarray:
    """All actions of a flight over the native protocol: float32 [F-1, 6]."""
    with SessionClient(options.pop("url", server.url), frame_format="rgb8", **options) as client:
        client.start(PROMPT, seed=SEED)
        answers = [client.observe(group) for group in groups]
    assert [answer.segment for answer in answers if answer.segment >= 0] == [0, 1, 2]
    return np.concatenate([answer.actions for answer in answers if answer.segment >= 0])


@pytest.fixture(scope="module")
def expected(server, points, frames) -> np.ndarray:
    return fly_natively(server, np.split(frames[: points[2]], points[:2]))


@pytest.fixture(scope="module")
def expected_one_by_one(server, frames, expected) -> np.ndarray:
    actions = fly_natively(server, np.split(frames, len(frames)))
    assert actions.shape == (len(frames) - 1, 6)
    assert np.allclose(actions, expected, atol=1e-3)  # the same but for the rounding of smaller batches
    return actions


def as_text(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def http_flight(name: str, texts: list[str], points: tuple[int, ...]) -> list[tuple[list[str], dict]]:
    """Images and flags of every call."""
    steps = [texts[start:end] for start, end in itertools.pairwise((0, *points))]
    return {
        "closed loop": [(images, {"allow_future_segments": True}) for images in steps],
        "stream": [(images, {}) for images in steps],
        "one by one": [([text], {"allow_future_segments": True}) for text in texts],
        "prefix": [
            (texts[:count], {"prefix_mode": True, "allow_future_last_segment": True})
            for count in (*points[:3], points[2])
        ],
        "all at once": [(texts, {}), (texts[:1], {}), (texts[:1], {})],
    }[name]


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
@pytest.mark.parametrize("transport", ["websocket", "zmq"])
def test_every_native_transport_and_encoding_gives_the_same_actions(
    server, points, frames, expected, transport, encoding
):
    url = server.url if transport == "websocket" else server.server.zmq_urls[0]
    actions = fly_natively(server, np.split(frames[: points[2]], points[:2]), url=url, encoding=encoding)
    assert np.isfinite(actions).all()
    assert np.array_equal(actions, expected)


@pytest.mark.parametrize("name", ["closed loop", "stream", "one by one", "prefix", "all at once"])
def test_http_gives_the_native_actions(server, points, frames, expected, expected_one_by_one, name):
    texts = [as_text(frame) for frame in frames]
    start = {"instruction": PROMPT, "seed": SEED}
    with HttpCalls(server, name) as calls:
        answers = [
            calls.fly(images, **flags, **(start if index == 0 else {}))
            for index, (images, flags) in enumerate(http_flight(name, texts, points))
        ]
    actions = np.float32([row for answer in answers for row in answer["actions"]])
    assert [answer["segment_index"] for answer in answers if answer["actions"]] == [0, 1, 2]
    assert np.array_equal(actions, expected_one_by_one if name == "one by one" else expected)


def test_openpi_gives_the_native_actions_segment_by_segment(server, points, frames, expected):
    with PolicyClient(server) as client:
        groups = np.split(frames[: points[2]], points[:2])
        results = [client.ask(images=group, prompt=PROMPT, seed=SEED) for group in groups]
    assert np.array_equal(np.concatenate([result["actions"] for result in results]), expected)


def test_openpi_gives_the_native_actions_step_by_step(server, frames, expected_one_by_one):
    with PolicyClient(server) as client:
        results = [client.ask(image=frame, prompt=PROMPT, seed=SEED, reply="step") for frame in frames[:-1]]
    assert all(result["actions"].shape == (1, 6) for result in results)
    assert [result["done"] for result in results] == [False] * (len(frames) - 2) + [True]
    assert np.array_equal(np.concatenate([result["actions"] for result in results]), expected_one_by_one)


@pytest.mark.parametrize("change", ["seed", "negative prompt"])
def test_what_a_later_call_changes_counts_for_the_segments_still_to_come(policy, points, frames, change):
    later = {"seed": SEED + 1} if change == "seed" else {"negative_prompt": "fog"}
    changed = policy.new_session(PROMPT, seed=SEED)
    from_the_start = policy.new_session(PROMPT, **{"seed": SEED, **later})
    unchanged = policy.new_session(PROMPT, seed=SEED)
    flights = []
    for session in (changed, from_the_start, unchanged):
        first = session.observe(frames[:1]).actions
        session.work_ahead()
        if session is changed:
            session.set_seed(later.get("seed", SEED))
            session.set_negative_prompt(later.get("negative_prompt", ""))
        flights.append((first, session.observe(frames[1 : points[1]]).actions))
        session.close()
    assert np.array_equal(flights[0][0], flights[2][0])
    assert np.array_equal(flights[0][1], flights[1][1])
    assert not np.array_equal(flights[0][1], flights[2][1])
