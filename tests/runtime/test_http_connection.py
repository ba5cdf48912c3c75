"""Clients that send too much, too slowly, or no HTTP at all; and the HTTP API on a port of its own."""

import contextlib
import json
import socket as socketlib
import time
import urllib.error
import urllib.request

import pytest
from click.testing import CliRunner
from http_calls import HttpCalls, frame
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from worldvln_edge import cli
from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.listen_address import AddressInUseError, UnsafeAddressError
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.session_server import SessionServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

LIMITS = Limits(max_msg_bytes=100_000, headers_within_s=0.3, body_within_s=0.3)


@pytest.fixture(scope="module")
def server():
    with BackgroundServer(NullPolicy(), limits=LIMITS) as server:
        yield server


@pytest.fixture
def line(server):
    with socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=5) as line:
        yield line


def head(*headers: str) -> bytes:
    return "\r\n".join([f"POST {PREDICT_PATH} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def hear(line) -> bytes:
    """What the server sends until it closes, or until a whole answer is there."""
    heard = b""
    while b"\r\n\r\n" not in heard or not heard.endswith(b"}"):
        data = line.recv(65536)
        if not data:
            break
        heard += data
    return heard


def test_body_that_says_it_is_too_large_is_refused_before_it_is_read(line):
    line.sendall(head("Content-Length: 200000000"))
    answer = hear(line)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request body is larger than 100000 bytes" in answer
    assert b'"code":"too_large"' in answer


def test_body_that_grows_too_large_is_refused(line):
    line.sendall(head("Transfer-Encoding: chunked") + b"186a1\r\n" + b" " * 100_001 + b"\r\n")
    assert hear(line).startswith(b"HTTP/1.1 413")


def test_body_that_trickles_in_is_refused_after_its_time(line):
    line.sendall(head("Content-Length: 1000"))
    began = time.monotonic()
    line.settimeout(0.05)
    heard = b""
    while not heard and time.monotonic() - began < 5:
        line.sendall(b" ")
        try:
            heard = line.recv(65536)
        except TimeoutError:
            continue
    assert heard.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 5
    line.settimeout(5)
    while b"}" not in heard:  # head and body may come apart
        heard += line.recv(65536)
    assert b'"code":"timeout"' in heard


@pytest.mark.parametrize("start", [b"", b"POST /v1/pre", head("Content-Length: 5")[:-2]])
def test_headers_that_do_not_come_end_the_connection(line, start):
    line.sendall(start)
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert line.recv(100) == b""
    assert time.monotonic() - began < 5


def test_rest_of_a_refused_body_is_not_waited_for_for_ever(line):
    line.sendall(head("Content-Length: 200000000"))
    assert hear(line).startswith(b"HTTP/1.1 413")
    began = time.monotonic()
    line.settimeout(0.05)
    assert is_cut_off(line, within_s=3)
    assert time.monotonic() - began < 5


def is_cut_off(line, within_s: float) -> bool:
    """Whether the server ends a connection on which bytes go on trickling in."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        try:
            line.sendall(b" ")
            if line.recv(100) == b"":
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_idle_connection_between_two_calls_is_not_cut_by_the_time_of_the_first(server):
    with HttpCalls(server, "idle") as calls:
        calls.fly([frame()], instruction="go")
        time.sleep(0.15)
        assert calls.fly([frame()])["num_received_frames"] == 2


def test_websocket_outlives_the_time_for_headers(server):
    with SessionClient(server.url) as client:
        time.sleep(0.5)
        assert client.ping().ready


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"\0" * 100_000])
def test_what_is_no_http_is_answered_with_400_or_the_close(server, line, junk):
    try:
        line.sendall(junk)
        heard = line.recv(65536)
    except ConnectionError:
        heard = b""
    assert heard == b"" or heard.startswith(b"HTTP/1.1 400")
    with HttpCalls(server) as calls:
        assert calls.get("/health")[0] == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 422),
        ("application/json; charset=utf-8", 422),
        ("application/problem+json", 422),
        ("text/plain", 415),
        ("application/x-msgpack", 415),
        ("multipart/form-data; boundary=x", 415),
        ("json", 415),
    ],
)
def test_body_must_be_json(server, line, content_type, status):
    line.sendall(head(*([f"Content-Type: {content_type}"] if content_type else []), "Content-Length: 2") + b"{}")
    assert hear(line).startswith(f"HTTP/1.1 {status}".encode())


def test_bodies_that_arrive_at_once_are_bounded_together():
    limits = Limits(max_msg_bytes=60_000, max_stored_bytes=100_000)
    with BackgroundServer(NullPolicy(), limits=limits) as server:
        lines = [socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=5) for _ in range(2)]
        for line in lines:
            line.sendall(head("Content-Length: 55000") + b" " * 54_000)
        answered = b"".join(hear(line) for line in lines[1:])
        assert answered.startswith(b"HTTP/1.1 503")
        assert b"too many large requests arrive at once" in answered
        lines[0].sendall(b" " * 1000)
        assert hear(lines[0]).startswith(b"HTTP/1.1 422")
        for line in lines:
            line.close()
        with HttpCalls(server) as calls:  # the bytes were given back
            calls.fly([frame()], instruction="go")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", PREDICT_PATH, 405), ("DELETE", "/health", 405)])
def test_wrong_method_says_which_are_allowed(server, method, path, status):
    request = urllib.request.Request(f"{server.server.http_url}{path}", method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == status
    assert refused.value.headers["allow"]
    assert json.loads(refused.value.read()) == {"detail": "Method Not Allowed"}


def test_http_api_on_a_port_of_its_own():
    with BackgroundServer(NullPolicy(), http_address=("127.0.0.1", 0)) as server:
        server_ports = {server.server.bound_port, server.server.http_port}
        assert len(server_ports) == 2
        assert server.server.addresses == (server.url, server.server.http_url)
        with HttpCalls(server) as calls:
            calls.fly([frame()], instruction="go")
            assert calls.get("/healthz") == (200, b"OK\n")
        with SessionClient(server.url) as client:
            assert client.ping().sessions == 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.server.bound_port}{PREDICT_PATH}", b"{}")
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{server.server.http_port}/openpi", compression=None).__enter__()


def test_serve_refuses_an_open_http_address_before_it_loads_anything(tmp_path):
    refused = CliRunner().invoke(cli.main, ["serve", str(tmp_path), "--ws", "127.0.0.1:0", "--http", "0.0.0.0:0"])
    assert refused.exit_code == 1
    assert refused.output.startswith("error: 0.0.0.0 can be reached from other machines")


def test_taken_http_port_and_open_http_address_say_what_to_do():
    with BackgroundServer(NullPolicy()) as server:
        taken = ("127.0.0.1", server.server.bound_port)
        with pytest.raises(AddressInUseError, match="Give another --http HOST:PORT"):
            BackgroundServer(NullPolicy(), http_address=taken).__enter__()
    with pytest.raises(UnsafeAddressError, match=r"0\.0\.0\.0"):
        SessionServer(NullPolicy(), http_address=("0.0.0.0", 0))


def test_requests_that_do_not_wait_for_their_answers_are_bounded(server, line):
    small = head("Content-Length: 2", "Content-Type: application/json") + b"{}"
    line.sendall(small * 100)
    heard = b""
    while heard.count(b"HTTP/1.1 422") < 100:
        heard += line.recv(65536)
    line.settimeout(30)
    with pytest.raises(ConnectionError):  # noqa: PT012
        for _ in range(200):
            line.sendall(small * 10_000)  # more than 1 MB, and no answer is read
    assert urllib.request.urlopen(f"{server.server.http_url}/healthz", timeout=30).status == 200


def test_client_that_does_not_read_its_answers_loses_its_connection():
    with BackgroundServer(NullPolicy(), limits=Limits(headers_within_s=0.3)) as server:
        served = server.server.server_state.connections
        with socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=30) as line:
            line.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 16_000)  # over 100 MB of answers
            give_up_s = time.monotonic() + 60
            while served and time.monotonic() < give_up_s:
                time.sleep(0.02)
            assert not served
