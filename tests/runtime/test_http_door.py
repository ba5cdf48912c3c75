"""The compatible HTTP API: flights of the published clients, its state machine, and calls that are refused."""

import asyncio
import base64
import json
import struct
import threading
import time

import numpy as np
import pytest
from http_calls import HttpCalls, RememberingPolicy, frame, nonfinite

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import Limits, ProtocolError
from worldvln_edge.runtime.doors.openpi_codec import FrameList
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.implicit_session import ImplicitCall, ReadinessRule, Wording
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.session_manager import SessionManager

REFERENCE_KEYS = {"actions", "segment_index", "num_received_frames", "prefix_latents", "done", "used_prompt"}
# What the published client sends with every call (spec/session_protocol.md 2.1).
CLIENT_FIELDS = {
    "action_head_mode": "actionhead_ref_vit",
    "action_head_batch_size": 8,
    "action_head_stride": 1,
    "action_head_pre_resize_hw": 256,
    "allow_future_last_segment": True,
}


@pytest.fixture
def policy() -> RememberingPolicy:
    return RememberingPolicy()


@pytest.fixture
def server(policy):
    with BackgroundServer(policy) as server:
        yield server


def check_flight(answers: list[dict]) -> None:
    emitted = [answer for answer in answers if answer["segment_index"] >= 0]
    assert [answer["segment_index"] for answer in emitted] == [0, 1, 2]
    assert all([len(row) for row in answer["actions"]] == [6] * 16 for answer in emitted)
    assert [answer["prefix_latents"] for answer in emitted] == [5, 9, 13]
    assert [answer["done"] for answer in emitted] == [False, False, True]
    assert not any("hold" in answer for answer in answers)
    assert all(answer.keys() >= REFERENCE_KEYS for answer in answers)


def test_published_client_flies_in_stream_mode(server, policy):
    with HttpCalls(server) as calls:
        answers = [calls.fly([frame(0)], instruction="go", prefix_mode=False, **CLIENT_FIELDS)]
        for start in (1, 17):
            images = [frame(index) for index in range(start, start + 16)]
            answers.append(calls.fly(images, prefix_mode=False, **CLIENT_FIELDS))
        answers.append(calls.fly([frame(index) for index in range(33, 49)], prefix_mode=False, **CLIENT_FIELDS))
    check_flight(answers)
    assert policy.opened[0].seen == list(range(49))


def test_published_client_flies_in_prefix_mode(server, policy):
    images = [frame(index) for index in range(33)]
    with HttpCalls(server) as calls:
        answers = [calls.fly(images[:1], instruction="go", prefix_mode=True, **CLIENT_FIELDS)]
        answers += [calls.fly(images[:count], prefix_mode=True, **CLIENT_FIELDS) for count in (17, 33, 33)]
    check_flight(answers)
    assert [answer["num_received_frames"] for answer in answers] == [1, 17, 33, 33]
    assert policy.opened[0].seen == list(range(33))


def test_published_online_client_flies_in_closed_loop(server):
    with HttpCalls(server) as calls:
        always = {"prefix_mode": False, "allow_future_segments": True, **CLIENT_FIELDS}
        answers = [calls.fly([frame()], instruction="go", reset_session=True, **always)]
        answers += [calls.fly([frame()] * 16, **always) for _ in range(2)]
    check_flight(answers)
    assert [answer["need_frames"] for answer in answers] == [16, 16, 0]
    assert [answer["segments_left"] for answer in answers] == [2, 1, 0]


def test_answer_says_how_long_it_took_and_which_head_flew(server):
    with HttpCalls(server) as calls:
        timing = calls.fly([frame()], prompt="go", allow_future_segments=True)["timing"]
    assert timing["head"] == "latent"
    assert all(timing[name] >= 0 for name in ("queue_ms", "decode_ms", "infer_ms"))
    assert timing["total_ms"] >= timing["infer_ms"]


