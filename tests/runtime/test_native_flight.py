"""A real server, a real client: flights, repeats, resumes and refusals of the native protocol."""

import io
import json
import threading
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from http_calls import nonfinite
from PIL import Image
from websockets.sync.client import connect

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.config import HorizonConfig
from worldvln_edge.protocol import Hello, Observe, Start
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.wire import decode_answer, encode

FRAME = np.full((24, 32, 3), 127, dtype=np.uint8)


def jpeg(value: int = 127) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


class CountingPolicy(NullPolicy):
    """Remembers what reached it: actions carry the segment, and sessions stay looked at."""

    def __init__(self, **options):
        super().__init__(**options)
        self.opened: list[CountingSession] = []

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        session = CountingSession(self, prompt, seed=seed, emit=emit)
        self.opened.append(session)
        return session


class CountingSession(NullSession):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen: list[int] = []
        self.inferences = 0
        self.is_closed = False
        self.fail_with: Exception | None = None

    def observe(self, frames, *, budget_s=None, **options):
        self.seen.extend(int(frame[0, 0, 0]) for frame in frames)
        if self.fail_with is not None and self.frames + len(frames) >= 1:
            self.frames = min(self.frames + len(frames), 49)
            failure, self.fail_with = self.fail_with, None
            raise failure
        chunk = super().observe(frames)
        if chunk is None:
            return None
        self.inferences += 1
        return ActionChunk(
            segment=chunk.segment,
            actions=np.full((16, 6), 1.0 + chunk.segment, dtype=np.float32),
            observed_frames=chunk.observed_frames,
            seed=chunk.seed,
        )

    def close(self):
        self.is_closed = True


@pytest.fixture
def policy() -> CountingPolicy:
    return CountingPolicy()


@pytest.fixture
def server(policy: CountingPolicy) -> Iterator[BackgroundServer]:
    with BackgroundServer(policy) as server:
        yield server


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
@pytest.mark.parametrize("frame_format", ["jpeg", "rgb8"])
def test_flight_gives_three_segments_of_sixteen_actions(server, encoding, frame_format):
    with SessionClient(server.url, encoding=encoding, frame_format=frame_format) as client:
        assert client.start("Fly straight ahead.").need == 1
        answers = [client.observe([FRAME] * count) for count in (1, 16, 16)]
        assert [a.segment for a in answers] == [0, 1, 2]
        assert [a.done for a in answers] == [False, False, True]
        assert [a.need for a in answers] == [16, 16, 0]
        assert all(a.actions.shape == (16, 6) and a.actions.dtype == np.float32 for a in answers)
        assert [float(a.actions[0, 0]) for a in answers] == [1.0, 2.0, 3.0]
        assert client.end().state == "ended"
        assert client.ping().sessions == 0


def test_frames_sent_one_by_one_give_the_same_segments(server, policy):
    with SessionClient(server.url, frame_format="rgb8") as client:
        client.start("go")
        emitted = [client.observe([np.full((4, 4, 3), index, np.uint8)]).segment for index in range(33)]
    assert [index for index, segment in enumerate(emitted) if segment >= 0] == [0, 16, 32]
    assert policy.opened[0].seen == list(range(33))


def test_emit_behind_waits_for_the_last_frame_of_a_segment(server):
    with SessionClient(server.url) as client:
        assert client.start("go", emit="behind").need == 17
        assert [client.observe([jpeg()] * count).segment for count in (1, 16, 16, 16)] == [-1, 0, 1, 2]


def test_resent_observation_returns_the_stored_actions_without_inference(server, policy):
    with SessionClient(server.url) as client:
        client.start("go")
        first = client.observe([jpeg()])
        again = client.observe([jpeg()], first=1, segment=0)
        assert np.array_equal(first.actions, again.actions)
        assert again.frames == 1
    assert policy.opened[0].inferences == 1
    assert len(policy.opened[0].seen) == 1


