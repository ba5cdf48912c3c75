"""The protocol page is enough: a client that was written from it alone flies against a real server, and survives it.

Source: docs/protocol.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import independent_client
import numpy as np
import pytest
from independent_client import Chunk, Client, ConnectionLost, Flight, ServerError, WebSocketClient, ZmqClient
from PIL import Image

PROMPT, SEED = "move forward 5 meters", 7
DOORS = ["ws-msgpack", "ws-json", "zmq-msgpack", "zmq-json"]

Actions = list[tuple[tuple[float, ...], ...]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running server and its two ports."""

    process: subprocess.Popen[bytes]
    ws: int
    zmq: int

    def client(self, door: str, *, ws: int | None = None, zmq: int | None = None, **options: object) -> Client:
        kind, encoding = door.split("-")
        options = {"text": encoding == "json", "timeout": 20.0} | options
        if kind == "ws":
            return WebSocketClient(f"ws://127.0.0.1:{ws or self.ws}/v1/session", **options)
        return ZmqClient(f"tcp://127.0.0.1:{zmq or self.zmq}", **options)


@contextlib.contextmanager
def running(bundle: Path, *extra: str, ports: tuple[int, int] | None = None) -> Iterator[Server]:
    ws, zmq = ports or (free_port(), free_port())
    doors = ["--ws", f"127.0.0.1:{ws}", "--zmq", f"tcp://127.0.0.1:{zmq}"]
    command = [sys.executable, "-m", "worldvln_edge", "serve", str(bundle), "--threads", "1", *doors, *extra]
    process = subprocess.Popen(command)
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError):  # HTTPError and URLError are OSErrors
                urllib.request.urlopen(f"http://127.0.0.1:{ws}/readyz", timeout=1).close()
                break
            time.sleep(0.1)
        yield Server(process, ws, zmq)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Server]:
    with running(tiny_bundle) as started:
        yield started


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    """JPEG frames of a drifting pattern."""
    pattern = np.random.default_rng(1).integers(0, 255, (12, 96, 3), dtype=np.uint8)
    jpegs = []
    for shift in range(128):
        buffer = io.BytesIO()
        Image.fromarray(np.roll(pattern, shift, 1)).resize((96, 64)).save(buffer, "JPEG")
        jpegs.append(buffer.getvalue())
    return jpegs


def fly(flight: Flight, frames: list[bytes], before: Callable[[int], None] = lambda seg: None) -> Actions:
    """A whole session in the natural portions: 1 frame, then `step` for every segment."""
    assert flight.client.welcome is not None
    step, flown, sent = flight.client.welcome.step, [], 0
    while not flight.done:
        before(flight.next_seg)
        count = step if sent else 1
        chunk = flight.observe(frames[sent : sent + count])
        sent += count
        assert chunk.seg == len(flown)
        assert chunk.frames == sent
        assert chunk.need == (0 if chunk.done else step)
        flown.append(chunk.actions)
    return flown


