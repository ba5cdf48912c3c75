"""What an operator sees of a server: metrics, readiness, logs."""

import io
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import StageTimes
from worldvln_edge.runtime.doors.server import BackgroundServer, serve
from worldvln_edge.runtime.doors.server_log import configure_log
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.event_log import EventLog
from worldvln_edge.runtime.sessions.meter import NoMeter
from worldvln_edge.runtime.sessions.metrics import ServerMetrics
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.sessions.warm_up import WarmUpError, fly_once, fly_until_steady

FRAME = np.full((8, 8, 3), 127, dtype=np.uint8)
LOCAL = ZmqConfig(endpoints=("tcp://127.0.0.1:*",))


def base_url(server: BackgroundServer) -> str:
    return f"http://127.0.0.1:{server.server.bound_port}"


def read_metrics(server: BackgroundServer) -> dict[str, float]:
    """`name{label=value,...}` -> value."""
    with urllib.request.urlopen(f"{base_url(server)}/metrics") as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=")
        text = answer.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def test_metrics_of_a_flight_count_what_was_flown():
    with BackgroundServer(NullPolicy(infer_s=0.02), zmq=LOCAL) as server:
        before = read_metrics(server)
        assert before["worldvln_sessions"] == 0
        assert before["worldvln_request_stage_seconds_count{stage=decode}"] == 0
        with SessionClient(server.server.zmq_urls[0]) as client:
            client.start("go")
            for count in (1, 16, 16):
                client.observe([FRAME] * count)
            after = read_metrics(server)
            assert after["worldvln_sessions"] == 1
            client.observe([], segment=2)  # answered from what is stored: no new segment
            with pytest.raises(ServerError):
                client.observe([FRAME], first=40)
            client.end()
        last = read_metrics(server)
    assert after["worldvln_segments_total{head=latent,profile=exact}"] == 3
    assert last["worldvln_segments_total{head=latent,profile=exact}"] == 3
    assert last["worldvln_sessions"] == 0
    for stage in ("queue", "decode", "infer", "total"):
        assert after[f"worldvln_request_stage_seconds_count{{stage={stage}}}"] == 3
        assert last[f"worldvln_request_stage_seconds_count{{stage={stage}}}"] == 4
    assert 0.06 <= after["worldvln_segment_seconds_sum"] < 5
    assert after["worldvln_model_stage_seconds_count{stage=generate}"] == 3
    assert 0.06 <= after["worldvln_model_stage_seconds_sum{stage=generate}"] < 5
    assert last["worldvln_refusals_total{code=gap}"] == 1
    assert last["worldvln_refusals_total{code=overloaded}"] == 0
    assert last["worldvln_ready"] == 1
    assert last["worldvln_resident_memory_bytes"] > 10e6
    assert last["worldvln_server_info{backend=null,device=cpu,model=null,precision=fp32," + version_label(last)] == 1


def version_label(samples: dict[str, float]) -> str:
    name = next(name for name in samples if name.startswith("worldvln_server_info"))
    return name[name.index("version=") :]


def test_metrics_count_refusals_of_every_door():
    with BackgroundServer(NullPolicy(), keys=["right"], zmq=LOCAL) as server:
        for url in (server.url, server.server.zmq_urls[0]):
            with pytest.raises(ServerError, match="unauthorized"):
                SessionClient(url, "wrong").__enter__()
        assert read_metrics(server)["worldvln_refusals_total{code=unauthorized}"] == 2


def test_metrics_answer_while_the_policy_works_and_show_the_queue():
    with BackgroundServer(NullPolicy(infer_s=1.5)) as server, SessionClient(server.url) as client:
        client.start("go")
        with SessionClient(server.url) as other:
            other.start("go")
            flights = [threading.Thread(target=lambda c=c: c.observe([FRAME])) for c in (client, other)]
            for flight in flights:
                flight.start()
            time.sleep(0.2)
            began = time.monotonic()
            samples = read_metrics(server)
            assert time.monotonic() - began < 1.0
            assert samples["worldvln_queue_length"] == 1
            for flight in flights:
                flight.join()


def test_two_servers_in_one_process_count_apart():
    with BackgroundServer(NullPolicy()) as one, BackgroundServer(NullPolicy()) as other:
        with SessionClient(one.url) as client:
            client.start("go")
            client.observe([FRAME])
        assert read_metrics(one)["worldvln_segments_total{head=latent,profile=exact}"] == 1
        assert "worldvln_segments_total{head=latent,profile=exact}" not in read_metrics(other)