def test_actions_beyond_the_envelope_are_answered_as_a_hold_with_its_reason(policy):
    envelope = EnvelopeConfig(step_cm=0.5)
    with BackgroundServer(policy, envelope=envelope) as server, HttpCalls(server) as calls:
        answer = calls.fly([frame()], prompt="go", allow_future_segments=True)
    assert (answer["hold"], answer["actions"]) == ("step_translation", [[0.0] * 6] * 16)


def test_one_frame_with_a_prompt_starts_afresh_and_more_frames_replace_the_prompt(server, policy):
    with HttpCalls(server) as calls:
        calls.fly([frame()], instruction="go", allow_future_segments=True)
        updated = calls.fly([frame()] * 16, prompt="turn left", allow_future_segments=True, debug=True)
        assert (updated["segment_index"], updated["used_prompt"]) == (1, "turn left")
        assert calls.fly([frame()], prompt="back")["num_received_frames"] == 1
    assert [session.prompt for session in policy.opened] == ["turn left", "back"]
    assert [asked[0] for asked in policy.opened[0].asked_with] == ["go", "turn left"]


def test_one_frame_with_a_prompt_goes_on_where_the_operator_says_so():
    with BackgroundServer(NullPolicy(), resets_on_one_frame=False) as server, HttpCalls(server) as calls:
        calls.fly([frame()], instruction="go")
        assert calls.fly([frame()], instruction="left", debug=True)["num_received_frames"] == 2


def test_reset_with_many_frames_starts_afresh(server, policy):
    with HttpCalls(server) as calls:
        calls.fly([frame()] * 3, instruction="go")
        assert calls.fly([frame()] * 2, instruction="go", reset_session=True)["num_received_frames"] == 2
    assert len(policy.opened) == 2


def test_instruction_wins_over_prompt_unless_it_is_blank(server, policy):
    with HttpCalls(server) as calls:
        assert calls.fly([frame()], instruction=" a ", prompt="b", debug=True)["used_prompt"] == "a"
        assert calls.fly([frame()], instruction="  ", prompt="b ", debug=True)["used_prompt"] == "b"


def test_seed_and_negative_prompt_are_kept_until_they_are_given_again(server, policy):
    with HttpCalls(server) as calls:
        calls.fly([frame()], instruction="go", seed=7, negative_prompt="fog", allow_future_segments=True)
        calls.fly([frame()] * 16, negative_prompt=None, allow_future_segments=True)
        calls.fly([frame()] * 16, seed=8, negative_prompt="", allow_future_segments=True)
        calls.fly([frame()], instruction="go", allow_future_segments=True)
    assert policy.opened[0].asked_with == [("go", "fog", 7), ("go", "fog", 7), ("go", "", 8)]
    assert policy.opened[1].asked_with == [("go", "", 0)]


def test_flags_belong_to_the_call_and_frames_wait_until_their_segment_is_due(server, policy):
    with HttpCalls(server) as calls:
        assert calls.fly([frame()], instruction="go")["need_frames"] == 16
        waiting = calls.fly([frame()] * 4)
        assert (waiting["segment_index"], waiting["need_frames"]) == (-1, 12)
        assert calls.fly([frame()], allow_future_segments=True)["segment_index"] == 0
        assert calls.fly([frame()] * 11)["segment_index"] == -1
        assert calls.fly([frame()] * 16)["segment_index"] == 1
    assert len(policy.opened[0].seen) == 33


def test_done_stays_true_after_the_last_segment(server):
    with HttpCalls(server) as calls:
        always = {"allow_future_segments": True}
        calls.fly([frame()], instruction="go", **always)
        answers = [calls.fly([frame()] * count, **always) for count in (16, 16, 1)]
    assert [answer["done"] for answer in answers] == [False, True, True]
    assert answers[2]["num_received_frames"] == 34


def test_frames_past_the_end_are_dropped_but_must_be_images(server):
    with HttpCalls(server) as calls:
        assert calls.fly([frame()] * 60, prompt="go")["num_received_frames"] == 49
        assert calls.fly([frame()])["segment_index"] == 1
        assert calls.ask(["x"])[1]["detail"] == "decode images_base64 failed: not base64"


