"""Messages that are nearly right, by the thousand, over every transport: all are answered, and memory stays."""

import base64
import http.client
import json
import random
import time

import msgspec
import pytest
from chaos_witness import FRAMES, Line, Witness, config_of, urls_of
from openpi_calls import PolicyClient, pixels

from worldvln_edge.protocol import ERRORS, End, Hello, Observe, Ping, Start
from worldvln_edge.runtime.bench.null_server import NullServerProcess
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.memory_upkeep import GIVE_BACK_EVERY_S
from worldvln_edge.runtime.doors.openpi_codec import encode_map
from worldvln_edge.wire import encode


@pytest.fixture
def server(tmp_path):
    with NullServerProcess(config_of(tmp_path)) as server:
        yield server


class Mutator:
    """Messages that are nearly right: requests with bytes replaced, cut, doubled, or values of another kind."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._good = [
            encode(request, "msgpack")
            for request in (
                Hello(id=1, v=[1]),
                Start(id=2, session="fuzz", prompt="go", seed=3),
                Start(id=3, session="fuzz", resume=True),
                Observe(id=4, session="fuzz", first=1, frames=FRAMES[:2], seg=0, t_ns=[1, 2], deadline_ms=50.0),
                End(id=5, session="fuzz"),
                Ping(id=6, t_ns=7),
            )
        ]
        self._strange = [None, True, -1, 2**63, 1e308, float("nan"), "", "\0", "x" * 5000, b"\xff", [], {}, [[[]]] * 9]

    def message(self) -> bytes:
        """Never empty: an empty ZeroMQ message asks nothing."""
        rng, message = self._random, bytearray(self._random.choice(self._good))
        kind = rng.randrange(5)
        if kind == 0:
            for _ in range(rng.randint(1, 8)):
                message[rng.randrange(len(message))] = rng.randrange(256)
        elif kind == 1:
            del message[rng.randrange(1, len(message)) :]
        elif kind == 2:
            message += message[rng.randrange(len(message)) :]
        elif kind == 3:
            fields = msgspec.msgpack.decode(bytes(message))
            fields[rng.choice([*fields, "x"])] = rng.choice(self._strange)
            return msgspec.msgpack.encode(fields)
        else:
            return rng.randbytes(rng.randint(1, 200))
        return bytes(message)


def fuzz(url: str, count: int, seed: int) -> None:
    """Send mutated messages, a few on the way at once; each must be answered, with a known type."""
    mutator, sent = Mutator(seed), 0
    while sent < count:
        with Line(url) as line:
            for _ in range(min(100, count - sent)):
                message = mutator.message()
                line.send(message)
                line.hear()
                sent += 1
            assert line.ask(Ping(id=10**9)).re == 10**9


def fuzz_http(server: NullServerProcess, count: int, seed: int) -> None:
    """Post mutated bodies, over as few connections as the server allows; each is answered with a status it knows."""
    rng, statuses = random.Random(seed), {200, *(spec.http for spec in ERRORS.values())} - {500}
    images = [base64.b64encode(frame).decode() for frame in FRAMES[:2]]
    good = {"session_id": "fuzz", "images_base64": images, "prompt": "go", "seed": 3, "allow_future_segments": True}
    strange = [None, True, -1, 2**70, 1e308, float("nan"), "", "\0", "x" * 5000, [], {}, [[[]]] * 9, [1], ["!"]]
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(count):
        body = bytearray(json.dumps(good | {rng.choice([*good, "x"]): rng.choice(strange)}).encode())
        if rng.random() < 0.5:
            body[rng.randrange(len(body))] = rng.randrange(256)
        line.request("POST", PREDICT_PATH, bytes(body), {"Content-Type": "application/json"})
        answer = line.getresponse()
        text = answer.read()
        assert answer.status in statuses, text
        assert b"Traceback" not in text
    line.close()


def fuzz_openpi(server: NullServerProcess, count: int, seed: int) -> None:
    """Send mutated observations of openpi's protocol, hundreds over one connection; each gets a result or an error."""
    rng = random.Random(seed)
    good = {"images": pixels(1, 2), "prompt": "go", "reply": "step", "seed": 3, "session_id": "fuzz", "first_frame": 1}
    strange = [None, True, -1, 2**63, 1e308, float("nan"), "", "\0", "x" * 5000, b"\xff", [], {}, [[[]]] * 9]
    sent = 0
    while sent < count:
        with PolicyClient(server.port) as client:
            for _ in range(min(200, count - sent)):
                message = bytearray(encode_map(good | {rng.choice([*good, "x"]): rng.choice(strange)}))
                kind = rng.randrange(4)
                if kind == 0:
                    for _ in range(rng.randint(1, 8)):
                        message[rng.randrange(len(message))] = rng.randrange(256)
                elif kind == 1:
                    del message[rng.randrange(len(message)) :]
                elif kind == 2:
                    message = bytearray(rng.randbytes(rng.randint(0, 200)))
                answer = client.ask_bytes(bytes(message))
                sent += 1
                if isinstance(answer, str):
                    code, _, text = answer.partition(": ")
                    assert code in set(ERRORS) - {"internal"}, answer
                    assert "Traceback" not in text
            assert client.ask(images=pixels(0), prompt="go", reset=True)["num_received_frames"] == 1


TRANSPORTS = ("websocket", "zmq ipc", "zmq tcp", "http", "openpi")


def send_fuzzed(server: NullServerProcess, transport: str, count: int, seed: int) -> None:
    if transport == "http":
        fuzz_http(server, count, seed)
    elif transport == "openpi":
        fuzz_openpi(server, count, seed)
    else:
        fuzz(url_of(server, transport), count, seed)


def url_of(server: NullServerProcess, transport: str) -> str:
    """Of the native protocol; WebSocket where the transport is another one."""
    return dict(zip(TRANSPORTS, urls_of(server), strict=False)).get(transport, server.url)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_fuzzed_messages_are_answered_and_a_flight_goes_on(server, transport):
    with Witness(server, url_of(server, transport)):
        send_fuzzed(server, transport, 300, seed=TRANSPORTS.index(transport))


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ten_thousand_fuzzed_messages_leave_memory_where_it_was(server, transport):
    with Witness(server, url_of(server, transport)):
        send_fuzzed(server, transport, 3000, seed=1)  # what is allocated once
        before = settled_bytes(server)
        send_fuzzed(server, transport, 10_000, seed=2)
        assert settled_bytes(server) < before * 1.02


def settled_bytes(server: NullServerProcess) -> int:
    """Resident memory once the server has given back what is free."""
    time.sleep(1.5 * GIVE_BACK_EVERY_S)
    return server.resident_bytes()
