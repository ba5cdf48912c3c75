"""How many requests a second a client may send, at every door; and that others do not pay for it."""

import contextlib
import http.client
import json
import time
import urllib.request
from collections.abc import Iterator

import pytest
from http_calls import HttpCalls, frame
from hypothesis import given
from hypothesis import strategies as st
from openpi_calls import PolicyClient, pixels
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from worldvln_edge.client import ServerError, ServerUnreachableError, SessionClient
from worldvln_edge.protocol import Limits, ProtocolError
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions import request_rate
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.request_rate import RequestRate
from worldvln_edge.wire import decode_answer

SLOW = Limits(max_requests_per_s=0.5, max_in_flight=4)  # four at once, then one every two seconds


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def refusal_of(rate: RequestRate, client: str = "drone") -> ProtocolError | None:
    try:
        rate.take(client)
    except ProtocolError as refusal:
        return refusal
    return None


def allowed(rate: RequestRate, client: str = "drone") -> bool:
    return refusal_of(rate, client) is None


@given(per_s=st.floats(0.1, 50), pauses_s=st.lists(st.floats(0, 5), max_size=200))
def test_no_more_than_the_burst_and_the_rate_are_let_through(per_s, pauses_s):
    clock, passed = Clock(), 0
    rate = RequestRate(Limits(max_requests_per_s=per_s, max_in_flight=4), clock=clock)
    for pause_s in pauses_s:
        clock.now_s += pause_s
        passed += allowed(rate)
    assert passed <= max(4.0, per_s) + (clock.now_s - 100) * per_s + 1e-6


@given(per_s=st.floats(0.1, 50), count=st.integers(1, 50))
def test_whoever_waits_as_told_is_let_through(per_s, count):
    clock = Clock()
    rate = RequestRate(Limits(max_requests_per_s=per_s, max_in_flight=4), clock=clock)
    for _ in range(count):
        refusal = refusal_of(rate)
        if refusal is not None:
            assert refusal.retry_ms <= 1e3 / per_s + 1
            clock.now_s += refusal.retry_ms / 1e3
            assert allowed(rate)


def test_refusal_says_what_is_allowed_and_when_to_come_back():
    rate = RequestRate(Limits(max_requests_per_s=2, max_in_flight=1), clock=Clock())
    assert [allowed(rate) for _ in range(3)] == [True, True, False]
    with pytest.raises(ProtocolError, match="more than 2 requests a second; send fewer") as refusal:
        rate.take("drone")
    assert (refusal.value.code, refusal.value.retry, refusal.value.retry_ms) == ("busy", True, 500)
    assert allowed(rate, "another drone")


def test_nothing_is_counted_by_default():
    rate = RequestRate(Limits())
    assert all(allowed(rate) for _ in range(10_000))


def test_many_addresses_take_no_more_room_and_those_heard_last_are_remembered(monkeypatch):
    monkeypatch.setattr(request_rate, "_MOST_BUCKETS", 10)
    rate = RequestRate(Limits(max_requests_per_s=1, max_in_flight=1), clock=Clock())
    assert all(allowed(rate, f"10.0.0.{host}") for host in range(50))
    assert len(rate._buckets) == 10
    assert not allowed(rate, "10.0.0.49")


@contextlib.contextmanager
def slow_server(**options) -> Iterator[BackgroundServer]:
    zmq = ZmqConfig(endpoints=("tcp://127.0.0.1:*",))
    with BackgroundServer(NullPolicy(), limits=SLOW, zmq=zmq, **options) as server:
        yield server


def test_http_answers_429_with_retry_after_and_changes_nothing():
    with slow_server() as server, HttpCalls(server) as calls:
        calls.fly([frame()], instruction="go")
        for _ in range(3):
            calls.fly([frame()])
        status, answer = calls.ask([frame()])
        assert (status, answer["code"]) == (429, "busy")
        assert 0 < answer["retry_ms"] <= 2000
        time.sleep(answer["retry_ms"] / 1e3)
        assert calls.fly([frame()])["num_received_frames"] == 5
        for _ in range(10):
            assert calls.get("/health")[0] == 200


def ping_five_times(client: SessionClient) -> None:
    for _ in range(5):
        client.ping()


