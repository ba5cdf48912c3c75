"""Connections that are opened and left alone keep nobody out, whether they owe a handshake, headers or a body."""

import contextlib
import json
import socket as socketlib
import ssl
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from certificates import Authority
from http_calls import HttpCalls
from websockets.sync.client import connect

from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors import connection_room
from worldvln_edge.runtime.doors.connection_room import SPARE_CONNECTIONS
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.tls import server_context
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

FRAME = np.full((8, 8, 3), 127, dtype=np.uint8)
LIMITS = Limits(max_connections=4, headers_within_s=60)  # so nothing here ends because its time is up
ROOM = LIMITS.max_connections + SPARE_CONNECTIONS
HALF_A_BODY = f"POST {PREDICT_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_server(authority: Authority) -> Iterator[BackgroundServer]:
    files = authority.certify("server", "127.0.0.1")
    with BackgroundServer(NullPolicy(), tls=server_context(files.certificate, files.key), limits=LIMITS) as server:
        yield server


@contextlib.contextmanager
def left_alone(port: int, count: int, start: bytes) -> Iterator[list[socketlib.socket]]:
    """Connections that send `start` and then nothing."""
    with contextlib.ExitStack() as stack:
        lines = []
        for _ in range(count):
            line = stack.enter_context(socketlib.create_connection(("127.0.0.1", port), timeout=5))
            with contextlib.suppress(ConnectionError):
                line.sendall(start)
            lines.append(line)
        yield lines


def is_open(line: socketlib.socket) -> bool:
    line.setblocking(False)
    try:
        return line.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@pytest.mark.parametrize("start", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01"], ids=["silent", "half a hello"])
def test_half_open_tls_connections_are_bounded_and_a_good_client_still_gets_in(tls_server, authority, start):
    port = tls_server.server.bound_port
    context = ssl.create_default_context(cafile=authority.file)
    with left_alone(port, ROOM + 50, start) as lines:
        began_s = time.monotonic()
        for route in ("/health", "/readyz", "/metrics"):
            assert urllib.request.urlopen(f"https://127.0.0.1:{port}{route}", context=context).status == 200
        with SessionClient(tls_server.url, ca_file=authority.file) as client:
            client.start("go")
            assert client.observe([FRAME]).segment == 0
        assert time.monotonic() - began_s < 5
        still_open = [is_open(line) for line in lines]
        assert sum(still_open) <= ROOM
        assert not any(still_open[:50])  # those that waited longest had to go
        assert still_open[-1]


def test_request_right_behind_the_handshake_is_not_lost(tls_server, authority):
    context = ssl.create_default_context(cafile=authority.file)
    for _ in range(20):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with socketlib.create_connection(("127.0.0.1", tls_server.server.bound_port), timeout=5) as line:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    line.sendall(outgoing.read())
                    incoming.write(line.recv(65536))
            tls.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            line.sendall(outgoing.read())  # the client's last word of the handshake, and the request, in one piece
            heard = b""
            while b"OK" not in heard:
                incoming.write(line.recv(65536))
                with contextlib.suppress(ssl.SSLWantReadError):
                    heard += tls.read(65536)
        assert heard.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("start", [b"", b"GET /hea", HALF_A_BODY], ids=["silent", "headers", "body"])
def test_connections_that_owe_a_request_are_bounded_and_a_good_client_still_gets_in(start):
    with (
        BackgroundServer(NullPolicy(), limits=LIMITS) as server,
        left_alone(server.server.bound_port, ROOM + 50, start) as lines,
    ):
        began_s = time.monotonic()
        with HttpCalls(server) as calls:
            assert [calls.get(route)[0] for route in ("/health", "/readyz", "/metrics")] == [200] * 3
        with SessionClient(server.url) as client:
            client.start("go")
            assert client.observe([FRAME]).segment == 0
        assert time.monotonic() - began_s < 5
        still_open = [is_open(line) for line in lines]
        assert sum(still_open) <= ROOM
        assert not any(still_open[:50])


def test_flying_clients_are_not_given_up_for_newcomers():
    with BackgroundServer(NullPolicy(), limits=LIMITS) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(SessionClient(server.url)) for _ in range(LIMITS.max_connections)]
        for client in clients:
            client.start("go")
        with left_alone(server.server.bound_port, ROOM, b""):
            links = [client.ping() for client in clients]
        assert [link.ready for link in links] == [True] * LIMITS.max_connections
        assert [client.observe([FRAME]).segment for client in clients] == [0] * LIMITS.max_connections


def test_newcomer_is_told_when_all_places_are_at_work(monkeypatch):
    monkeypatch.setattr(connection_room, "SPARE_CONNECTIONS", 0)
    with BackgroundServer(NullPolicy(), limits=Limits(max_connections=2)) as server:
        with connect(server.url, compression=None), connect(server.url, compression=None):
            with socketlib.create_connection(("127.0.0.1", server.server.bound_port), timeout=5) as late:
                heard = b"".join(iter(lambda: late.recv(65536), b""))
            assert heard.startswith(b"HTTP/1.1 503")
            assert json.loads(heard.partition(b"\r\n\r\n")[2])["code"] == "overloaded"
        with HttpCalls(server) as calls:
            assert calls.get("/health")[0] == 200


def test_server_ends_while_handshakes_are_open(authority):
    files = authority.certify("ends", "127.0.0.1")
    server = BackgroundServer(NullPolicy(), tls=server_context(files.certificate, files.key), limits=LIMITS)
    with server, left_alone(server.server.bound_port, 5, b"") as lines:
        began_s = time.monotonic()
        server.server.should_exit = True
        for line in lines:
            assert line.recv(1) == b""
        assert time.monotonic() - began_s < 5