@pytest.mark.parametrize(
    ("images", "fields", "status", "code"),
    [
        ([frame(), "!"], {}, 400, "bad_image"),
        (["!"], {"instruction": "other", "reset_session": True}, 400, "bad_image"),
        (["!"], {"instruction": "other"}, 400, "bad_image"),
        ([frame()], {"reset_session": True}, 400, "bad_request"),
        ([], {"instruction": "other", "reset_session": True}, 400, "bad_request"),
        ([frame()], {"prefix_mode": True}, 400, "prefix_shrunk"),
        ([frame()] * 16, {"first_frame": 19}, 409, "gap"),
        ([frame()] * 16, {"instruction": "other", "seed": 1.5}, 422, "invalid_field"),
        ([frame()] * 129, {"instruction": "other"}, 413, "too_large"),
        ([frame()] * 16, {"instruction": "x" * 4097}, 413, "too_large"),
        ([frame()] * 16, {"negative_prompt": "x" * 4097}, 413, "too_large"),
        ([frame()] * 16, {"action_head_mode": "nonsense"}, 422, "invalid_field"),
    ],
)
def test_refused_call_changes_nothing(server, policy, images, fields, status, code):
    with HttpCalls(server) as calls:
        calls.fly([frame()] * 17, instruction="go", seed=3)
        refused, answer = calls.ask(images, **fields)
        assert (refused, answer["code"]) == (status, code)
        after = calls.fly([frame()] * 16, debug=True)
        assert (after["segment_index"], after["num_received_frames"], after["used_prompt"]) == (1, 33, "go")
    assert len(policy.opened) == 1
    assert [asked for asked in policy.opened[0].asked_with] == [("go", "", 3)] * 2


def test_refused_first_call_opens_no_session(server, policy):
    with HttpCalls(server) as calls:
        assert calls.ask(["!"], instruction="go")[0] == 400
        assert calls.ask([frame()])[1]["code"] == "unknown_session"
    assert policy.opened == []


def test_same_call_sent_again_gets_the_same_answer_and_stores_nothing(server, policy):
    with HttpCalls(server) as calls:
        always = {"allow_future_segments": True}
        calls.fly([frame()], instruction="go", reset_session=True, **always)
        first = calls.fly([frame()] * 16, first_frame=2, **always)
        again = calls.fly([frame()] * 16, first_frame=2, **always)
        assert (again["segment_index"], again["actions"]) == (first["segment_index"], first["actions"])
        assert again["num_received_frames"] == 17
        following = calls.fly([frame(9)] * 20, first_frame=14, **always)
        assert (following["segment_index"], following["num_received_frames"]) == (2, 33)
    assert len(policy.opened[0].asked_with) == 3
    assert policy.opened[0].seen[17:] == [9] * 16


def test_late_repeat_of_an_answered_call_takes_no_segment_from_the_next_one(server):
    with HttpCalls(server) as calls:
        always = {"allow_future_segments": True}
        answered = calls.fly([frame()] * 2, instruction="go", first_frame=1, **always)
        stored = calls.fly([frame()] * 15, first_frame=3)  # rule D: all frames of segment 1 are missing
        assert (stored["segment_index"], stored["num_received_frames"]) == (-1, 17)
        again = calls.fly([frame()] * 2, first_frame=1, **always)
        assert (again["segment_index"], again["actions"]) == (0, answered["actions"])
        assert calls.fly([frame()] * 15, first_frame=3, **always)["segment_index"] == 1


def test_gap_says_which_frame_is_expected(server):
    with HttpCalls(server) as calls:
        calls.fly([frame()], instruction="go")
        status, answer = calls.ask([frame()], first_frame=5)
    assert (status, answer["code"], answer["expected"]) == (409, "gap", 2)