def test_frames_of_a_request_for_an_old_segment_are_kept_for_the_next(server, policy):
    with SessionClient(server.url) as client:
        client.start("go")
        client.observe([jpeg()])
        again = client.observe([jpeg()] * 16, segment=0)
        assert (again.segment, again.frames, again.need) == (0, 17, 0)
        assert client.observe([]).segment == 1
    assert len(policy.opened[0].seen) == 17


def test_overlapping_frames_are_ignored_unread(server, policy):
    with SessionClient(server.url, frame_format="rgb8") as client:
        client.start("go")
        client.observe([np.full((4, 4, 3), index, np.uint8) for index in (0, 1, 2)])
        answer = client.observe([b"not an image", b"nor this", *([jpeg(9)] * 2)], first=2)
        assert answer.frames == 5
    assert policy.opened[0].seen[:3] == [0, 1, 2]
    assert len(policy.opened[0].seen) == 5


def test_gap_stores_nothing_and_says_what_is_expected(server):
    with SessionClient(server.url) as client:
        client.start("go")
        client.observe([jpeg()])
        with pytest.raises(ServerError, match="expected frame 2, got 4") as refusal:
            client.observe([jpeg()] * 3, first=4)
        assert (refusal.value.code, refusal.value.expected, refusal.value.frames) == ("gap", 2, 1)
        assert client.observe([jpeg()] * 16).segment == 1


def test_frames_beyond_the_trajectory_are_dropped():
    with BackgroundServer(NullPolicy(HorizonConfig(num_frames=17, step=16))) as server, SessionClient(server.url) as c:
        c.start("go")
        answer = c.observe([jpeg()] * 20)
        assert (answer.frames, answer.segment, answer.done) == (17, 0, True)


def test_segment_out_of_turn_is_refused_and_changes_nothing(server):
    with SessionClient(server.url) as client:
        client.start("go")
        with pytest.raises(ServerError, match="segment 0 is next") as refusal:
            client.observe([jpeg()], segment=1)
        assert (refusal.value.code, refusal.value.frames) == ("bad_request", 0)
        with pytest.raises(ServerError, match=r"seg must be 0\.\.2"):
            client.observe([jpeg()], segment=3)


def test_new_prompt_reaches_the_policy_before_the_next_segment(server, policy):
    with SessionClient(server.url) as client:
        client.start("go")
        client.observe([jpeg()])
        client.observe([jpeg()] * 16, prompt="turn left")
    assert policy.opened[0].prompt == "turn left"


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"garbage", "bad_image", "frame 2: not a readable image"),
        (jpeg()[:200], "bad_image", "frame 2: not a readable image"),
        (b"GIF89a" + bytes(64), "bad_image", "frame 2: format not accepted"),
    ],
)
def test_bad_image_is_named_and_stores_none_of_the_call(server, data, code, message):
    with SessionClient(server.url) as client:
        client.start("go")
        with pytest.raises(ServerError, match=message) as refusal:
            client.observe([jpeg(), data])
        assert (refusal.value.code, refusal.value.frames) == (code, 0)
        assert client.observe([jpeg()]).segment == 0


def test_frame_that_is_no_image_at_all_is_invalid_field(server):
    with connect(server.url, compression=None) as socket:
        socket.send(json.dumps({"t": "hello", "id": 1, "v": [1]}))
        socket.send(json.dumps({"t": "start", "id": 2, "session": "s", "prompt": "go"}))
        socket.send(json.dumps({"t": "observe", "id": 3, "session": "s", "first": 1, "frames": [{"a": 1}]}))
        answers = [json.loads(socket.recv(timeout=5)) for _ in range(3)]
    assert answers[2]["code"] == "invalid_field"


def test_capture_time_of_the_frame_that_the_answer_rests_on_comes_back(server):
    with SessionClient(server.url) as client:
        client.start("go")
        assert client.observe([jpeg()] * 3, t_ns=[10, 11, 12]).t_ns == 10
        assert client.observe([jpeg()] * 14, t_ns=range(13, 27)).t_ns == 26


