"""The recorded calls of the compatible HTTP API and of openpi's protocol, one by one, against a running server."""

import http.client
import json

import msgspec
import numpy as np
import pytest
from websockets.sync.client import connect

from worldvln_edge.runtime.doors.openpi_codec import encode_map
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

REFERENCE_KEYS = ("segment_index", "num_received_frames", "prefix_latents", "done", "used_prompt")
QUOTED = {400, 413, 415}  # statuses whose detail texts the specification quotes


def ask(port: int, request: dict) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = request.get("body_text", json.dumps(request["body"]) if "body" in request else None)
    connection.request(request["method"], request["path"], body, request.get("headers", {}))
    answer = connection.getresponse()
    result = answer.status, json.loads(answer.read())
    connection.close()
    return result


FLIGHTS = ("closed_loop", "default_mode", "prefix_mode", "partial_and_reset", "all_at_once", "errors")
# Replayed by test_native_golden.py (and test_zmq_flight.py), tests/training/test_worldvln_door.py and below.
REPLAYED_ELSEWHERE = ("native_flight", "health", "simulator", "openpi_frames")


@pytest.mark.golden
def test_no_recording_is_left_out(golden):
    assert {path.stem for path in golden("protocol").glob("*.json")} == {*FLIGHTS, *REPLAYED_ELSEWHERE}


@pytest.mark.golden
@pytest.mark.parametrize("name", FLIGHTS)
def test_recorded_calls_are_answered_as_recorded(golden, name):
    exchanges = json.loads((golden("protocol") / f"{name}.json").read_text())["exchanges"]
    assert exchanges
    with BackgroundServer(NullPolicy()) as server:
        for index, exchange in enumerate(exchanges):
            case = exchange.get("case", index)
            expected = exchange["response"]
            status, answer = ask(server.server.bound_port, exchange["request"])
            assert status == expected["status"], (case, answer)
            if status == 200:
                assert {key: answer[key] for key in REFERENCE_KEYS} == {
                    key: expected["body"][key] for key in REFERENCE_KEYS
                }, case
                assert [len(row) for row in answer["actions"]] == [len(row) for row in expected["body"]["actions"]]
                continue
            assert answer.get("code") == expected["body"].get("code"), case
            if status == 422:
                locations = [problem["loc"] for problem in answer["detail"]]
                assert locations == [problem["loc"] for problem in expected["body"]["detail"]], case
            elif status in QUOTED or "code" not in expected["body"]:
                assert answer == expected["body"], case


def plain(value: object) -> object:
    """A decoded frame as the recording writes it: arrays as {ndarray, dtype, shape}."""
    if not isinstance(value, dict):
        return value
    if b"__ndarray__" in value:
        array = np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])
        return {"ndarray": array.tolist(), "dtype": value[b"dtype"], "shape": list(array.shape)}
    return {key: plain(item) for key, item in value.items()}


@pytest.mark.golden
def test_recorded_openpi_frames_are_answered_as_recorded(golden):
    frames = json.loads((golden("protocol") / "openpi_frames.json").read_text())["frames"]
    with BackgroundServer(NullPolicy()) as server, connect(server.url.replace("v1/session", "openpi")) as socket:
        for frame in frames:
            if frame["from"] == "client":
                socket.send(bytes.fromhex(frame["hex"]))
                continue
            answer = socket.recv(timeout=5)
            if frame["frame"] == "text":
                assert answer == frame["text"], frame["note"]
                continue
            assert isinstance(answer, bytes), answer
            found, expected = plain(msgspec.msgpack.decode(answer)), frame["value"]
            assert found.keys() == expected.keys(), frame["note"]
            if "actions" in expected:
                shapes = [(value["actions"]["dtype"], value["actions"]["shape"]) for value in (found, expected)]
                assert shapes[0] == shapes[1], frame["note"]
                assert found["server_timing"].keys() == expected["server_timing"].keys()
                binding = expected.keys() - {"actions", "server_timing"}
            else:
                assert expected["limits"].items() <= found["limits"].items()
                binding = expected.keys() - {"limits", "model"}
            assert {key: found[key] for key in binding} == {key: expected[key] for key in binding}, frame["note"]


@pytest.mark.golden
def test_results_are_encoded_byte_for_byte_as_recorded(golden):
    frames = json.loads((golden("protocol") / "openpi_frames.json").read_text())["frames"]
    results = [frame for frame in frames if frame["from"] == "server" and frame["frame"] == "binary"]
    assert len(results) >= 4
    for frame in results:
        value = dict(frame["value"])
        if "actions" in value:
            value["actions"] = np.array(value["actions"]["ndarray"], value["actions"]["dtype"]).reshape(
                value["actions"]["shape"]
            )
        assert encode_map(value).hex() == frame["hex"], frame["note"]