def test_policy_failure_keeps_the_frames_and_tells_the_client_an_id_only(server, policy, caplog):
    with HttpCalls(server) as calls:
        calls.fly([frame()] * 2, instruction="go")
        policy.opened[0].fail_with = KeyError("secret /path")
        status, answer = calls.ask([frame()], allow_future_segments=True)
        assert (status, answer["code"]) == (500, "internal")
        assert answer["detail"] == "InfinityStar inference failed: internal error"
        assert answer["num_received_frames"] == 3
        assert answer["error_id"] in caplog.text
        assert "secret" not in json.dumps(answer)
        again = calls.fly([frame()] * 3, prefix_mode=True, allow_future_segments=True)
        assert (again["segment_index"], again["num_received_frames"]) == (0, 3)


def test_nonfinite_actions_are_not_sent_and_the_segment_can_be_asked_for_again(server, policy):
    with HttpCalls(server) as calls:
        calls.fly([frame()] * 2, instruction="go")
        policy.opened[0].fail_with = nonfinite()
        status, answer = calls.ask([frame()], allow_future_segments=True)
        assert (status, answer["code"]) == (500, "nonfinite_actions")
        assert answer["detail"] == "stage2 latent2action inference failed: actions are not finite"
        assert calls.fly([frame()] * 3, prefix_mode=True, allow_future_segments=True)["segment_index"] == 0


@pytest.mark.parametrize("name", ["../../../tmp/x", "a/b", "..", "C:\\x", "\u00e9\U0001f600", "x" * 256])
def test_any_text_without_control_characters_names_a_session(server, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with HttpCalls(server, name) as calls:
        calls.fly([frame()], instruction="go")
        assert calls.fly([frame()])["num_received_frames"] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 257, "a\x00b", "a\x7fb", "a\nb"])
def test_session_id_too_long_or_with_control_characters_is_refused(server, name):
    with HttpCalls(server, name) as calls:
        status, answer = calls.ask([frame()], instruction="go")
    assert (status, answer["detail"]) == (400, "session_id too long or has control characters")


def jpeg_that_claims(width: int, height: int) -> str:
    header = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(9)
    return base64.b64encode(header + b"\xff\xd9").decode()


def test_image_bomb_is_refused_before_it_is_decoded(server):
    began = time.monotonic()
    with HttpCalls(server) as calls:
        status, answer = calls.ask([jpeg_that_claims(30_000, 30_000)], instruction="go")
        assert (status, answer["code"]) == (413, "too_large")
        assert answer["detail"] == "image has 30000x30000 pixels, limit 16000000"
        status, answer = calls.ask(["A" * (12 * 2**20)], instruction="go")
        assert (status, answer["detail"]) == (413, "image is larger than 8388608 bytes")
    assert time.monotonic() - began < 5


def test_key_is_asked_for_and_sessions_belong_to_it():
    with BackgroundServer(NullPolicy(), keys=["one", "two"]) as server:
        for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401)):
            with HttpCalls(server, headers=headers) as stranger:
                assert stranger.ask([frame()], instruction="go")[0] == status
        with (
            HttpCalls(server, headers={"Authorization": "Api-Key one"}) as mine,
            HttpCalls(server, headers={"Authorization": "Bearer two"}) as theirs,
        ):
            mine.fly([frame()], instruction="go")
            assert theirs.ask([frame()])[1]["code"] == "unknown_session"
            assert mine.fly([frame()])["num_received_frames"] == 2


def test_page_of_an_unknown_origin_is_refused(server):
    with HttpCalls(server, headers={"Origin": "https://evil.example"}) as calls:
        status, answer = calls.ask([frame()], instruction="go")
    assert (status, answer["code"]) == (403, "forbidden")


def test_server_that_is_not_ready_says_when_to_come_back(server):
    server.server.manager.begin_warm_up()
    with HttpCalls(server) as calls:
        status, answer = calls.ask([frame()], instruction="go")
    assert (status, answer["code"], answer["retry_ms"]) == (503, "not_ready", 2000)


