"""`worldvln-edge serve` as a process: TLS, traces, and what its options ask for. The null policy flies."""

import http.server
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from certificates import Authority
from click.testing import CliRunner

from worldvln_edge import cli
from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.runtime.doors import server
from worldvln_edge.runtime.sessions.chained_session import SettledRule
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.worldvln import worldvln_policy

FRAME = np.full((8, 8, 3), 127, dtype=np.uint8)
SERVE = """
import sys
from worldvln_edge import cli
from worldvln_edge.runtime.worldvln import worldvln_policy
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

class ClosablePolicy(NullPolicy):
    def close(self):
        pass

worldvln_policy.load_policy = lambda bundle, **options: ClosablePolicy()
cli.main(["serve", *sys.argv[1:]])
"""


class ClosablePolicy(NullPolicy):
    def close(self) -> None:
        """Nothing is held."""


class Collector(http.server.BaseHTTPRequestHandler):
    """What OpenTelemetry's exporter sends spans to."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to stderr."""


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The command sets the log of its process up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Address and what came there."""
    received: list[tuple[str, bytes]] = []
    handler = type("Handler", (Collector,), {"received": received})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", received
        server.shutdown()


def ping_ten_times(client: SessionClient) -> None:
    for _ in range(10):
        client.ping()


def test_command_serves_tls_traces_and_a_rate_and_ends_normally(tmp_path: Path, collector):
    authority = Authority(tmp_path)
    files = authority.certify("server", "127.0.0.1")
    address, received = collector
    options = ["--tls-cert", files.certificate, "--tls-key", files.key, "--otel", "--max-requests-per-s", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, tmp_path, "--ws", "127.0.0.1:0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_SERVICE_NAME": "my-drone"},
    )
    try:
        line = process.stderr.readline()
        url = line.split()[-1]
        assert url.startswith("wss://127.0.0.1:"), line
        with SessionClient(url, ca_file=authority.file) as client:
            client.start("go")
            assert client.observe([FRAME]).segment == 0
            with pytest.raises(ServerError, match="busy"):
                ping_ten_times(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert [path for path, _ in received] == ["/v1/traces"]
    for text in (b"worldvln.observe", b"decode", b"my-drone"):
        assert text in received[0][1]


@pytest.mark.parametrize(
    ("options", "rule"), [([], SettledRule()), (["--settled", "20", "5", "2.5"], SettledRule(steps=20, cm=5, deg=2.5))]
)
def test_settled_rule_is_uav_flows_unless_told_otherwise(options, rule, tmp_path, monkeypatch):
    given: dict[str, object] = {}
    monkeypatch.setattr(worldvln_policy, "load_policy", lambda bundle, **options: ClosablePolicy())
    monkeypatch.setattr(server, "serve", lambda *arguments, **options: given.update(options))
    assert CliRunner().invoke(cli.main, ["serve", str(tmp_path), *options]).exception is None
    assert given["settled"] == rule


@pytest.mark.parametrize("values", [("0", "3", "1"), ("10", "0", "1"), ("10", "3", "-1"), ("10", "3")])
def test_settled_rule_that_cannot_be_is_refused(values, tmp_path):
    refused = CliRunner().invoke(cli.main, ["serve", str(tmp_path), "--settled", *values])
    assert refused.exit_code == 2
    assert "'--settled'" in refused.output


def test_traces_without_the_package_are_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    refused = CliRunner().invoke(cli.main, ["serve", str(tmp_path), "--otel"])
    assert refused.exit_code == 1
    assert refused.output.splitlines()[-1].startswith("error: traces need OpenTelemetry (opentelemetry.sdk.trace is")
    assert "pip install 'worldvln-edge[otel]'" in refused.output


def test_tls_without_a_port_is_refused(tmp_path):
    files = Authority(tmp_path).certify("server", "127.0.0.1")
    options = ["--zmq", "tcp://127.0.0.1:0", "--tls-cert", str(files.certificate), "--tls-key", str(files.key)]
    refused = CliRunner().invoke(cli.main, ["serve", str(tmp_path), *options])
    assert refused.exit_code == 1
    assert refused.output.startswith("error: --tls-cert is for HTTP and WebSocket: give --ws HOST:PORT too")
