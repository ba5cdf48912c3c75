"""The environment server and its client: HTTP is as exact as the pool, and every refusal says what to do."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from PIL import Image

from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors.listen_address import AddressInUseError, UnsafeAddressError
from worldvln_edge.tasks import SceneRef, Task, write_task
from worldvln_edge.training.environments import env_door
from worldvln_edge.training.environments.client import (
    EnvironmentServerError,
    EnvironmentServerUnreachableError,
    RemoteEnvironments,
)
from worldvln_edge.training.environments.environment import (
    CapacityError,
    EnvironmentFault,
    EnvironmentResult,
    FrameSizeError,
)
from worldvln_edge.training.environments.pool import PoolConfig
from worldvln_edge.training.environments.server import (
    BackgroundEnvironmentServer,
    EnvironmentServer,
    EnvironmentServerConfig,
)

HW = (24, 32)
START = (100.0, -50.0, 200.0, 0.0, 30.0, 0.0)
POOL = PoolConfig(processes=2, per_process=3)


def a_task(scene: int = 0, **fields) -> Task:
    return Task(instruction="go", initial_pos=START, scene=SceneRef(family="rooms", seed=scene), **fields)


ACTIONS = np.random.default_rng(0).normal(0, (20, 5, 5, 0, 5, 0), (16, 6))


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[BackgroundEnvironmentServer]:
    tasks = tmp_path_factory.mktemp("tasks")
    write_task(a_task(3), tasks / "filed.json")
    with BackgroundEnvironmentServer(EnvironmentServerConfig(pool=POOL, task_root=tasks)) as server:
        yield server


@pytest.fixture
def remote(served) -> Iterator[RemoteEnvironments]:
    with RemoteEnvironments(served.url, timeout_s=60) as environments:
        yield environments
    assert environments.health()["free"] == POOL.processes * POOL.per_process


def seen(answer: object) -> EnvironmentResult:
    assert isinstance(answer, EnvironmentResult), answer
    return answer


def post(url: str, path: str, body: object, **headers: str) -> tuple[int, dict]:
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    line.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
    answer = line.getresponse()
    result = answer.status, json.loads(answer.read())
    line.close()
    return result


def test_http_gives_what_the_pool_gives_bit_for_bit(served, remote):
    tasks = {"a": a_task(0), "b": a_task(1)}
    local = served.server.pool
    assert local.create({f"local/{id}": task for id, task in tasks.items()}, image_hw=HW, max_frames=17) == {}
    assert remote.create(tasks, image_hw=HW, max_frames=17) == {}
    pairs = [
        (remote.reset(["a", "b"]), local.reset(["local/a", "local/b"])),
        (remote.step(dict.fromkeys("ab", ACTIONS)), local.step(dict.fromkeys(["local/a", "local/b"], ACTIONS))),
        (remote.step({"a": ACTIONS}, frames="last"), local.step({"local/a": ACTIONS}, frames="last")),
    ]
    for over_http, directly in pairs:
        for id, answer in over_http.items():
            got, wanted = seen(answer), seen(directly[f"local/{id}"])
            for name in ("frames", "poses", "collided"):
                assert np.array_equal(getattr(got, name), getattr(wanted, name))
                assert getattr(got, name).dtype == getattr(wanted, name).dtype
            assert (got.frame_index, got.done, got.end_reason) == (wanted.frame_index, wanted.done, wanted.end_reason)
    assert seen(pairs[1][0]["a"]).end_reason == "horizon"
    local.close(["local/a", "local/b"])


def test_json_holds_the_same_frames_as_msgpack(served, remote):
    remote.create({"a": a_task()}, image_hw=HW)
    frame = seen(remote.reset(["a"])["a"]).frames[0]
    envs = {"j": {"task": msgspec.to_builtins(a_task())}, "file": {"task": "filed"}, "no": {"task": "absent"}}
    status, answer = post(served.url, "/v1/env/create", {"envs": envs, "image_hw": HW})
    assert (status, answer["instructions"]) == (200, {"j": "go", "file": "go"})
    assert answer["failed"] == {
        "no": {"error": {"code": "bad_task", "message": "this server has no task file 'absent'.json"}}
    }
    status, answer = post(served.url, "/v1/env/reset/", {"ids": ["j"]})
    head, _, data = answer["results"]["j"]["frames"][0].partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), frame)
    answer = post(served.url, "/v1/env/step", {"actions": {"j": {"values": [[0] * 6], "kind": "words"}}})[1]
    assert answer["results"]["j"]["error"]["message"] == "actions of kind 'words' are not known; send 'body_delta'"
    answer = post(served.url, "/v1/env/step", {"actions": {"j": {"values": [[0] * 5]}}})[1]
    assert answer["results"]["j"]["error"] == {
        "code": "bad_action",
        "message": "each action must be 6 numbers (cm, deg)",
    }
    answer = post(served.url, "/v1/env/step", {"actions": {"j": {"values": [[0] * 6] * 4097}}, "frames": "last"})[1]
    assert answer["results"]["j"]["error"]["message"] == "at most 4096 actions a call, found 4097"
    assert post(served.url, "/v1/env/warmup", {"tasks": ["filed", "absent"], "image_hw": HW}) == (200, {})
    assert post(served.url, "/v1/env/close", {"ids": ["j", "file", "nobody"]}) == (200, {})


def test_two_clients_may_use_the_same_ids(served, remote):
    with RemoteEnvironments(served.url) as other:
        remote.create({"a": a_task(0)}, image_hw=HW)
        other.create({"a": a_task(1)}, image_hw=HW)
        mine, theirs = remote.reset(["a"])["a"], other.reset(["a"])["a"]
        assert not np.array_equal(seen(mine).frames, seen(theirs).frames)
        assert remote.health()["free"] == 4


def test_faults_and_refusals_arrive_as_those_of_the_pool(remote):
    assert remote.capacity == 6
    failed = remote.create({"a": a_task(), "b": Task(instruction="go", initial_pos=START)}, image_hw=HW)
    assert (list(failed), failed["b"].code) == (["b"], "bad_task")
    assert remote.step({"a": ACTIONS})["a"].code == "not_reset"
    mixed = remote.step({"a": ACTIONS, "b": ACTIONS[0], "c": ACTIONS * np.nan})
    assert {id: answer.code for id, answer in mixed.items()} == {"a": "not_reset", "b": "bad_action", "c": "bad_action"}
    assert remote.reset(["c"])["c"].message.startswith("there is no environment 'c': it was never created")
    with pytest.raises(CapacityError, match="7 environments were asked for and 5 of 6 are free"):
        remote.create({f"e{i}": a_task() for i in range(7)}, image_hw=HW)
    with pytest.raises(FrameSizeError, match="frames of 2000x20 were asked for"):
        remote.create({"d": a_task()}, image_hw=(2000, 20))


def test_killed_simulator_is_a_fault_of_its_environments_only(served, remote):
    remote.create({"a": a_task(0), "b": a_task(1)}, image_hw=HW)
    remote.reset(["a", "b"])
    os.kill(served.server.pool.pids[0], signal.SIGKILL)
    answers = remote.step(dict.fromkeys("ab", ACTIONS))
    lost = [id for id, answer in answers.items() if isinstance(answer, EnvironmentFault)]
    assert len(lost) == 1
    assert answers[lost[0]].code == "lost"
    assert remote.create({lost[0]: a_task(0)}, image_hw=HW) == {}
    seen(remote.reset(lost)[lost[0]])


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "message"),
    [
        ("create", b"{", 400, "bad_request", "payload is not JSON"),
        ("create", [], 400, "bad_request", "payload must be a json object"),
        ("create", {}, 400, "bad_request", "Object missing required field `envs`"),
        ("create", {"envs": {}, "image_hw": [8]}, 400, "bad_request", "Expected `array` of length 2"),
        ("create", {"envs": {"a": {"task": 1}}, "image_hw": [8, 8]}, 400, "bad_request", "Expected `str | object`"),
        (
            "create",
            {"envs": {}, "image_hw": [8, 8], "max_frames": 0},
            400,
            "bad_request",
            "max_frames must be 1 to 1000000, found 0",
        ),
        (
            "create",
            {"envs": {"": {"task": "t"}}, "image_hw": [8, 8]},
            400,
            "bad_request",
            "ids must be 1 to 256 characters",
        ),
        (
            "create",
            {"envs": {str(i): {"task": "t"} for i in range(4097)}, "image_hw": [8, 8]},
            413,
            "too_large",
            "at most 4096 environments a call, found 4097",
        ),
        (
            "warmup",
            {"tasks": ["t"] * 4097, "image_hw": [8, 8]},
            413,
            "too_large",
            "at most 4096 tasks a call, found 4097",
        ),
        ("close", {"ids": ["worldvln"]}, 400, "bad_request", "ids must not begin with 'worldvln' or 'activevln/'"),
        ("reset", {"ids": "a"}, 400, "bad_request", "Expected `array`, got `str`"),
        ("step", {"actions": {"a": {"values": [["x"]]}}}, 400, "bad_request", "Expected `float`, got `str`"),
        ("step", {"actions": {}, "frames": "some"}, 400, "bad_request", "Invalid enum value 'some'"),
        ("warmup", {"tasks": [1], "image_hw": [8, 8]}, 400, "bad_request", "Expected `str | object`"),
        ("warmup", {"tasks": [], "image_hw": [0, 8]}, 413, "frame_size", "frames of 0x8 were asked for"),
    ],
)
def test_bad_call_is_refused_as_a_whole(served, path, body, status, code, message):
    got, answer = post(served.url, f"/v1/env/{path}", body)
    assert (got, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"].startswith(message)


def test_bad_media_path_and_method_are_refused(served):
    error = {"code": "unsupported_media", "message": "send application/json or application/msgpack"}
    assert post(served.url, "/v1/env/reset", {}, **{"Content-Type": "text/html"}) == (415, {"error": error})
    assert post(served.url, "/v1/env/fly", {}) == (404, {"error": "unknown path: /v1/env/fly"})
    assert post(served.url, "/v1/env/health", {}) == (405, {"error": "POST is not for /v1/env/health"})
    line = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    line.request("POST", "/v1/env/reset", b"\xc1", {"Content-Type": "application/msgpack"})
    answer = line.getresponse()
    assert answer.status == 400
    assert msgspec.msgpack.decode(answer.read())["error"]["message"] == "payload is not msgpack"


def test_answer_that_would_be_too_large_is_refused_before_anybody_flies(served, remote, monkeypatch):
    remote.create({"a": a_task()}, image_hw=HW)
    remote.reset(["a"])
    monkeypatch.setattr(env_door, "MAX_ANSWER_BYTES", 16 * 24 * 32 * 3 - 1)
    with pytest.raises(EnvironmentServerError, match='environments or actions at once, or for frames "last"'):
        remote.step({"a": ACTIONS})
    assert seen(remote.step({"a": ACTIONS}, frames="last")["a"]).frame_index == 17


def test_fault_of_the_server_is_500_without_its_reason(served, remote, monkeypatch, caplog):
    monkeypatch.setattr(served.server._env, "_task", lambda task: 1 / 0)
    with pytest.raises(EnvironmentServerError, match="refused 500: the server failed; its log says why"):
        remote.create({"a": a_task()}, image_hw=HW)
    assert "ZeroDivisionError" in caplog.text


def test_key_is_asked_for_and_bodies_are_bounded_and_leases_run_out():
    config = EnvironmentServerConfig(
        pool=PoolConfig(per_process=2), lease_s=0.4, limits=Limits(max_msg_bytes=1000, body_within_s=0.3)
    )
    with BackgroundEnvironmentServer(config, keys=["secret"]) as server:
        too_large = {"error": {"code": "too_large", "message": "send a body of 0 to 1000 bytes"}}
        with pytest.raises(EnvironmentServerError, match="send Authorization: Api-Key <key>") as refused:
            RemoteEnvironments(server.url).create({"a": a_task()}, image_hw=HW)
        assert refused.value.code == "unauthorized"
        remote = RemoteEnvironments(server.url, "secret")
        remote.create({"a": a_task()}, image_hw=HW)
        assert post(server.url, "/v1/env/reset", b"x" * 1001, Authorization="Api-Key secret") == (413, too_large)
        address = ("127.0.0.1", server.server.bound_port)
        for chunked in (f"{1001:x}\r\n{'x' * 1001}\r\n0\r\n\r\n", "1\r\n{\r\n"):
            with socket.create_connection(address, timeout=10) as line:
                line.sendall(
                    b"POST /v1/env/reset HTTP/1.1\r\nHost: x\r\nAuthorization: Api-Key secret\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n" + chunked.encode()
                )
                answer = line.recv(4000)
            assert answer.startswith(b"HTTP/1.1 413" if len(chunked) > 1000 else b"HTTP/1.1 408")
        done = threading.Event()
        while remote.health()["free"] != 2:
            assert not done.wait(0.05)
        assert remote.reset(["a"])["a"].message.endswith("was left idle too long")


@contextmanager
def a_line(*answers: bytes | None) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads one request a connection and answers with the next of these bytes, or hangs up."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                line, _ = listener.accept()
                with line:
                    line.settimeout(10)
                    requests.append(line.recv(65536))
                    if answer is not None:
                        body = msgspec.msgpack.encode(msgspec.json.decode(answer))
                        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/msgpack\r\nContent-Length: {len(body)}"
                        line.sendall(head.encode() + b"\r\n\r\n" + body)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        thread.join()


HEALTH = b'{"capacity":4}'


def test_calls_that_may_be_repeated_survive_a_broken_connection():
    with a_line(None, HEALTH, None, b'{"failed":{}}', None, None, b"{}") as (url, requests):
        remote = RemoteEnvironments(url, pause_s=0.01)
        assert remote.create({"a": a_task()}, image_hw=HW) == {}
        remote.close(["a"])
    paths = [request.split()[1].decode() for request in requests]
    assert paths == ["/v1/env/health"] * 2 + ["/v1/env/create"] * 2 + ["/v1/env/close"] * 3


def test_step_on_a_broken_connection_is_never_repeated():
    with a_line(HEALTH, None) as (url, requests):
        remote = RemoteEnvironments(url, pause_s=0.01)
        answers = remote.step({"a": ACTIONS, "b": ACTIONS})
    assert len(requests) == 2
    assert [answer.code for answer in answers.values()] == ["lost", "lost"]
    assert "broke the connection" in answers["a"].message
    assert "in the middle of a step; whether the drone moved is unknown, create it again" in answers["a"].message


def test_step_that_is_not_answered_in_time_is_lost():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        remote = RemoteEnvironments.__new__(RemoteEnvironments)
        with a_line(HEALTH) as (url, _):
            remote.__init__(url, timeout_s=0.2, attempts=2, pause_s=0.01)
        remote._port, remote._url = silent.getsockname()[1], "http://silent"
        assert "http://silent did not answer within 0.2 s" in remote.step({"a": ACTIONS})["a"].message
        with pytest.raises(EnvironmentServerUnreachableError, match=r"did not answer within 0.2 s, 2 times; is `world"):
            remote.reset(["a"])


def test_nobody_there_and_somebody_else_there_are_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EnvironmentServerUnreachableError, match=r"cannot be reached .* `worldvln-edge sim serve`"):
        RemoteEnvironments(f"http://127.0.0.1:{port}", attempts=2, pause_s=0.01)
    with a_line(b"{}") as (url, _), pytest.raises(EnvironmentServerError, match="its health tells no capacity"):
        RemoteEnvironments(url)
    with a_line(HEALTH, b'{"results":{}}', b"{}") as (url, _):
        remote = RemoteEnvironments(url)
        with pytest.raises(EnvironmentServerError, match=r"left out the results of \['a'\]"):
            remote.reset(["a"])
        with pytest.raises(EnvironmentServerError, match="is no environment server: 'failed' is missing"):
            remote.create({"a": a_task()}, image_hw=HW)
    with pytest.raises(ValueError, match=r"reached by http://HOST:PORT, found 'ws://x'"):
        RemoteEnvironments("ws://x")


def test_listening_needs_a_free_port_and_a_reason_to_be_seen(served):
    with pytest.raises(UnsafeAddressError, match="--allow-remote"):
        EnvironmentServer(host="0.0.0.0", port=0)
    with (
        pytest.raises(AddressInUseError, match="is another server running there\\? Give another --port"),
        BackgroundEnvironmentServer(port=served.server.bound_port),
    ):
        pass