def test_calls_for_one_session_wait_for_each_other_and_a_sixth_is_busy():
    with BackgroundServer(NullPolicy(infer_s=0.3)) as server:
        answers: list[tuple[int, dict]] = []

        def ask() -> None:
            with HttpCalls(server) as calls:
                answers.append(calls.ask([frame()], allow_future_segments=True))

        with HttpCalls(server) as calls:
            calls.fly([frame()], instruction="go")
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stored = sorted(answer["num_received_frames"] for status, answer in answers if status == 200)
    assert stored == list(range(2, 2 + len(stored)))
    assert len(stored) >= 5
    busy = [answer["code"] for status, answer in answers if status == 429]
    assert busy == ["busy"] * (8 - len(stored))
    assert busy


def test_health_answers_while_a_segment_runs_and_large_bodies_are_read():
    with BackgroundServer(NullPolicy(infer_s=1.0)) as server:
        with HttpCalls(server) as calls:
            calls.fly([frame()], instruction="go")

        def fly() -> None:
            with HttpCalls(server) as calls:
                calls.fly([frame()] * 60, allow_future_segments=True)

        thread = threading.Thread(target=fly)
        thread.start()
        slowest = 0.0
        with HttpCalls(server) as calls:
            while thread.is_alive():
                began = time.monotonic()
                assert calls.get("/health")[0] == 200
                slowest = max(slowest, time.monotonic() - began)
        thread.join()
    assert slowest < 0.5


def test_work_of_a_client_that_went_away_is_dropped(policy):
    policy.infer_s = 0.4
    with BackgroundServer(policy) as server:
        with HttpCalls(server, "a") as a, HttpCalls(server, "b") as b:
            a.fly([frame()], instruction="go")
            b.fly([frame()], instruction="go")
            thread = threading.Thread(target=lambda: a.fly([frame()], allow_future_segments=True))
            thread.start()
            time.sleep(0.1)
            body = json.dumps({"session_id": "b", "images_base64": [frame()], "allow_future_segments": True})
            b._connection.request("POST", "/v1/predict_delta_actions", body, {"Content-Type": "application/json"})
            time.sleep(0.1)
        thread.join()
        with HttpCalls(server, "b") as b:
            assert b.fly([frame()])["num_received_frames"] == 3
    assert [len(session.asked_with) for session in policy.opened] == [1, 0]


def test_five_thousand_opened_sessions_stay_within_the_limit_and_a_flight_goes_on():
    now_s = [0.0]
    refusals: list[str] = []

    async def scenario() -> None:
        manager = SessionManager(NullPolicy(), limits=Limits(max_sessions=32), clock=lambda: now_s[0])
        wording = Wording(reset_needs_prompt="", first_call_needs_prompt="", frames_needed="")

        async def call(session: str, count: int = 1, **fields: object) -> int:
            frames = FrameList([np.zeros((8, 8, 3), np.uint8)] * count, manager.limits)
            rule = ReadinessRule(ahead=True)
            return (
                await manager.call(
                    "", ImplicitCall(session=session, frames=frames, wording=wording, rule=rule, **fields)
                )
            ).emitted

        assert await call("flight", prompt="go") == 0
        for index in range(5000):
            now_s[0] += 5.0 if index < 2500 else 0.0  # at first slowly enough for idle sessions to make room
            if index % 10 == 0:
                await call("flight", 0)
            try:
                await call(f"{index}", prompt="go")
            except ProtocolError as error:
                refusals.append(error.code)
        assert manager.sessions <= 32
        assert [await call("flight", 16) for _ in range(2)] == [1, 2]
        manager.close()

    asyncio.run(scenario())
    assert set(refusals) == {"overloaded"}
    assert 2400 < len(refusals) <= 2500


def test_doors_have_name_spaces_of_their_own(server):
    with HttpCalls(server, "same") as calls, SessionClient(server.url) as client:
        calls.fly([frame()], instruction="go")
        with pytest.raises(ServerError, match="no such session"):
            client.start(session="same", resume=True)
