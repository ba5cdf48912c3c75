"""`bench-serve` and `soak --server`: what they measure is there, what is lost is told, and wrong use is refused."""

import http.server
import json
import subprocess
import sys
import threading

import msgspec
import pytest
from click.testing import CliRunner

from worldvln_edge.cli import main
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.bench import null_server, serve_load
from worldvln_edge.runtime.bench.bench_report import Quantiles
from worldvln_edge.runtime.bench.health_probe import HealthProbe
from worldvln_edge.runtime.bench.null_server import NullServerConfig, NullServerError, NullServerProcess
from worldvln_edge.runtime.bench.report_table import render
from worldvln_edge.runtime.bench.serve_load import (
    LoadRow,
    RouteTimes,
    ServeLoadError,
    ServeLoadReport,
    Transport,
    measure_load,
)
from worldvln_edge.runtime.bench.serve_load_client import LoadConfig
from worldvln_edge.runtime.bench.serve_load_table import serve_load_parts
from worldvln_edge.runtime.bench.server_soak import Events, ServerSoakConfig, ServerSoakReport, soak_server
from worldvln_edge.runtime.bench.soak_log import SegmentSample, SoakLog
from worldvln_edge.runtime.bench.soak_report import summarise
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.process_memory import resident_bytes

TIMES = Quantiles(runs=5, p50_ms=1.0, p95_ms=2.0, p99_ms=3.0)


def row(**changes) -> LoadRow:
    usual = LoadRow(
        transport="websocket",
        sessions=1,
        requests=5,
        requests_per_s=1.0,
        total=TIMES,
        decode=TIMES,
        infer=TIMES,
        queue=TIMES,
        overhead=TIMES,
        lost=0,
        refused={},
        rss_start_bytes=50_000_000,
        rss_peak_bytes=70_000_000,
        rss_end_bytes=60_000_000,
        health={"/health": RouteTimes(asked=3, p50_ms=4.0, max_ms=60.0)},
        health_connecting_ms=90.0,
        health_failures=[],
    )
    return msgspec.structs.replace(usual, **changes)


def report_of(*rows: LoadRow) -> ServeLoadReport:
    return ServeLoadReport(seconds=1.0, frame_hw=(32, 32), rows=list(rows))


@pytest.mark.parametrize("transport", ["websocket", "zmq ipc", "zmq tcp"])
def test_every_request_is_answered_and_its_parts_add_up(transport: Transport):
    report = measure_load((3,), transports=(transport,), seconds=1.0, warm_up_s=0.2, frame_hw=(32, 32))
    (found,) = report.rows
    assert (found.lost, found.refused, found.health_failures, report.faults) == (0, {}, [], [])
    assert found.requests == found.total.runs > 5
    assert 0 < found.overhead.p50_ms < found.total.p50_ms
    assert found.overhead.p50_ms + found.decode.p50_ms <= found.total.p99_ms
    assert found.rss_start_bytes <= found.rss_peak_bytes
    assert set(found.health) == {"/health", "/readyz", "/metrics"}


def test_command_prints_the_report_as_json_and_writes_the_tables(tmp_path):
    file = tmp_path / "new" / "table.md"
    options = ["--sessions", "1", "--transport", "zmq tcp", "--seconds", "0.5", "--warm-up", "0"]
    done = CliRunner().invoke(main, ["bench-serve", *options, "--json", "--markdown", str(file)])
    assert done.exit_code == 0, done.stderr
    assert [each["transport"] for each in json.loads(done.stdout)["rows"]] == ["zmq tcp"]
    assert file.read_text().count("| zmq tcp | 1 |") == 2
    assert "1 sessions over zmq tcp: " in done.stderr


def test_what_is_lost_refused_or_unhealthy_is_a_fault():
    assert report_of(row()).faults == []  # a slow answer is none
    faults = report_of(row(lost=2), row(refused={"overloaded": 3}), row(health_failures=["/readyz: status 503"])).faults
    assert faults == [
        "1 sessions over websocket: 2 answers were lost",
        "1 sessions over websocket: requests were refused: {'overloaded': 3}",
        "1 sessions over websocket: health did not answer 1 times, /readyz: status 503",
    ]