@pytest.mark.parametrize("transport", ["websocket", "zmq"])
def test_native_client_hears_busy_for_that_request_and_flies_on(transport):
    with slow_server() as server:
        url = server.url if transport == "websocket" else server.server.zmq_urls[0]
        with SessionClient(url) as client:
            with pytest.raises(ServerError, match="requests a second") as refusal:
                ping_five_times(client)
            assert refusal.value.code == "busy"
            time.sleep(refusal.value.retry_ms / 1e3)
            assert client.ping().ready


def test_messages_that_cannot_be_read_are_counted_too():
    with slow_server() as server, connect(server.url, compression=None) as socket:
        codes = []
        for _ in range(6):
            socket.send(b"\xc1")
            codes.append(decode_answer(socket.recv(timeout=30), "msgpack").code)
        # The upgrade was the first request of this second.
        assert codes == ["bad_request"] * 3 + ["busy"] * 3


def test_openpi_client_hears_busy_and_the_connection_goes_on():
    with slow_server() as server, PolicyClient(server) as client:
        answers = [client.ask(images=pixels(index), prompt="go") for index in range(4)]
        assert answers[-1].startswith("busy: more than 0.5 requests a second")
        time.sleep(2.1)
        assert client.ask(images=pixels(9))["num_received_frames"] == 4


def connect_five_times(server: BackgroundServer, connections: contextlib.ExitStack) -> None:
    for _ in range(5):
        connections.enter_context(PolicyClient(server))


def test_upgrades_are_counted_too():
    with slow_server() as server:
        with pytest.raises(InvalidStatus) as refused, contextlib.ExitStack() as connections:
            connect_five_times(server, connections)
        assert refused.value.response.status_code == 429
        assert int(refused.value.response.headers["Retry-After"]) in (1, 2)


def test_each_key_has_a_rate_of_its_own_over_all_doors():
    with slow_server(keys=["one", "two"]) as server:
        with HttpCalls(server, headers={"Authorization": "Bearer one"}) as calls:
            calls.fly([frame()], instruction="go")
            while calls.ask([frame()])[0] == 200:
                pass
        with pytest.raises(InvalidStatus), PolicyClient(server, additional_headers={"Authorization": "Bearer one"}):
            pass
        with HttpCalls(server, headers={"Authorization": "Bearer two"}) as calls:
            calls.fly([frame()], instruction="go")


def status_from(server: BackgroundServer, address: str, **headers: str) -> int:
    connection = http.client.HTTPConnection(
        "127.0.0.1", server.server.http_port, timeout=5, source_address=(address, 0)
    )
    body = json.dumps({"session_id": "s", "images_base64": [frame()], "instruction": "go"})
    connection.request("POST", PREDICT_PATH, body, {"Content-Type": "application/json", **headers})
    status = connection.getresponse().status
    connection.close()
    return status


def test_each_address_has_a_rate_of_its_own_over_all_doors():
    with slow_server() as server:
        while status_from(server, "127.0.0.1") == 200:
            pass
        assert status_from(server, "127.0.0.2") == 200
        with pytest.raises(ServerUnreachableError, match="HTTP status 429"):
            SessionClient(server.url).__enter__()
        with pytest.raises(ServerUnreachableError, match=r"more than 0\.5 requests a second"):
            SessionClient(server.server.zmq_urls[0]).__enter__()


def test_proxy_on_this_machine_names_its_clients():
    with slow_server() as server:
        while status_from(server, "127.0.0.1", **{"X-Forwarded-For": "10.0.0.1"}) == 200:
            pass
        assert status_from(server, "127.0.0.1", **{"X-Forwarded-For": "10.0.0.2"}) == 200
        assert status_from(server, "127.0.0.1", **{"X-Forwarded-For": "10.0.0.2, 10.0.0.1"}) == 429


def test_refusals_are_counted_in_the_metrics():
    with slow_server() as server, HttpCalls(server) as calls:
        calls.fly([frame()], instruction="go")
        refused = sum(calls.ask([frame()])[0] == 429 for _ in range(10))
        with urllib.request.urlopen(f"{server.server.http_url}/metrics") as answer:
            metrics = answer.read().decode()
    assert refused > 0
    assert f'worldvln_refusals_total{{code="busy"}} {float(refused)}' in metrics
