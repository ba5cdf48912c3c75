"""A server that is killed in the middle of a flight and started again: nothing that it acknowledged is lost."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from crashing_server import SeeingPolicy
from http_calls import frame
from openpi_calls import PolicyClient, pixels

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.server import BackgroundServer

SERVER = Path(__file__).with_name("crashing_server.py")
FRAMES = [np.full((8, 8, 3), index, np.uint8) for index in range(120)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class KilledServer:
    """Starts, and dies without a word."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def start(self, infer_s: float = 0.0) -> None:
        command = [sys.executable, str(SERVER), str(self.port), str(self.folder), str(infer_s)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline().startswith("ws://")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()


def fly(client: SessionClient, calls, before_call=lambda index: None, **options) -> list:
    client.start("go", seed=3, **options)
    answers, sent = [], 0
    for index, count in enumerate(calls):
        before_call(index)
        prompt = "turn around" if index == 2 else None
        answers.append(client.observe(FRAMES[sent : sent + count], prompt=prompt))
        sent += count
    return answers


def outcome(answers) -> list:
    return [(answer.segment, answer.frames, answer.need, answer.actions.tolist()) for answer in answers]


@pytest.mark.parametrize(
    ("calls", "options"),
    [((1, 16, 10, 6), {}), ((1, 16, 16, 16, 16, 16), {"chain": True}), ((17, 3, 13), {"emit": "behind"})],
)
def test_killed_between_calls(tmp_path, calls, options):
    with BackgroundServer(SeeingPolicy()) as server, SessionClient(server.url, frame_format="rgb8") as client:
        expected = outcome(fly(client, calls, **options))
    with KilledServer(tmp_path) as server, SessionClient(server.url, frame_format="rgb8") as client:

        def crash(index: int) -> None:
            if index:
                server.kill()
                server.start()

        assert outcome(fly(client, calls, crash, **options)) == expected


def test_killed_while_it_computes(tmp_path):
    with BackgroundServer(SeeingPolicy()) as server, SessionClient(server.url, frame_format="rgb8") as client:
        expected = outcome(fly(client, (1, 16)))
    server = KilledServer(tmp_path)
    server.start(infer_s=1.0)
    with SessionClient(server.url, frame_format="rgb8") as client:

        def crash() -> None:
            server.kill()
            server.start()

        def crash_soon(index: int) -> None:
            if index == 1:
                threading.Timer(0.4, crash).start()

        try:
            assert outcome(fly(client, (1, 16), crash_soon)) == expected
        finally:
            server.kill()


def test_stored_actions_survive(tmp_path):
    with KilledServer(tmp_path) as server, SessionClient(server.url, frame_format="rgb8") as client:
        first, second = fly(client, (1, 16))
        server.kill()
        server.start()
        again = [client.observe([], segment=segment) for segment in (0, 1)]
        assert [answer.actions.tolist() for answer in again] == [first.actions.tolist(), second.actions.tolist()]


def test_a_session_that_ended_is_gone_after_the_crash(tmp_path):
    with KilledServer(tmp_path) as server, SessionClient(server.url, frame_format="rgb8") as client:
        fly(client, (1, 16))
        name = client.session
        client.end()
        server.kill()
        server.start()
        with SessionClient(server.url) as other, pytest.raises(ServerError, match="no such session"):
            other.start(session=name, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_graceful_end_keeps_open_sessions(tmp_path):
    with KilledServer(tmp_path) as server, SessionClient(server.url, frame_format="rgb8") as client:
        fly(client, (1, 16))
        server._process.terminate()
        assert server._process.wait() == 0
        server.start()
        assert client.observe(FRAMES[17:33]).segment == 2


def post(port: int, **fields) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = json.dumps({"session_id": "drone", "allow_future_segments": True, **fields})
    connection.request("POST", PREDICT_PATH, body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def fly_over_http(port_of_call) -> list:
    answers = []
    for index, (first, count) in enumerate(((0, 1), (1, 16), (17, 16))):
        prompt = {"instruction": "go", "seed": 3} if index == 0 else {}
        images = [frame(value) for value in range(first, first + count)]
        answers.append(post(port_of_call(index), images_base64=images, **prompt))
    return [(answer["done"], answer["segment_index"], answer["actions"]) for answer in answers]


def test_http_sessions_survive_too(tmp_path):
    with BackgroundServer(SeeingPolicy()) as server:
        expected = fly_over_http(lambda index: server.server.http_port)
    with KilledServer(tmp_path) as server:

        def crash(index: int) -> int:
            if index:
                server.kill()
                server.start()
            return server.port

        assert fly_over_http(crash) == expected


@pytest.mark.parametrize("crashes", [1, 2])
def test_http_call_that_is_repeated_after_the_crash_is_answered_from_memory(tmp_path, crashes):
    first = {"images_base64": [frame(0)], "first_frame": 1, "instruction": "go", "seed": 3}
    second = {"images_base64": [frame(value) for value in range(1, 17)], "first_frame": 2}
    with KilledServer(tmp_path) as server:
        post(server.port, **first)
        answered = post(server.port, **second)
        for _ in range(crashes):
            server.kill()
            server.start()
            again = post(server.port, **second)
            assert {**again, "timing": None} == {**answered, "timing": None}
        assert answered["segment_index"] == 1
        third = post(server.port, images_base64=[frame(value) for value in range(17, 33)], first_frame=18)
    assert (third["segment_index"], third["num_received_frames"]) == (2, 33)


def test_http_call_whose_answer_was_lost_in_the_crash_is_answered_when_it_is_repeated(tmp_path):
    first = {"images_base64": [frame(0)], "first_frame": 1, "instruction": "go", "seed": 3}
    second = {"images_base64": [frame(value) for value in range(1, 17)], "first_frame": 2}
    with BackgroundServer(SeeingPolicy()) as server:
        post(server.server.http_port, **first)
        expected = post(server.server.http_port, **second)
    server = KilledServer(tmp_path)
    server.start(infer_s=0.5)
    post(server.port, **first)
    timer = threading.Timer(0.25, server.kill)
    timer.start()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        post(server.port, **second)
    timer.join()
    server.start()
    try:
        answer = post(server.port, **second)
    finally:
        server.kill()
    assert {**answer, "timing": None} == {**expected, "timing": None}


def test_prompt_of_an_http_call_that_emitted_nothing_survives(tmp_path):
    def fly(port_of_call) -> list:
        post(port_of_call(), images_base64=[frame(0)], instruction="go", seed=3)
        # Rule D: segment 1 is not due, so the policy is not asked, and does not hear of the prompt.
        images = [frame(value) for value in range(1, 17)]
        post(port_of_call(), images_base64=images, instruction="turn around", allow_future_segments=False)
        return post(port_of_call(), images_base64=[frame(17)])["actions"]

    with BackgroundServer(SeeingPolicy()) as server:
        expected = fly(lambda: server.server.http_port)
    assert len(expected) == 16
    with KilledServer(tmp_path) as server:

        def crash() -> int:
            server.kill()
            server.start()
            return server.port

        assert fly(crash) == expected


def fly_over_openpi(port_of_call, count: int, *, repeat: bool = False) -> list:
    """One frame a call, in `step` mode; each call over a connection of its own."""
    results = []
    for index in range(count):
        observation = {"images": pixels(index), "session_id": "drone", "first_frame": 1 + index}
        if index == 0:
            observation |= {"prompt": "go", "seed": 3, "reply": "step"}
        for _ in range(2 if repeat else 1):
            with PolicyClient(port_of_call(index)) as client:
                results.append(client.ask(**observation))
    wanted = ("segment_index", "num_received_frames", "need_frames", "done")
    return [([result[name] for name in wanted], result["actions"].tolist()) for result in results]


def test_openpi_session_in_step_mode_goes_on_in_step_mode(tmp_path):
    with BackgroundServer(SeeingPolicy()) as server:
        expected = fly_over_openpi(lambda index: server.server.bound_port, 20)
    assert all(len(actions) == 1 for _, actions in expected)
    with KilledServer(tmp_path) as server:

        def crash(index: int) -> int:
            if index in (1, 9, 17):
                server.kill()
                server.start()
            return server.port

        assert fly_over_openpi(crash, 20) == expected


def test_openpi_observation_that_is_repeated_after_the_crash_gets_the_same_result(tmp_path):
    with BackgroundServer(SeeingPolicy()) as server:
        expected = fly_over_openpi(lambda index: server.server.bound_port, 2)
    calls = iter(range(4))
    with KilledServer(tmp_path) as server:

        def crash(index: int) -> int:
            if next(calls) % 2:  # between an observation and its repetition
                server.kill()
                server.start()
            return server.port

        found = fly_over_openpi(crash, 2, repeat=True)
    assert found == [expected[0], expected[0], expected[1], expected[1]]