def test_fault_is_printed_and_ends_with_status_one(monkeypatch):
    monkeypatch.setattr(serve_load, "measure_load", lambda sessions, **options: report_of(row(lost=1)))
    done = CliRunner().invoke(main, ["bench-serve"])
    assert done.exit_code == 1
    assert "error: 1 sessions over websocket: 1 answers were lost" in done.stderr


def test_table_holds_times_memory_health_and_goals():
    text = render(serve_load_parts(report_of(row(), row(sessions=200, health={}))))
    assert any(line.split()[1:5] == ["1", "50.0", "70.0", "60.0"] for line in text.splitlines())
    assert "overhead of one session over websocket: p50 1.0 ms (goal 3), p99 3.0 ms (goal 8)" in text
    assert "slowest of 3 health answers while segments run: 60.0 ms (goal 50)" in text
    assert any(line.split()[-2:] == ["90.0", "0"] for line in text.splitlines())
    assert text.endswith("lost answers: 0 (goal 0)")


@pytest.mark.parametrize("counts", ["", "0", "1,", "a", "1,-2", "1001", "1;2"])
def test_wrong_numbers_of_sessions_are_refused(counts):
    done = CliRunner().invoke(main, ["bench-serve", "--sessions", counts])
    assert done.exit_code == 2
    assert "is no list of numbers from 1 to 1000, for example 1,10,50,200" in done.stderr


def test_time_in_which_nothing_was_answered_says_what_to_do(monkeypatch):
    monkeypatch.setattr(serve_load, "_run_clients", lambda load: serve_load.LoadResult())
    with pytest.raises(ServeLoadError, match=r"no request of 1 sessions over websocket .* \(--seconds\)"):
        measure_load((1,), transports=("websocket",))


def test_clients_that_fail_say_why():
    load = LoadConfig(url="ws://127.0.0.1:9", sessions=1, seconds=1.0, warm_up_s=0.0)
    with pytest.raises(
        ServeLoadError, match=r"1 clients of ws://127\.0\.0\.1:9 failed: .*no worldvln-edge server answers"
    ):
        serve_load._run_clients(load)


def test_clients_that_do_not_end_are_given_up(monkeypatch):
    monkeypatch.setattr(serve_load, "_ENDS_WITHIN_S", 0.0)
    with BackgroundServer(NullPolicy(infer_s=5.0)) as server:
        load = LoadConfig(url=server.url, sessions=1, seconds=0.5, warm_up_s=0.0, frame_hw=(32, 32))
        with pytest.raises(ServeLoadError, match=r"did not end within 0\.5 s"):
            serve_load._run_clients(load)


def test_server_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(null_server, "_ENDS_WITHIN_S", 0.0)
    server = NullServerProcess()
    with pytest.raises(NullServerError, match="did not end within 0 s of SIGTERM"), server:
        pass
    assert not server.is_running


def test_refused_and_lost_requests_are_counted():
    with BackgroundServer(NullPolicy(infer_s=0.3), limits=Limits(max_queue=0)) as server:
        load = LoadConfig(url=server.url, sessions=1, seconds=0.5, warm_up_s=0.0, frame_hw=(32, 32))
        assert set(serve_load._run_clients(load).refused) == {"overloaded"}
    with BackgroundServer(NullPolicy(infer_s=0.6)) as server:
        load = LoadConfig(
            url=server.url, sessions=1, seconds=0.3, warm_up_s=0.0, frame_hw=(32, 32), answer_timeout_s=0.2
        )
        assert serve_load._run_clients(load).lost >= 1


