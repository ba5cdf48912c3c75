"""Whatever clients say to a server process: it lives, tells nothing of the machine, and writes into its journal only.

Also five thousand sessions opened on one process: memory stays bounded, and a flight in progress is what it would be.
Source: spec/session_protocol.md 9, items 5 and 6.
"""

import base64
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from chaos_witness import FRAMES, HEALTH_WITHIN_MS, Line, Witness, config_of
from test_fuzzed_messages import Mutator

from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import End, Hello, Observe, Start
from worldvln_edge.runtime.bench.health_probe import HealthProbe
from worldvln_edge.runtime.bench.null_server import NullServerConfig, NullServerProcess
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH

NAMES = ("../../escaped", "/tmp/escaped", "..", "a/../../escaped", "~/escaped", "$HOME/escaped", "C:\\escaped", "s\0")
TEXTS = [base64.b64encode(frame).decode() for frame in FRAMES[:2]]


class Folders:
    """Where a process may think that it should write, each of its own."""

    def __init__(self, root: Path):
        self.root, self.journal = root, root / "journal"
        for name in ("here", "home", "temporary"):
            (root / name).mkdir()

    def environment(self) -> dict[str, str]:
        home, temporary = str(self.root / "home"), str(self.root / "temporary")
        return {**os.environ, "HOME": home, "XDG_CACHE_HOME": home, "TMPDIR": temporary, "PYTHONDONTWRITEBYTECODE": "1"}

    def strange_files(self) -> list[Path]:
        """What lies outside the journal, or bears a name that is not the journal's own."""
        files = [path for path in self.root.rglob("*") if path.is_file() or path.is_symlink()]
        own = re.compile(r"[0-9a-f]+(\.[a-z]+)?")
        return [path for path in files if path.parent != self.journal or not own.fullmatch(path.name)]


@contextlib.contextmanager
def watched_server(folders: Folders) -> Iterator[tuple[str, str, subprocess.Popen]]:
    """A server whose journal is the only folder that it was given: its WebSocket, its ZeroMQ address, and it."""
    config = NullServerConfig(journal=str(folders.journal), zmq_endpoints=("tcp://127.0.0.1:*",))
    command = [
        sys.executable,
        "-m",
        "worldvln_edge.runtime.bench.null_server",
        msgspec.json.encode(config).decode(),
    ]
    process = subprocess.Popen(
        command,
        cwd=folders.root / "here",
        env=folders.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url, zmq_url = process.stdout.readline().split()
        yield url, zmq_url, process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class Listener:
    """Keeps what the server said."""

    def __init__(self, folders: Folders):
        self._secrets = (str(folders.root), "Traceback", ".py", "site-packages")
        self.heard = 0

    def check(self, text: str) -> None:
        self.heard += 1
        assert not [secret for secret in self._secrets if secret in text], text


def hostile_http(url: str, listener: Listener) -> None:
    line = http.client.HTTPConnection("127.0.0.1", int(url.split("/")[2].rpartition(":")[2]), timeout=10)
    images = [
        "/etc/passwd",
        "file:///etc/passwd",
        "data:image/png;base64,/etc/passwd",
        "http://127.0.0.1/x",
        "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(),
        TEXTS[0],
    ]
    bodies = [
        {"session_id": name, "images_base64": [image], "instruction": "../../escaped", "debug": True}
        for name in NAMES
        for image in images
    ]
    for body in [*(json.dumps(body) for body in bodies), "", "{", "[" * 5000, '{"session_id": NaN}', "\0" * 100]:
        line.request("POST", PREDICT_PATH, body, {"Content-Type": "application/json"})
        answer = line.getresponse()
        listener.check(answer.read().decode())
        assert answer.status in (200, 400, 413, 422), (answer.status, body)
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/health/../x", "//etc/passwd", "/" + "x" * 5000):
        line.request("GET", path)
        answer = line.getresponse()
        listener.check(answer.read().decode())
        assert answer.status in (400, 404), (answer.status, path)
    line.close()


def hostile_line(url: str, listener: Listener, seed: int) -> None:
    mutator = Mutator(seed)
    with Line(url) as line:
        listener.check(repr(line.ask(Hello(id=1, v=[1], client="../../escaped"))))
        for index, name in enumerate(NAMES):
            for request in (
                Start(id=3 * index + 2, session=name, prompt="/etc/passwd"),
                Observe(id=3 * index + 3, session=name, first=1, frames=FRAMES[:1], prompt="../x"),
                End(id=3 * index + 4, session=name) if index % 2 else Start(id=99, session=name, resume=True),
            ):
                listener.check(repr(line.ask(request)))
        for _ in range(300):
            line.send(mutator.message())
            listener.check(repr(line.hear()))


def test_process_lives_tells_nothing_and_writes_into_its_journal_only(tmp_path):
    folders = Folders(tmp_path)
    with watched_server(folders) as (url, zmq_url, process):
        listener = Listener(folders)
        with HealthProbe("127.0.0.1", int(url.split("/")[2].rpartition(":")[2]), pause_s=0.05) as probe:
            hostile_http(url, listener)
            hostile_line(url, listener, seed=1)
            hostile_line(zmq_url, listener, seed=2)
            with SessionClient(url) as client:  # and it still serves
                client.start("go")
                assert [client.observe(FRAMES[a:b]).segment for a, b in ((0, 1), (1, 17), (17, 33))] == [0, 1, 2]
        assert process.poll() is None
        assert probe.failures == []
        assert all(took and max(took) < HEALTH_WITHIN_MS for took in probe.took_ms.values())
    assert listener.heard > 650
    assert list(folders.journal.iterdir()), "nothing was journalled, so nothing was put to the test"
    assert folders.strange_files() == []


@pytest.mark.slow
def test_five_thousand_sessions_leave_memory_bounded_and_the_flight_intact(tmp_path):
    config = config_of(tmp_path, max_sessions=64, min_idle_s=0.0)
    with NullServerProcess(config) as server, Witness(server) as witness, SessionClient(server.url) as other:

        def open_sessions(first: int, count: int) -> None:
            for index in range(first, first + count):
                other.start("go", session=f"session {index}")
                other.observe(FRAMES[:10])
                if index % 20 == 0:
                    assert witness.still_flies()

        open_sessions(0, 1000)
        before = server.resident_bytes()
        open_sessions(1000, 4000)
        assert server.resident_bytes() < before * 1.02
        assert other.ping().sessions <= 64