def test_late_answers_holds_and_cut_off_clients_are_counted():
    metrics = ServerMetrics(NullPolicy().info)
    times = StageTimes(queue=1.0, decode=2.0, infer=3.0, total=6.0)
    metrics.answered(times, is_late=True, hold="stale observation")
    metrics.cut_off("zmq")
    text, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    for line in (
        "worldvln_late_answers_total 1.0",
        'worldvln_holds_total{reason="stale observation"} 1.0',
        'worldvln_clients_cut_off_total{door="zmq"} 1.0',
        'worldvln_request_stage_seconds_sum{stage="total"} 0.006',
    ):
        assert line in text.decode().splitlines()


class SlowToWarmUp(NullPolicy):
    """Its first flight waits until the test says so."""

    def __init__(self, failure: Exception | None = None):
        super().__init__()
        self.may_fly = threading.Event()
        self.prompts: list[str] = []
        self._failure = failure

    def new_session(self, prompt, **options):
        self.prompts.append(prompt)
        if len(self.prompts) == 1:
            self.may_fly.wait(10)
            if self._failure is not None:
                raise self._failure
        return super().new_session(prompt, **options)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def warming() -> Iterator[tuple[SlowToWarmUp, BackgroundServer, threading.Thread]]:
    """A server whose first flight waits for `policy.may_fly`; entered on a thread, because entering waits too."""
    policy = SlowToWarmUp()
    server = BackgroundServer(policy, port=free_port(), zmq=LOCAL, warm_up=True)
    entering = threading.Thread(target=server.__enter__)
    entering.start()
    while not server.server.is_listening:
        time.sleep(0.005)
    yield policy, server, entering
    policy.may_fly.set()
    entering.join()
    server.__exit__(None, None, None)


def test_server_is_ready_only_after_its_first_flight(warming):
    policy, server, entering = warming
    assert status(f"{base_url(server)}/readyz") == 503
    assert status(f"{base_url(server)}/healthz") == 200
    assert read_metrics(server)["worldvln_ready"] == 0
    with urllib.request.urlopen(f"{base_url(server)}/health") as answer:
        assert json.load(answer)["ready"] is False
    with SessionClient(server.server.zmq_urls[0], reconnect_s=0) as client:
        assert client.ping().ready is False
        with pytest.raises(ServerError, match="warming up") as refusal:
            client.start("go")
        assert (refusal.value.code, refusal.value.retry) == ("not_ready", True)
        policy.may_fly.set()
        entering.join(5)
        assert status(f"{base_url(server)}/readyz") == 200
        client.start("go")
        assert client.observe([FRAME]).segment == 0
    *first, last = policy.prompts
    assert (set(first), last) == ({"move forward"}, "go")
    assert read_metrics(server)["worldvln_segments_total{head=latent,profile=exact}"] == 1  # nobody asked for the first


def test_client_waits_for_a_server_that_warms_up(warming):
    policy, server, _ = warming
    threading.Timer(0.4, policy.may_fly.set).start()
    with SessionClient(server.server.zmq_urls[0], reconnect_s=5) as client:
        began = time.monotonic()
        client.start("go")
        assert time.monotonic() - began > 0.2
        assert client.observe([FRAME]).segment == 0


def test_server_that_cannot_fly_ends_and_says_why():
    policy = SlowToWarmUp(MemoryError("no room for the cache"))
    policy.may_fly.set()
    with pytest.raises(WarmUpError, match=r"MemoryError: no room for the cache.*worldvln-edge bench BUNDLE"):
        serve(policy, port=0)


def test_shutdown_during_the_first_flight_ends_the_server():
    policy = SlowToWarmUp()
    server = BackgroundServer(policy, warm_up=True)

    def end_it() -> None:
        while not server.server.is_listening:
            time.sleep(0.005)
        server.server.should_exit = True

    ending = threading.Thread(target=end_it)
    ending.start()
    with pytest.raises(RuntimeError, match="ended before it was ready"):
        server.__enter__()
    ending.join()
    policy.may_fly.set()


def test_first_flight_emits_every_segment_and_is_closed():
    policy = NullPolicy()
    sessions = []
    open_session = policy.new_session
    policy.new_session = lambda prompt: sessions.append(open_session(prompt)) or sessions[0]
    closed = []
    fly_once(_ClosingWatch(policy, closed))
    assert sessions[0].done
    assert closed == [sessions[0]]


