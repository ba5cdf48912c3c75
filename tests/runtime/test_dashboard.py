"""The dashboard's data and buttons over HTTP: who gets them, what they say, what they do."""

import asyncio
import http.client
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import UNSET, Limits, Observe, ProtocolError, Start
from worldvln_edge.runtime.dashboard.flight_board import FlightBoard
from worldvln_edge.runtime.doors.openpi_codec import FrameList
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.policy import NonFiniteActionsError, StoppedError
from worldvln_edge.runtime.sessions.session_events import SegmentEmitted, SettingsReplaced
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.runtime.worldvln.prediction_preview import PredictionPreview
from worldvln_edge.runtime.worldvln.worldvln_policy import PREVIEW_GRAPHS, load_policy

FRAME = np.full((8, 8, 3), 127, np.uint8)


class Page:
    """What the page's script does, without a browser."""

    def __init__(self, server: BackgroundServer, **headers: str):
        self._port, self.headers = server.server.http_port, headers

    def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, f"/dashboard{path}", body or None, {**self.headers, **headers})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def steer(self, uid: str, command: object, **headers: str) -> tuple[int, dict]:
        status, body, _ = self.ask("POST", f"/api/{uid}", json.dumps(command).encode(), **headers)
        return status, json.loads(body) if body else {}

    def states(self) -> list[dict]:
        """What it hears first."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("GET", "/dashboard/api/states", headers=self.headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            return json.loads(answer.readline())
        finally:
            connection.close()


@pytest.fixture
def server() -> Iterator[BackgroundServer]:
    with BackgroundServer(NullPolicy(), dashboard=True) as server:
        yield server


def jpeg(frame: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG")
    return stream.getvalue()


def test_flight_is_shown_as_it_goes(server: BackgroundServer):
    page = Page(server)
    assert page.states() == []
    with SessionClient(server.url) as client:
        client.start("fly to the red tower", seed=7)
        client.observe([FRAME])
        answer = client.observe([FRAME] * 16)
        (state,) = page.states()
        assert (state["prompt"], state["seed"]) == ("fly to the red tower", 7)
        assert (state["frames"], state["frames_total"], state["emitted"], state["segments"]) == (17, 49, 1, 3)
        assert len(state["path"]) == 17
        assert len(state["plan"]) == 17
        assert state["plan"][0] == state["path"][-1]
        assert [times["segment"] for times in state["times"]] == [0, 1]
        assert answer.hold is None
        client.end()
    (state,) = page.states()
    assert state["ended"] == "ended"


def test_path_is_that_of_the_client_where_it_tells_its_poses(server: BackgroundServer):
    with SessionClient(server.url) as client:
        client.start("go")
        client.observe([FRAME, FRAME], poses=[[100.0, 20.0, 30.0, 0.0, 90.0, 0.0], [110.0, 20.0, 30.0, 0.0, 91.0, 0.0]])
        (state,) = Page(server).states()
    assert state["path"] == [[100.0, 20.0, 30.0, 90.0], [110.0, 20.0, 30.0, 91.0]]


def test_path_ends_at_places_that_can_be_drawn(server: BackgroundServer):
    with SessionClient(server.url) as client:
        client.start("go")
        client.observe([FRAME], poses=[[1e300, -1e300, 0.0, 0.0, 0.0, 0.0]])
        (state,) = Page(server).states()
    assert state["path"] == [[1e9, -1e9, 0.0, 0.0]]


def test_operator_holds_and_resumes(server: BackgroundServer):
    page = Page(server)
    with SessionClient(server.url) as client:
        client.start("go")
        assert client.observe([FRAME]).hold is None
        uid = page.states()[0]["uid"]
        assert page.steer(uid, {"hold": True}) == (204, {})
        held = client.observe([FRAME] * 16)
        assert held.hold == "operator"
        assert not held.actions.any()
        assert page.steer(uid, {"hold": False}) == (204, {})
        assert client.observe([FRAME] * 16).hold is None
    (state,) = page.states()
    assert state["notes"] == [{"segment": 1, "kind": "hold", "reason": "operator"}]
    assert not state["is_held"]


def test_operator_changes_the_instruction_and_a_client_that_repeats_its_own_does_not_undo_it(server: BackgroundServer):
    page = Page(server)
    with SessionClient(server.url) as client:
        client.start("first")
        uid = page.states()[0]["uid"]
        page.steer(uid, {"prompt": "second"})
        client.observe([FRAME], prompt="first")
        assert page.states()[0]["prompt"] == "second"
        client.observe([FRAME] * 16, prompt="third")
        assert page.states()[0]["prompt"] == "third"


def test_hold_outlives_a_restart_of_the_server(tmp_path: Path):
    def serving() -> BackgroundServer:
        journal = SessionJournal(tmp_path / "journal", max_bytes=10**8, ttl_s=600.0)
        return BackgroundServer(NullPolicy(), dashboard=True, journal=journal)

    with serving() as server, SessionClient(server.url) as client:
        client.start("go", session="mine")
        client.observe([FRAME])
        Page(server).steer(Page(server).states()[0]["uid"], {"hold": True})
    with serving() as server, SessionClient(server.url) as client:
        client.start(session="mine", resume=True)
        assert Page(server).states()[0]["is_held"]
        assert client.observe([FRAME] * 16).hold == "operator"


def test_instruction_of_the_operator_outlives_a_restart_and_a_client_that_repeats_its_own(tmp_path: Path):
    def serving() -> BackgroundServer:
        journal = SessionJournal(tmp_path / "journal", max_bytes=10**8, ttl_s=600.0)
        return BackgroundServer(NullPolicy(), dashboard=True, journal=journal)

    with serving() as server, SessionClient(server.url) as client:
        client.start("first", session="mine")
        client.observe([FRAME])
        Page(server).steer(Page(server).states()[0]["uid"], {"prompt": "second"})
    with serving() as server, SessionClient(server.url) as client:
        client.start(session="mine", resume=True)
        client.observe([FRAME] * 16, prompt="first")
        assert Page(server).states()[0]["prompt"] == "second"


def test_client_that_starts_its_session_again_is_still_held(server: BackgroundServer):
    page = Page(server)
    with SessionClient(server.url) as client:
        client.start("go", session="mine")
        page.steer(page.states()[0]["uid"], {"hold": True})
    with SessionClient(server.url) as client:
        client.start("go on", session="mine")
        old, new = page.states()
        assert (old["ended"], new["ended"], new["is_held"]) == ("replaced", "", True)
        assert client.observe([FRAME]).hold == "operator"
        page.steer(new["uid"], {"hold": False})
        assert client.observe([FRAME] * 16).hold is None


class NanSession(NullSession):
    """Emits nothing that can be flown."""

    def observe(self, frames, **options):
        chunk = super().observe(frames, **options)
        if chunk is not None:
            self.emitted -= 1
            raise NonFiniteActionsError(replace(chunk, actions=np.full_like(chunk.actions, np.nan)))


class NanPolicy(NullPolicy):
    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        return NanSession(self, prompt, seed=seed, emit=emit)


def test_held_drone_stands_still_whatever_the_model_gives():
    with BackgroundServer(NanPolicy(), dashboard=True) as server, SessionClient(server.url) as client:
        client.start("go")
        page = Page(server)
        page.steer(page.states()[0]["uid"], {"hold": True})
        answer = client.observe([FRAME])
        assert answer.hold == "operator"
        assert not answer.actions.any()


class SlowSession(NullSession):
    """Computes until it is told to go on; remembers what it was told in between."""

    flown: list[str]
    begun: threading.Event
    goes_on: threading.Event

    def observe(self, frames, **options):
        self.begun.set()
        assert self.goes_on.wait(60)
        self.flown.append(self.prompt)
        return super().observe(frames, **options)


def test_instruction_that_comes_during_a_segment_holds_from_the_next_one_on_and_a_hold_at_once():
    """Watchers hear of it where it takes effect, so that a replay flies what was flown."""
    policy, told = NullPolicy(), []
    flown, begun, goes_on = [], threading.Event(), threading.Event()

    def new_session(prompt, *, seed=0, negative_prompt="", emit="ahead"):
        session = SlowSession(policy, prompt, seed=seed, emit=emit)
        session.flown, session.begun, session.goes_on = flown, begun, goes_on
        return session

    policy.new_session = new_session
    raw = {"fmt": "rgb8", "w": 8, "h": 8}

    async def fly() -> list[str | None]:
        manager = SessionManager(policy)
        manager.events.subscribe(told.append)
        await manager.start("", Start(id=1, session="a", prompt="first"))
        uid = told[0].uid
        asking = asyncio.create_task(
            manager.observe("", Observe(id=2, session="a", first=1, frames=[bytes(192)], **raw))
        )
        await asyncio.to_thread(begun.wait, 60)
        manager.operator.steer("", uid, prompt="second", hold=True)
        goes_on.set()
        first = await asking
        manager.operator.steer("", uid, hold=False)
        later = await manager.observe("", Observe(id=3, session="a", first=2, frames=[bytes(192)] * 16, **raw))
        manager.close()
        return [None if answer.hold is UNSET else answer.hold for answer in (first, later)]

    assert asyncio.run(fly()) == ["operator", None]
    assert flown == ["first", "second"]
    told = [event for event in told if isinstance(event, SettingsReplaced | SegmentEmitted)]
    assert [
        (event.prompt, event.is_held) if isinstance(event, SettingsReplaced) else event.chunk.segment for event in told
    ] == [("first", True), 0, ("second", True), ("second", False), 1]


def test_request_that_is_refused_at_the_entrance_is_noted():
    """A server with too much to do: the frames of that flight are dropped, and its operator sees it."""
    policy, limits = NullPolicy(infer_s=0.5), Limits(max_queue=1)
    raw, board = {"fmt": "rgb8", "w": 8, "h": 8}, FlightBoard()

    async def fly() -> list[str]:
        manager = SessionManager(policy, limits=limits)
        manager.events.subscribe(board.watch)
        for name in ("a", "b", "c"):
            await manager.start("", Start(id=1, session=name, prompt=name))
        answers = await asyncio.gather(
            *(
                manager.observe("", Observe(id=2, session=name, first=1, frames=[bytes(192)], **raw))
                for name in ("a", "b", "c")
            ),
            return_exceptions=True,
        )
        states = await anext(board.states(""))
        manager.close()
        refused = [str(error) for error in answers if isinstance(error, ProtocolError)]
        noted = [note.reason for state in states for note in state.notes]
        assert len(refused) == len(noted) > 0
        return noted

    assert all(reason.startswith("overloaded: ") for reason in asyncio.run(fly()))


def test_watcher_that_fails_ends_no_flight(caplog: pytest.LogCaptureFixture):
    def broken(event):
        raise KeyError("a fault of the dashboard")

    board = FlightBoard()
    with (
        BackgroundServer(NullPolicy(), watchers=[broken, board.watch]) as server,
        SessionClient(server.url) as client,
    ):
        client.start("go")
        assert client.observe([FRAME]).hold is None
    assert caplog.text.count("a watcher of sessions failed") == 1
    (state,) = asyncio.run(anext(board.states("")))
    assert (state.frames, state.emitted) == (1, 0)


def test_page_does_not_take_the_requests_of_the_flight_that_it_shows():
    limits = Limits(max_requests_per_s=0.01)  # after a burst of four
    with BackgroundServer(NullPolicy(), dashboard=True, limits=limits) as server, SessionClient(server.url) as client:
        client.start("go")
        page = Page(server)
        answers = [page.ask("GET", "/api/0/frame")[0] for _ in range(20)]
        assert 429 in answers
        assert client.observe([FRAME]).hold is None


def test_camera_is_shown_as_it_was_sent(server: BackgroundServer):
    page, sent = Page(server), jpeg(np.full((30, 40, 3), 200, np.uint8))
    with SessionClient(server.url) as client:
        client.start("go")
        uid = page.states()[0]["uid"]
        assert page.ask("GET", f"/api/{uid}/frame")[0] == 204
        client.observe([sent])
        status, body, headers = page.ask("GET", f"/api/{uid}/frame")
        assert (status, body, headers["content-type"]) == (200, sent, "image/jpeg")
        assert page.ask("GET", f"/api/{uid}/predicted")[0] == 204  # this policy predicts nothing


def test_what_watchers_keep_of_a_repeated_prefix_is_what_is_new():
    message = np.zeros((40, 8, 8, 3), np.uint8)
    frames = FrameList(list(message), Limits())
    (newest,) = frames.sent(slice(39, None))
    assert newest.data.base is None  # no view of all forty
    assert frames.sent(slice(0, None))[0].data.base is message


def test_predicted_frames_are_a_strip(tiny_bundle: Path):
    policy = load_policy(tiny_bundle, side_graphs=PREVIEW_GRAPHS)
    height, width = policy.info.image_hw
    points = policy.info.horizon.points
    with BackgroundServer(policy, dashboard=True) as server, SessionClient(server.url) as client:
        page = Page(server)
        client.start("go")
        client.observe([FRAME])
        uid = page.states()[0]["uid"]
        strips = [page.ask("GET", f"/api/{uid}/predicted")]
        client.observe([FRAME] * (points[1] - points[0]))
        strips.append(page.ask("GET", f"/api/{uid}/predicted"))
    for status, body, headers in strips:
        assert status == 200
        assert Image.open(io.BytesIO(body)).size == (width * int(headers["x-frames"]), height)
    assert strips[0][1] != strips[1][1]


def test_predicting_makes_way_and_goes_on_and_holds_no_more_than_was_promised(tiny_bundle: Path):
    policy = load_policy(tiny_bundle, side_graphs=PREVIEW_GRAPHS)
    points = policy.info.horizon.points
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (*policy.info.image_hw, 3), np.uint8) for _ in range(points[-1])]

    session, given, stops = policy.new_session("go"), 0, 0
    for point in points[:-1]:
        assert session.observe(frames[given:point]) is not None
        given = point
    while True:
        try:
            found = session.predicted_frames(lambda: True)
            break
        except StoppedError:
            stops += 1
    assert stops > 1
    observed = session.observed_clips[: policy.clips_of(session.emitted)[0]]
    np.testing.assert_array_equal(found, PredictionPreview(policy.engines).frames(observed, session.last_prediction))
    assert session.predicted_frames() is found  # a second page costs nothing
    assert session.held_bytes <= policy.session_bytes
    policy.close()


def test_without_the_option_there_is_no_dashboard():
    with BackgroundServer(NullPolicy()) as server:
        assert Page(server).ask("GET", "/")[0] == 404


def test_page_needs_no_key_and_its_data_does():
    with BackgroundServer(NullPolicy(), dashboard=True, keys=("one", "two")) as server:
        one, two, nobody = (
            Page(server, **head) for head in ({"Authorization": "Api-Key one"}, {"Authorization": "Api-Key two"}, {})
        )
        status, body, headers = nobody.ask("GET", "/")
        assert status == 200
        assert b"dashboard.js" in body
        assert "default-src 'none'" in headers["content-security-policy"]
        with SessionClient(server.url, key="one") as client:
            client.start("secret errand")
            client.observe([FRAME])
            (state,) = one.states()
            assert two.states() == []
            for path in ("/api/states", f"/api/{state['uid']}/frame", f"/api/{state['uid']}/predicted"):
                assert nobody.ask("GET", path)[0] == 401
            assert nobody.steer(state["uid"], {"hold": True})[0] == 401
            assert two.steer(state["uid"], {"hold": True})[1]["code"] == "unknown_session"
            assert two.ask("GET", f"/api/{state['uid']}/frame")[0] == 204
            assert client.observe([FRAME] * 16).hold is None


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "["},
        {"Host": "[::1"},
        {"Host": "rebound.example:8001", "Origin": "http://rebound.example:8001"},
        {"Host": "rebound.example:8001"},
    ],
)
def test_pages_of_other_origins_are_refused(server: BackgroundServer, headers: dict[str, str]):
    status, answer = Page(server).steer("0" * 16, {"hold": True}, **headers)
    assert (status, answer["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ({"fly": True}, "bad_request"),
        ({"hold": "yes"}, "bad_request"),
        ([], "bad_request"),
        ({"prompt": "  "}, "invalid_field"),
        ({"prompt": "a" * 20_000}, "too_large"),
        ({"prompt": "a" * 5_000}, "too_large"),
        ({"hold": True}, "unknown_session"),
    ],
)
def test_commands_that_make_no_sense_are_refused(server: BackgroundServer, command: object, code: str):
    status, answer = Page(server).steer("0" * 16, command)
    assert answer["code"] == code
    assert 400 <= status < 500


@pytest.mark.parametrize("name", ["__init__.py", "flight_board.py", "nothing.js", "..%2Fdashboard_door.py"])
def test_only_files_of_the_page_are_given_out(server: BackgroundServer, name: str):
    assert Page(server).ask("GET", f"/{name}")[0] == 404


def test_server_that_stops_does_not_wait_for_pages_that_read():
    with BackgroundServer(NullPolicy(), dashboard=True) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server.http_port, timeout=60)
        connection.request("GET", "/dashboard/api/states")
        answer = connection.getresponse()
        assert json.loads(answer.readline()) == []
    assert answer.read() == b""
    connection.close()


def test_sessions_that_ended_are_forgotten_in_time(server: BackgroundServer):
    for number in range(12):
        with SessionClient(server.url) as client:
            client.start(f"flight {number}")
            client.end()
    assert [state["prompt"] for state in Page(server).states()] == [f"flight {number}" for number in range(4, 12)]


def test_board_ignores_sessions_that_it_did_not_see_begin():
    from worldvln_edge.runtime.sessions.session_events import SessionResumed

    board = FlightBoard()
    board.watch(SessionResumed(uid="unknown"))
    assert board.last_frame("", "unknown") is None
