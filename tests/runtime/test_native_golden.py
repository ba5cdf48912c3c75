"""The recorded flight, message by message, against a running server."""

import json

import pytest
from websockets.sync.client import connect

from worldvln_edge.runtime.doors.application import health_report
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.session_manager import SessionManager

BINDING = ("t", "re", "code", "session", "seg", "frames", "need", "done", "state", "emitted", "expected", "v")
BINDING += ("num_frames", "step", "points", "fps", "action", "head", "seed", "retry", "sessions", "queue", "ready")


@pytest.mark.golden
def test_recorded_flight_is_answered_as_recorded(golden):
    exchanges = json.loads((golden("protocol") / "native_flight.json").read_text())["exchanges"]
    # The recording's model takes 12 ms, which is what makes its 1 ms deadline impossible.
    with BackgroundServer(NullPolicy(infer_s=0.012)) as server, connect(server.url, compression=None) as socket:
        for exchange in exchanges:
            socket.send(json.dumps(exchange["request"]))
            answer, expected = json.loads(socket.recv(timeout=5)), exchange["response"]
            case = exchange["case"]
            assert {k: answer.get(k) for k in BINDING} == {k: expected.get(k) for k in BINDING}, case
            assert set(expected) <= set(answer), case
            if "actions" in expected:
                assert [len(row) for row in answer["actions"]] == [len(row) for row in expected["actions"]], case
            if case == "hello":
                assert set(expected["limits"].items()) <= set(answer["limits"].items())
                assert answer["image"] == expected["image"]


@pytest.mark.golden
def test_health_has_every_recorded_key(golden):
    expected = json.loads((golden("protocol") / "health.json").read_text())["exchanges"][0]["response"]["body"]
    manager = SessionManager(NullPolicy())
    report = health_report(manager)
    manager.close()
    assert list(report) == list(expected)
    assert {k: v for k, v in report.items() if k not in ("version", "backend")} == {
        k: v for k, v in expected.items() if k not in ("version", "backend")
    }