@pytest.fixture(scope="module")
def reference(server: Server, frames: list[bytes]) -> Actions:
    with server.client("ws-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        flown = fly(flight, frames)
        flight.end()
        return flown


class Proxy:
    """A TCP hop that can be cut, as a radio link is."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self.pairs.append((near, far))
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    @staticmethod
    def _copy(a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        with contextlib.suppress(OSError):
            b.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self.pairs.clear()


@pytest.mark.parametrize("door", DOORS)
def test_a_whole_session_gives_equal_actions(
    server: Server, frames: list[bytes], reference: Actions, door: str
) -> None:
    with server.client(door) as client:
        welcome = client.welcome
        assert welcome is not None
        assert welcome.version == 1
        flight = Flight(client, PROMPT, seed=SEED)
        assert fly(flight, frames) == reference
        assert len(reference) == len(welcome.points) - 1
        assert all(len(chunk) == welcome.step for chunk in reference)
        assert client.call(t="start", session=flight.session, resume=True)["state"] == "done"
        assert flight.end()["state"] == "ended"
        assert flight.end()["state"] == "ended"
        assert client.ping()["ready"] is True
        with pytest.raises(ServerError, match="unknown_session"):
            flight.observe(frames[:1])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("moment", ["between", "in flight", "answer lost"])
def test_a_cut_link_changes_nothing(
    server: Server, frames: list[bytes], reference: Actions, door: str, moment: str
) -> None:
    proxy = Proxy(server.ws if door.startswith("ws") else server.zmq)
    with server.client(door, ws=proxy.port, zmq=proxy.port, timeout=3.0) as client:
        flight = Flight(client, PROMPT, seed=SEED)
        assert client.welcome is not None
        step = client.welcome.step

        def cut(seg: int) -> None:
            if seg != 1:
                return
            if moment != "between":
                flight.log.extend(frames[1 : 1 + step])
                request = client.submit(**flight.request(2))
                del flight.log[1:]
                if moment == "answer lost":
                    client.collect(request)
            proxy.cut()

        assert fly(flight, frames, cut) == reference
        assert flight.resumes >= 1


def test_cutting_the_own_socket(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        assert fly(flight, frames, lambda seg: client.cut()) == reference
        assert flight.resumes == len(reference)


def test_a_session_moves_from_websocket_to_zeromq(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-json") as one, server.client("zmq-msgpack") as two:
        flight = Flight(one, PROMPT, seed=SEED)
        assert flight.observe(frames[:1]).actions == reference[0]
        flight.client = two
        assert flight.resume()["emitted"] == 0
        assert two.welcome is not None
        assert flight.observe(frames[1 : 1 + two.welcome.step]).actions == reference[1]


def test_duplicates_get_the_kept_answer(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("zmq-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        request = {"t": "observe", "session": flight.session, "first": 1, "frames": frames[:1], "seg": 0}
        answers = [Chunk.read(client.call(**request), client.welcome.step) for _ in range(3)]
        assert [answer.actions for answer in answers] == [reference[0]] * 3
        del request["seg"]
        assert client.call(**request)["seg"] == -1
        flight.log, flight.next_seg = frames[:1], 1
        overlapping = flight.request(1) | {"frames": frames[: 1 + client.welcome.step]}
        assert Chunk.read(client.call(**overlapping), client.welcome.step).actions == reference[1]


def test_a_gap_is_filled(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        flight.observe(frames[:1])
        step = client.welcome.step
        with pytest.raises(ServerError) as gap:
            client.call(t="observe", session=flight.session, first=3, frames=frames[2:4])
        assert (gap.value.code, gap.value.expected, gap.value.frames, gap.value.retry) == ("gap", 2, 1, True)
        flight.log += frames[1:step]  # never sent
        assert flight.observe(frames[step : step + 1]).actions == reference[1]


def test_frames_past_the_end_are_dropped_but_counted_from_the_stored_ones(
    server: Server, frames: list[bytes], reference: Actions
) -> None:
    with server.client("ws-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        assert flight.observe(frames[: client.welcome.num_frames + 2]).actions == reference[0]
        for expected in reference[1:]:  # `first` is behind the dropped frames: a gap, and filled
            assert flight.observe(frames[:1]).actions == expected
        assert flight.done


@pytest.mark.parametrize("door", DOORS)
def test_wrong_messages(server: Server, door: str) -> None:
    with server.client(door) as client:
        for raw, code in [
            (b"\xc1\xc1\xc1", "bad_request"),
            ('{"t": ', "bad_request"),
            (client.encode({"t": "ping"}), "bad_request"),
            (client.encode({"t": "ping", "id": "one"}), "invalid_field"),
            (client.encode({"t": "fly", "id": 70}), "bad_request"),
            (client.encode({"t": "observe", "id": 71, "session": "x", "first": 0, "frames": []}), "invalid_field"),
            (client.encode({"t": "observe", "id": 72, "session": "x", "first": 1, "frames": []}), "unknown_session"),
            (client.encode({"t": "hello", "id": 73, "v": [99]}), "unsupported_version"),
            (client.encode({"t": "cancel", "id": 74, "target": 10**6}), "bad_request"),
        ]:
            client.send_raw(raw)
            answer = client.receive_any(5)
            assert (answer["t"], answer["code"], answer["retry"]) == ("error", code, False), raw
        flight = Flight(client, PROMPT)
        with pytest.raises(ServerError, match="bad_image"):
            flight.observe([b"not an image"])
        assert client.call(t="start", session=flight.session, resume=True)["frames"] == 0


@pytest.mark.parametrize("door", ["ws-msgpack", "zmq-msgpack"])
def test_hello_comes_first(server: Server, door: str) -> None:
    client = server.client(door)
    client._open()
    with pytest.raises(ServerError) as error:
        client.ask(t="ping")
    assert (error.value.code, error.value.retry) == ("hello_required", True)
    client.hello()
    client.close()


def test_busy_is_waited_for(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        many = [client.submit(t="observe", session=flight.session, first=1, frames=frames[:1], seg=0) for _ in range(9)]
        answers = [client.collect(request) for request in many]
        assert {answer.get("code") for answer in answers} == {None, "busy"}
        assert flight.observe(frames[:1]).actions == reference[0]


def test_a_prompt_in_flight_and_seeds(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        assert flight.observe(frames[:1]).actions == reference[0]
        chunk = flight.observe(frames[1 : 1 + client.welcome.step], prompt="turn left at the red car")
        assert chunk.seg == 1
        assert chunk.actions != reference[1]
        assert Flight(client, PROMPT, seed=SEED + 1).observe(frames[:1]).actions != reference[0]


def test_deadline(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("zmq-json") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        with pytest.raises(ServerError) as error:
            flight.observe(frames[:1], deadline_ms=0)
        assert (error.value.code, error.value.retry, error.value.frames) == ("deadline", True, 1)
        assert flight.observe(deadline_ms=20000).actions == reference[0]


def test_cancel(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-msgpack") as client:
        flight = Flight(client, PROMPT, seed=SEED)
        flight.log = frames[:1]
        target = client.submit(**flight.request(1))
        assert client.cancel(target)["session"] == flight.session
        answer = client.collect(target)
        assert answer.get("code") == "cancelled" or answer["seg"] == 0  # it may have been quicker
        assert flight.observe().actions == reference[0]


def test_chain_goes_on(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-msgpack") as client:
        flown = fly(Flight(client, PROMPT, seed=SEED, chain=True, max_horizons=2), frames)
        assert len(flown) == 2 * len(reference)
        assert flown[: len(reference)] == reference


def test_behind(server: Server, frames: list[bytes], reference: Actions) -> None:
    with server.client("ws-msgpack") as client:
        flight, step = Flight(client, PROMPT, seed=SEED, emit="behind"), client.welcome.step
        assert flight.observe(frames[:1]).seg == -1
        for seg, actions in enumerate(reference):
            chunk = flight.observe(frames[1 + seg * step : 1 + (seg + 1) * step])
            assert (chunk.seg, chunk.actions) == (seg, actions)


def test_keys(tiny_bundle: Path, tmp_path: Path, frames: list[bytes], reference: Actions) -> None:
    keys = ["first-key-0123456789abcdef", "second-key-0123456789abcdef"]
    file = tmp_path / "keys.txt"
    file.write_text("\n".join(keys) + "\n")
    file.chmod(0o600)
    with running(tiny_bundle, "--key-file", str(file)) as server:
        for door in ("ws-json", "zmq-msgpack"):
            for key in (None, "wrong"):
                with pytest.raises(ServerError) as error:
                    server.client(door, key=key).connect()
                assert error.value.code == "unauthorized"
            with server.client(door, key=keys[0]) as mine, server.client(door, key=keys[1]) as other:
                flight = Flight(mine, PROMPT, seed=SEED)
                with pytest.raises(ServerError, match="unknown_session"):
                    other.call(t="start", session=flight.session, resume=True)
                assert flight.observe(frames[:1]).actions == reference[0]


@pytest.mark.parametrize("door", ["ws-msgpack", "zmq-msgpack"])
def test_bye_and_a_restarted_server(tiny_bundle: Path, frames: list[bytes], door: str) -> None:
    ports = free_port(), free_port()
    with running(tiny_bundle, ports=ports) as server:
        client = server.client(door, timeout=5.0)
        client.connect()
        flight = Flight(client, PROMPT)
        flight.observe(frames[:1])
    with pytest.raises(ConnectionLost, match="the server stops"):
        client.collect(10**6)
    assert client.byes[0]["reason"] == "shutdown"
    with running(tiny_bundle, ports=ports):
        with pytest.raises(ServerError, match="unknown_session"):  # no --journal: the session is gone
            flight.observe(frames[1:2])
        assert Flight(client, PROMPT).observe(frames[:1]).seg == 0
    client.close()


@pytest.mark.parametrize("door", ["ws-msgpack", "zmq-msgpack"])
def test_a_killed_server_with_a_journal(
    tiny_bundle: Path, tmp_path: Path, frames: list[bytes], reference: Actions, door: str
) -> None:
    ports, extra = (free_port(), free_port()), ("--journal", str(tmp_path / "journal"))
    with contextlib.ExitStack() as servers:
        server = servers.enter_context(running(tiny_bundle, *extra, ports=ports))
        with server.client(door, timeout=5.0) as client:

            def restart(seg: int) -> None:
                if seg == 1:
                    server.process.kill()
                    server.process.wait()
                    servers.enter_context(running(tiny_bundle, *extra, ports=ports))

            flight = Flight(client, PROMPT, seed=SEED)
            assert fly(flight, frames, restart) == reference
            assert flight.resumes >= 1


def test_max_requests_per_s_is_waited_for(tiny_bundle: Path, frames: list[bytes], reference: Actions) -> None:
    with running(tiny_bundle, "--max-requests-per-s", "5") as server, server.client("ws-msgpack") as client:
        assert fly(Flight(client, PROMPT, seed=SEED), frames) == reference
        assert [client.ping()["t"] for _ in range(5)] == ["pong"] * 5


def test_nothing_of_the_package_is_imported() -> None:
    assert "worldvln_edge" not in Path(independent_client.__file__).read_text(encoding="utf-8")


def test_health(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ws}/health", timeout=5) as answer:
        assert json.load(answer)["ready"] is True
