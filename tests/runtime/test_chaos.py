"""Clients that freeze, vanish, repeat themselves, come late or trickle, and a full disk: a real server survives.

A witness is a flight that goes on undisturbed while health is asked for. Nothing that the server
acknowledged is lost, and memory comes back.
"""

import contextlib
import json
import os
import signal
import socket as socketlib
import struct
import subprocess
import sys
import time
import urllib.request

import msgspec
import pytest
from chaos_witness import FRAMES, Line, Witness, config_of, urls_of

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import End, Hello, Limits, Observe, Start
from worldvln_edge.runtime.bench.null_server import NullServerConfig, NullServerProcess
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.wire import encode


def observe(id_: int, first: int, count: int, seg: int | None = None) -> Observe:
    return Observe(id=id_, session="s", first=first, frames=FRAMES[first - 1 : first - 1 + count], seg=seg)


@pytest.fixture
def server(tmp_path):
    with NullServerProcess(config_of(tmp_path, headers_within_s=1.0, body_within_s=1.0)) as server:
        yield server


def metric(server: NullServerProcess, name: str) -> float:
    text = urllib.request.urlopen(f"{server.http_url}/metrics", timeout=5).read().decode()
    (value,) = [line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(value)


def wait_until(is_so, within_s: float = 15.0) -> None:
    give_up_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < give_up_s, "it did not happen in time"
        time.sleep(0.05)


_STREAMING_CLIENT = """
import sys
from worldvln_edge.client import SessionClient
from worldvln_edge.runtime.bench.serve_load_client import jpeg_frames
frames = jpeg_frames((256, 256))
with SessionClient(sys.argv[1]) as client:
    while True:
        client.start("go", chain=True)
        client.observe(frames[:1])
        print("flies", flush=True)
        for _ in range(150):
            client.observe(frames)
        client.end()
"""


@pytest.mark.slow
def test_clients_that_freeze_in_full_flight_and_then_die_leave_nothing_behind(tmp_path):
    with NullServerProcess(config_of(tmp_path, session_ttl_s=10.0)) as server, Witness(server) as witness:
        clients = [
            subprocess.Popen([sys.executable, "-c", _STREAMING_CLIENT, url], stdout=subprocess.PIPE, text=True)
            for url in urls_of(server)
        ]
        try:
            for client in clients:
                assert client.stdout.readline() == "flies\n"
            time.sleep(0.2)
            for client in clients:
                client.send_signal(signal.SIGSTOP)
            time.sleep(1.0)
        finally:
            for client in clients:
                client.kill()
                client.wait()
                client.stdout.close()
        assert metric(server, "worldvln_sessions") == 4  # theirs, and the witness's
        wait_until(lambda: witness.still_flies() and metric(server, "worldvln_sessions") == 1, within_s=30.0)


def test_connections_that_are_reset_in_the_middle_of_a_message_free_their_place(server):
    message = encode(Hello(id=1, v=[1]), "msgpack")
    upgrade = (
        f"GET /v1/session HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()
    half_frame = b"\x82\xff" + struct.pack(">Q", 2**20) + b"\0\0\0\0" + message
    zmq_port = int(server.zmq_urls[1].rpartition(":")[2])
    openings = {
        server.port: [b"", upgrade[:40], upgrade, upgrade + half_frame, b"POST /v1/predict_delta_actions HTTP/1.1\r\n"],
        zmq_port: [b"", b"\xff\0\0\0\0\0\0\0\x01\x7f", b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48)],
    }
    with Witness(server):
        descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
        for port, starts in openings.items():
            for start in starts * 20:
                line = socketlib.create_connection(("127.0.0.1", port), timeout=5)
                line.sendall(start)
                line.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_LINGER, struct.pack("ii", 1, 0))
                line.close()  # an RST, no FIN
        wait_until(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= descriptors + 3)  # health asks meanwhile


def test_three_hundred_clients_that_come_at_once_over_ipc_find_room(server):
    path = server.zmq_urls[0].removeprefix("ipc://")
    os.kill(server.pid, signal.SIGSTOP)  # nobody is let in now, so all of them wait
    try:
        with contextlib.ExitStack() as lines:
            for _ in range(300):
                line = lines.enter_context(socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM))
                line.setblocking(False)
                line.connect(path)  # BlockingIOError where there is no room, which clients take for nobody there
    finally:
        os.kill(server.pid, signal.SIGCONT)
    with Witness(server):
        pass