def test_lost_connection_is_opened_again_and_the_session_resumed(server, policy):
    with SessionClient(server.url, reconnect_s=5) as client:
        client.start("go")
        first = client.observe([jpeg()])
        line = client._connection._transport
        line._loop.call_soon_threadsafe(line._socket._socket.transport.abort)  # the network's doing, for the client
        answer = client.observe([jpeg()] * 16)
        assert (first.segment, answer.segment, answer.frames) == (0, 1, 17)
    assert len(policy.opened) == 1


def test_another_client_resumes_the_session(server):
    with SessionClient(server.url) as client:
        client.start("go", session="flight-7")
        client.observe([jpeg()])
    with SessionClient(server.url) as other:
        state = other.start(session="flight-7", resume=True)
        assert (state.state, state.frames, state.emitted, state.need) == ("open", 1, 0, 16)
        assert other.observe([jpeg()] * 16).segment == 1


def test_resuming_what_does_not_exist_is_unknown_session(server):
    with SessionClient(server.url) as client, pytest.raises(ServerError) as refusal:
        client.start(session="never", resume=True)
    assert (refusal.value.code, refusal.value.retry) == ("unknown_session", False)


def test_start_replaces_a_session_of_the_same_name(server, policy):
    with SessionClient(server.url) as client:
        client.start("go", session="a")
        client.observe([jpeg()])
        assert client.start("go again", session="a").frames == 0
        assert client.ping().sessions == 1
        deadline = time.monotonic() + 2
        while not policy.opened[0].is_closed and time.monotonic() < deadline:
            time.sleep(0.01)
    assert policy.opened[0].is_closed


def test_policy_failure_is_internal_with_an_id_and_keeps_the_frames(server, policy, caplog):
    with SessionClient(server.url) as client:
        client.start("go")
        policy.opened[0].fail_with = KeyError("secret /path")
        with pytest.raises(ServerError) as refusal:
            client.observe([jpeg()])
        error = refusal.value
        assert (error.code, error.frames, error.retry) == ("internal", 1, True)
        assert "secret" not in str(error)
        assert error.error_id in caplog.text
        assert client.observe([]).segment == 0


def test_nonfinite_actions_are_never_sent_and_the_segment_can_be_asked_again(server, policy):
    with SessionClient(server.url) as client:
        client.start("go")
        policy.opened[0].fail_with = nonfinite()
        with pytest.raises(ServerError) as refusal:
            client.observe([jpeg()])
        assert (refusal.value.code, refusal.value.frames) == ("nonfinite_actions", 1)
        assert client.observe([]).segment == 0


def test_pipelined_requests_of_a_session_are_answered_in_order(server):
    with connect(server.url, compression=None) as socket:
        socket.send(encode(Hello(id=1, v=[1]), "msgpack"))
        socket.send(encode(Start(id=2, session="s", prompt="go"), "msgpack"))
        socket.send(encode(Observe(id=3, session="s", first=1, frames=[jpeg()]), "msgpack"))
        socket.send(encode(Observe(id=4, session="s", first=2, frames=[jpeg()] * 16), "msgpack"))
        answers = [decode_answer(socket.recv(timeout=5), "msgpack") for _ in range(4)]
    assert [answer.re for answer in answers] == [1, 2, 3, 4]
    assert [answer.seg for answer in answers[2:]] == [0, 1]


def test_two_clients_fly_at_once(server):
    results: dict[str, list[int]] = {}

    def fly(name: str) -> None:
        with SessionClient(server.url) as client:
            client.start("go", session=name)
            results[name] = [client.observe([jpeg()] * count).segment for count in (1, 16, 16)]

    threads = [threading.Thread(target=fly, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_health_routes_answer(server):
    base = f"http://127.0.0.1:{server.server.bound_port}"
    assert urllib.request.urlopen(f"{base}/healthz").read() == b"OK\n"
    assert urllib.request.urlopen(f"{base}/readyz").status == 200
    report = json.load(urllib.request.urlopen(f"{base}/health"))
    assert (report["status"], report["points"], report["ready"]) == ("ok", [1, 17, 33, 49], True)