class Sick(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/metrics":
            self.close_connection = True
            return
        self.send_response(503 if self.path == "/readyz" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_answers_while_clients_connect_are_counted_apart():
    (found,) = measure_load((20,), transports=("websocket",), seconds=0.5, warm_up_s=0.0, frame_hw=(32, 32)).rows
    assert found.health_connecting_ms > 0
    assert set(found.health) <= {"/health", "/readyz", "/metrics"}
    probe = HealthProbe("127.0.0.1", 1)
    probe.asked_s["/health"], probe.took_ms["/health"] = [1.0, 2.0, 3.0], [80.0, 4.0, 6.0]
    assert serve_load._route_times(probe, 2.0) == {"/health": RouteTimes(asked=2, p50_ms=5.0, max_ms=6.0)}


def test_probe_tells_what_did_not_answer():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sick) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with HealthProbe("127.0.0.1", server.server_port, pause_s=0.01) as probe:
            while len(probe.failures) < 2:
                pass
        server.shutdown()
    assert len(probe.took_ms["/health"]) >= 1
    assert probe.failures[0] == "/readyz: status 503"
    assert probe.failures[1].startswith("/metrics: RemoteDisconnected")


def test_server_process_ends_in_order_and_with_its_parent():
    server = NullServerProcess(NullServerConfig())
    with server:
        assert server.is_running
        assert 10e6 < server.resident_bytes() < server.resident_bytes("VmHWM") * 1.01
        assert 0 < server.processor_s() < 60
    assert not server.is_running
    with pytest.raises(NullServerError, match="it has ended"):
        server.resident_bytes()
    program = (
        "from worldvln_edge.runtime.bench.null_server import NullServerProcess\n"
        "server = NullServerProcess()\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    orphan = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout)
    ended = threading.Event()
    for _ in range(200):
        if resident_bytes("VmRSS", orphan) is None:
            break
        ended.wait(0.05)
    assert resident_bytes("VmRSS", orphan) is None


def test_server_process_that_was_not_started_or_does_not_start_says_so():
    with pytest.raises(NullServerError, match="was not started"):
        _ = NullServerProcess().pid
    config = NullServerConfig(zmq_endpoints=("nonsense",))
    with pytest.raises(NullServerError, match="did not start"), NullServerProcess(config):
        pass


def test_server_soak_flies_over_every_transport_and_loses_nothing():
    config = ServerSoakConfig(
        minutes=0.05, warm_up_minutes=0.05, drones=6, period_s=0.05, session_ttl_s=0.2, frame_hw=(32, 32)
    )
    report = soak_server(config)
    assert (report.lost, report.exit_status) == ([], 0)
    assert report.server.segments > 20
    assert report.events.started == report.events.ended + report.events.left > 6
    assert report.events.expired > 0
    assert report.events.resumed > 0
    assert report.warm_up.started >= 5
    assert report.warm_up.started < report.events.started
    assert all(window.rss_bytes > 10e6 and window.processor_p50_ms > 0 for window in report.server.windows)


def soak_report(growth: float = 0.0, **changes) -> ServerSoakReport:
    log = SoakLog(100)
    for number in range(100):
        sample = SegmentSample(
            kind="segment",
            elapsed_s=number,
            wall_ms=5.0,
            processor_ms=5.0,
            rss_bytes=int(60e6 * (1 + growth * number / 100)),
            sessions=number,
        )
        log.add(sample)
    server = summarise(NullPolicy().info, log, threads=0)
    warm_up = Events(started=9, ended=5, left=5, expired=5, resumed=5)
    usual = ServerSoakReport(
        server=server, drones=2, events=Events(started=12, ended=6), warm_up=warm_up, lost=[], exit_status=0
    )
    return msgspec.structs.replace(usual, **changes)


@pytest.mark.parametrize(
    ("report", "fault"),
    [
        (soak_report(growth=0.03), "memory (RSS) grew by 2."),
        (soak_report(lost=["a", "b"]), "2 requests were not answered as they should be, first: a"),
        (soak_report(exit_status=-9), "the server ended with status -9"),
        (
            soak_report(warm_up=Events(started=9, ended=9, left=4, resumed=5)),
            "the warm-up was too short for a baseline: fewer than 5 sessions were left or expired; give more "
            "--warm-up-minutes",
        ),
    ],
)
def test_server_soak_that_fails_ends_with_status_one(monkeypatch, report, fault):
    assert soak_report().faults == []
    monkeypatch.setattr("worldvln_edge.runtime.bench.server_soak.soak_server", lambda config, on_segment: report)
    done = CliRunner().invoke(main, ["soak", "--server", "--minutes", "1"])
    assert done.exit_code == 1
    assert f"error: {fault}" in done.stderr
    assert "2 drones over WebSocket, ZeroMQ ipc and ZeroMQ tcp" in done.stdout


def test_soak_wants_either_a_bundle_or_a_server(tmp_path):
    for arguments in ([], ["--server", str(tmp_path)]):
        done = CliRunner().invoke(main, ["soak", *arguments])
        assert done.exit_code == 2
        assert "give either a BUNDLE, or --server to soak a server without a model" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"minutes": 0}, "minutes must be above 0"), ({"drones": 0}, "drones must be at least 1")],
)
def test_soak_of_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ServerSoakConfig(**changes)