@pytest.mark.parametrize("transport", [0, 1, 2], ids=["websocket", "ipc", "tcp"])
def test_messages_that_come_twice_late_or_in_another_order_change_nothing(server, transport):
    with Witness(server), Line(urls_of(server)[transport]) as line:
        line.ask(Hello(id=1, v=[1]))
        line.ask(Start(id=2, session="s", prompt="go"))
        first = line.ask(observe(3, 1, 1, seg=0))
        assert (first.seg, first.frames) == (0, 1)
        early = line.ask(observe(4, 18, 16))  # before what belongs in front of it
        assert (early.code, early.expected, early.frames) == ("gap", 2, 1)
        second = line.ask(observe(5, 2, 16, seg=1))
        assert (second.seg, second.frames) == (1, 17)
        for id_, again, as_before in ((6, observe(6, 2, 16, seg=1), second), (7, observe(7, 1, 1, seg=0), first)):
            answer = line.ask(again)
            assert (answer.re, answer.seg, answer.frames) == (id_, as_before.seg, 17)
            assert answer.actions == as_before.actions
        assert line.ask(observe(8, 10, 24, seg=2)).frames == 33  # overlaps what is there
        assert line.ask(End(id=9, session="s")).state == "ended"
        late = line.ask(observe(10, 34, 1))
        assert late.code == "unknown_session"
        assert line.ask(End(id=11, session="s")).state == "ended"


def test_wall_clock_that_steps_expires_no_session_and_misses_no_deadline(monkeypatch):
    limits = Limits(session_ttl_s=1.0)
    with BackgroundServer(NullPolicy(), limits=limits) as server, SessionClient(server.url) as client:
        client.start("go")
        assert client.observe(FRAMES[:1], deadline_ms=5000).segment == 0
        real_time, real_time_ns = time.time, time.time_ns
        for step_s in (10 * 365 * 86_400, -10 * 365 * 86_400):
            monkeypatch.setattr(time, "time", lambda step_s=step_s: real_time() + step_s)
            monkeypatch.setattr(time, "time_ns", lambda step_s=step_s: real_time_ns() + step_s * 10**9)
            assert abs(client.ping().server_ns - real_time_ns() - step_s * 10**9) < 10 * 10**9
            server.server.manager.expire()
            frames = 2 if step_s > 0 else 3
            answer = client.observe(FRAMES[frames - 1 : frames], deadline_ms=5000)
            assert (answer.frames, answer.is_late) == (frames, False)
        time.sleep(1.2)  # and a session still expires when its time has come
        server.server.manager.expire()
        with pytest.raises(ServerError, match="no such session"):
            client.observe(FRAMES[3:4])


def test_clients_that_trickle_their_request_are_cut_off_and_hold_nobody_up(server):
    request = b"POST /v1/predict_delta_actions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    upgrade = b"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-Slow: "
    body = request + b"Content-Length: 1000\r\n\r\n{"
    with Witness(server):
        lines = [
            (socketlib.create_connection(("127.0.0.1", server.port), timeout=10), start)
            for start in (request, upgrade, body) * 20
        ]
        for line, start in lines:
            line.sendall(start)
        give_up_s = time.monotonic() + 10
        open_lines = [line for line, _ in lines]
        while open_lines and time.monotonic() < give_up_s:  # one byte at a time, and never the last one
            time.sleep(0.1)
            for line in list(open_lines):
                try:
                    line.send(b"a")
                    line.setblocking(False)
                    if not line.recv(65536):
                        raise ConnectionResetError
                except BlockingIOError:
                    pass
                except OSError:
                    open_lines.remove(line)
                    line.close()
        assert open_lines == []


_FULL_DISK_SERVER = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from worldvln_edge.runtime.bench.null_server import main
main()
"""


def test_full_disk_under_the_journal_costs_the_journal_and_no_flight(tmp_path):
    config = NullServerConfig(journal=str(tmp_path / "journal"))
    command = [sys.executable, "-c", _FULL_DISK_SERVER, msgspec.json.encode(config).decode()]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(tmp_path / "log").open("w"), text=True
    )
    try:
        url = process.stdout.readline().strip()
        with SessionClient(url) as client:
            client.start("go", chain=True)
            segments = [client.observe(FRAMES[:1]).segment]
            segments += [client.observe(FRAMES[:16]).segment for _ in range(12)]  # 3 kB a frame, as it is kept
            assert segments == list(range(13))
            with SessionClient(url) as other:  # a session that fits has its journal all the same
                other.start("go")
                assert other.observe(FRAMES[:1]).segment == 0
                assert len(list((tmp_path / "journal").iterdir())) == 1
            assert json.loads(urllib.request.urlopen(f"http://{url.split('/')[2]}/health", timeout=5).read())["ready"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    log = (tmp_path / "log").read_text()
    assert "a session goes on without a journal" in log
    assert "Traceback" not in log
