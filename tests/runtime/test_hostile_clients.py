"""Random bytes at every door of a running server: each is answered, nothing leaks, and a flight goes on meanwhile."""

import json
import socket as socketlib

import numpy as np
import pytest
from http_calls import HttpCalls, frame
from hypothesis import given, settings
from hypothesis import strategies as st
from openpi_calls import PolicyClient, pixels

from worldvln_edge.protocol import ERRORS
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.openpi_codec import encode_map
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

SOME = settings(max_examples=300, deadline=None)
STATUSES = {spec.http for spec in ERRORS.values()}
REQUEST = json.dumps({"session_id": "s", "images_base64": [frame()] * 2, "prompt": "go", "seed": 3}).encode()
OBSERVATION = encode_map({"images": np.concatenate([pixels(1, 2)]), "prompt": "go", "reply": "step", "seed": 3})


@pytest.fixture(scope="module")
def server():
    """A server with a flight in progress, which must go on undisturbed."""
    with BackgroundServer(NullPolicy()) as server:
        with HttpCalls(server, "flight") as calls:
            calls.fly([frame()], instruction="go", allow_future_segments=True)
        yield server
        with HttpCalls(server, "flight") as calls:
            assert calls.fly([frame()] * 16, allow_future_segments=True)["segment_index"] == 1


def damaged(message: bytes) -> st.SearchStrategy[bytes]:
    """A message with some of its bytes replaced, or cut off; or anything else."""
    places = st.lists(st.tuples(st.integers(0, len(message) - 1), st.integers(0, 255)), min_size=1, max_size=8)

    def damage(changes: list[tuple[int, int]], length: int) -> bytes:
        copy = bytearray(message)
        for at, value in changes:
            copy[at] = value
        return bytes(copy[:length])

    return st.binary(max_size=100) | st.builds(damage, places, st.integers(0, len(message)) | st.just(len(message)))


def check_no_leak(text: str) -> None:
    assert "Traceback" not in text
    assert "site-packages" not in text
    assert ".py" not in text


@SOME
@given(body=damaged(REQUEST))
def test_http_answers_every_body(server, body):
    with HttpCalls(server) as calls:
        status, answer = calls.send(body)
    if status == 200:
        assert answer["num_received_frames"] >= 1
        return
    assert status in STATUSES
    assert ERRORS[answer["code"]].http == status
    assert status < 500
    check_no_leak(json.dumps(answer))


@SOME
@given(
    junk=st.binary(max_size=60)
    | st.builds(
        lambda method, path, header: f"{method} {path} HTTP/1.1\r\n{header}\r\n\r\n".encode("latin-1", "replace"),
        st.sampled_from(["GET", "POST", "PUT", "\x00"]),
        st.sampled_from([PREDICT_PATH, "/health", "/", "/v1/session", "*", "http://x/"]) | st.text(max_size=10),
        st.sampled_from(["Content-Length: -1", "Content-Length: 1e9", "Upgrade: websocket", "Host: x"])
        | st.text(max_size=20),
    )
)
def test_any_bytes_on_the_port_leave_the_server_answering(server, junk):
    with socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=5) as line:
        line.sendall(junk)
        line.shutdown(socketlib.SHUT_WR)
        heard = b""
        while data := line.recv(65536):
            heard += data
    check_no_leak(heard.decode("latin-1"))
    with HttpCalls(server) as calls:
        assert calls.get("/healthz") == (200, b"OK\n")


@pytest.fixture(scope="module")
def client(server):
    with PolicyClient(server) as client:
        yield client


@SOME
@given(message=damaged(OBSERVATION))
def test_openpi_answers_every_message_on_the_same_connection(client, message):
    answer = client.ask_bytes(message)
    if isinstance(answer, dict):
        assert answer["actions"].shape[1] == 6
        return
    code, _, text = answer.partition(": ")
    assert code in ERRORS
    assert code != "internal"
    assert "\n" not in text
    check_no_leak(text)


def test_openpi_connection_flies_after_all_that(client):
    assert client.ask(images=pixels(0), prompt="go", reset=True)["num_received_frames"] == 1