@pytest.mark.parametrize(
    ("times", "flown"),
    [((5.0, 1.0, 1.1, 1.0), 3), ((1.0, 1.0, 1.0), 2), ((1.0, 2.0), 2), ((9.0, 5.0, 3.0, 1.0, 0.5), 4)],
)
def test_first_flights_go_on_until_they_take_no_less_time(times: tuple[float, ...], flown: int):
    moments = iter([moment for duration in times for moment in (0.0, duration)])
    assert fly_until_steady(NullPolicy(), lambda: next(moments)) == list(times[:flown])


class _ClosingWatch:
    """A policy whose sessions tell when they are closed."""

    def __init__(self, policy: NullPolicy, closed: list):
        self.info, self.fit_frame = policy.info, policy.fit_frame
        self._policy, self._closed = policy, closed

    def new_session(self, prompt: str):
        session = self._policy.new_session(prompt)
        session.close = lambda: self._closed.append(session)
        return session


@pytest.fixture
def log_lines() -> Iterator[callable]:
    """Configure the log with (format, level, secrets); the fixture's value gives the lines so far."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def lines(format: str | None = None, level: str = "info", secrets=()) -> list[str]:
        if format is not None:
            configure_log(format, level, secrets=secrets, stream=stream)
        return stream.getvalue().splitlines()

    yield lines
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_log_is_one_object_a_line_with_fields_and_traceback(log_lines):
    log_lines("json")
    log = logging.getLogger("worldvln_edge.test")
    log.info("flown %d of %s", 3, "segment", extra={"fields": {"ms": 1.5, "name": "a\nb"}})
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    first, second = (json.loads(line) for line in log_lines())
    assert (first["message"], first["level"], first["logger"]) == ("flown 3 of segment", "info", "worldvln_edge.test")
    assert (first["ms"], first["name"]) == (1.5, "a\nb")
    assert first["time"].endswith("Z")
    assert "ValueError: broken" in second["exception"]


def test_text_log_shows_fields_behind_the_message(log_lines):
    log_lines("text")
    logging.getLogger("x").warning("cut off", extra={"fields": {"door": "zmq"}})
    assert log_lines()[0].endswith("WARNING x: cut off door=zmq")


@pytest.mark.parametrize("format", ["text", "json"])
def test_log_holds_no_key_no_token_and_no_image_bytes(log_lines, format):
    log_lines(format, "debug", ["s3cret-key", "s3cret"])
    log = logging.getLogger("x")
    log.warning("key %s, header Authorization: Bearer abc.def-1 and Api-Key zzz", "s3cret-key")
    log.warning("frame %s", b"\xff\xd8 JFIF")
    log.warning("event", extra={"fields": {"header": "Bearer abc.def-1", "frame": b"\xff\xd8 JFIF"}})
    try:
        raise ValueError("s3cret-key was wrong")
    except ValueError:
        log.exception("refused")
    text = "\n".join(log_lines())
    for hidden in ("s3cret", "abc.def-1", "zzz", "\\xff"):
        assert hidden not in text
    assert text.count("<7 bytes>") == 2
    assert "***" in text


@pytest.mark.parametrize("transport", ["ws", "zmq"])
def test_log_of_a_flight_at_debug_level_holds_neither_key_nor_prompt_nor_session(log_lines, transport):
    log_lines("json", "debug", ["the-api-key"])
    with BackgroundServer(NullPolicy(), keys=["the-api-key"], zmq=LOCAL) as server:
        url = server.url if transport == "ws" else server.server.zmq_urls[0]
        with SessionClient(url, "the-api-key") as client:
            client.start("a secret mission", session="flight-of-mine")
            client.observe([FRAME])
            with pytest.raises(ServerError):
                client.observe([FRAME], first=9)
    lines = [json.loads(line) for line in log_lines()]
    text = json.dumps(lines)
    for hidden in ("the-api-key", "secret mission", "flight-of-mine", "JFIF"):
        assert hidden not in text
    events = {line["message"]: line for line in lines}
    assert events["segment emitted"]["profile"] == "exact"
    assert events["segment emitted"]["segment"] == 0
    assert events["request refused"]["code"] == "gap"


def test_meters_without_listeners_take_every_report():
    chunk = ActionChunk(segment=0, actions=np.zeros((16, 6), np.float32), observed_frames=1, seed=0)
    times = StageTimes(queue=0.0, decode=0.0, infer=0.0, total=0.0)
    for meter in (NoMeter(), EventLog()):
        meter.segment(chunk, 0.1)
        meter.answered(times, is_late=True, hold="late")
        meter.refused("gap")
        meter.cut_off("zmq")
