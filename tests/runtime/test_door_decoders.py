"""The decoders behind the HTTP and openpi doors: what they read, what they refuse, and that nothing else can happen."""

import contextlib
import json
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldvln_edge.protocol import ERRORS, Limits, ProtocolError
from worldvln_edge.runtime.doors.http_request import InvalidRequestError, PredictRequest, parse_predict_request
from worldvln_edge.runtime.doors.openpi_codec import FrameList, Observation, decode_observation, encode_map
from worldvln_edge.wire import depth_within

LIMITS = Limits()
FIELDS = [*PredictRequest.__dataclass_fields__, "instruction", "action_head_mode", "action_head_stride"]
OBSERVATION_KEYS = [
    "images", "image", "observation/images", "prompt", "session_id", "reset", "first_frame", "seed",
    "negative_prompt", "reply", "deadline_ms",
]  # fmt: skip
MANY = settings(max_examples=400, deadline=None)


def parse(**fields: Any) -> PredictRequest:
    body = {"session_id": "s", "images_base64": ["x"], **fields}
    return parse_predict_request(json.dumps(body).encode(), LIMITS)


def problems_of(data: bytes) -> list[dict]:
    with pytest.raises(InvalidRequestError) as refused:
        parse_predict_request(data, LIMITS)
    return msgspec.to_builtins(refused.value.problems)


@pytest.mark.parametrize(
    ("given_value", "value"),
    [(12, 12), ("12", 12), (" +12 ", 12), ("12.0", 12), (3.0, 3), (True, 1), (-1, -1), (None, None), ("-0", 0)],
)
def test_integers_are_read_as_laxly_as_by_the_research_service(given_value, value):
    assert parse(seed=given_value).seed == value


@pytest.mark.parametrize("given_value", [3.5, "x", "1e3", "", [], {}, "1_0", "\u0663", 2**63, -(2**63) - 1, "9" * 50])
def test_what_is_no_integer_is_refused(given_value):
    body = {"session_id": "s", "images_base64": ["x"], "seed": given_value}
    assert problems_of(json.dumps(body).encode())[0]["loc"] == ["body", "seed"]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "[1", "tru"])
def test_numbers_that_json_does_not_have_are_refused(text):
    data = b'{"session_id": "s", "images_base64": ["x"], "seed": ' + text.encode() + b"}"
    assert problems_of(data)[0]["type"] == "json_invalid"


@pytest.mark.parametrize(
    ("given_value", "value"),
    [(True, True), (0, False), (1.0, True), *((text, True) for text in ("TRUE", "yes", "On", "t", "Y", "1"))]
    + [(text, False) for text in ("false", "No", "off", "F", "n", "0")],
)
def test_flags_are_read_as_laxly_as_by_the_research_service(given_value, value):
    assert parse(prefix_mode=given_value).prefix_mode is value


@pytest.mark.parametrize("given_value", ["maybe", 2, 0.5, None, [], {}, ""])
def test_what_is_no_flag_is_refused(given_value):
    body = {"session_id": "s", "images_base64": ["x"], "prefix_mode": given_value}
    assert problems_of(json.dumps(body).encode())[0]["loc"] == ["body", "prefix_mode"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("action_head_batch_size", 0),
        ("action_head_batch_size", 65),
        ("action_head_stride", 4),
        ("action_head_pre_resize_hw", -1),
        ("action_head_pre_resize_hw", 1025),
        ("action_head_mode", "other"),
        ("first_frame", 0),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    body = {"session_id": "s", "images_base64": ["x"], field: value}
    assert [problem["loc"] for problem in problems_of(json.dumps(body).encode())] == [["body", field]]


@pytest.mark.parametrize("mode", ["", "default", " TSFormer_Latent ", "actionhead_ref_vit", "actionhead", "REF_VIT"])
def test_every_published_head_name_is_accepted(mode):
    assert parse(action_head_mode=mode).session_id == "s"


def test_element_of_a_wrong_type_is_named():
    data = json.dumps({"session_id": "s", "images_base64": ["a", "b", 5]}).encode()
    assert problems_of(data)[0]["loc"] == ["body", "images_base64", 2]


def test_every_problem_is_listed_and_nothing_that_was_sent_is_echoed():
    secret = "secret-" * 4
    listed = problems_of(json.dumps({name: {"x": secret} for name in FIELDS}).encode())
    assert 10 <= len(listed) <= 16
    assert "secret" not in json.dumps(listed)


def test_nesting_is_bounded_before_it_is_parsed():
    assert problems_of(b'{"x":' + b"[" * 40 + b"]" * 40 + b"}")[0]["type"] == "json_invalid"
    assert problems_of(b"[" * 1_000_000)[0]["type"] == "json_invalid"
    assert problems_of(b'{"x":[' + b"[]," * 100_000 + b"[]]}")[0]["type"] == "json_invalid"


@pytest.mark.parametrize(
    ("decode", "body"),
    [
        (parse_predict_request, b'{"x":[' + b"[]," * 1_000_000 + b"[]]}"),
        (parse_predict_request, b'{"images_base64":[' + b'"",' * 1_000_000 + b'""]}'),
        (parse_predict_request, b'{"session_id":[' + b"{}," * 1_000_000 + b"{}]}"),
        (decode_observation, b"\x81\xa1x\xdd\x00\x2d\xc6\xc0" + b"\x90" * 3_000_000),
        (decode_observation, b"\x81\xa6prompt\xdd\x00\x2d\xc6\xc0" + b"\x90" * 3_000_000),
        (decode_observation, b"\x81\xa5image\xdd\x00\x16\xe3\x60" + b"\xc4\x00" * 1_500_000),
    ],
)
def test_body_costs_no_more_memory_than_a_few_times_its_own_size(decode, body):
    tracemalloc.start()
    try:
        with contextlib.suppress(ProtocolError):
            decode(body, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


def depth_of(data: bytes) -> int:
    """Deepest nesting outside of texts, byte by byte."""
    depth = deepest = 0
    is_text = is_escaped = False
    for char in data.decode("latin-1"):
        if is_text:
            is_text = is_escaped or char != '"'
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            is_text = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


@MANY
@given(st.recursive(st.text('"\\[]{}a', max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=12))
def test_nesting_is_measured_outside_of_texts_only(value):
    data = json.dumps(value).encode()
    deepest = depth_of(data)
    assert depth_within(data, deepest)
    assert deepest == 0 or not depth_within(data, deepest - 1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def check_http(data: bytes) -> None:
    try:
        request = parse_predict_request(data, LIMITS)
    except InvalidRequestError as error:
        problems = error.problems
    else:
        check_request(request)
        return
    assert 1 <= len(problems) <= 16
    assert all(problem.loc[0] == "body" for problem in problems)
    msgspec.json.encode(problems)


def check_request(request: PredictRequest) -> None:
    assert isinstance(request.session_id, str)
    assert all(isinstance(text, str) for text in request.images_base64)
    assert request.seed is None or -(2**63) <= request.seed < 2**63
    assert all(isinstance(value, bool) for value in (request.prefix_mode, request.reset_session, request.debug))
    json.dumps(request.prompt, ensure_ascii=False).encode()  # may come back as used_prompt


@MANY
@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(data):
    check_http(data)


@MANY
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=8))
def test_any_json_object_is_a_request_or_refused(fields):
    check_http(json.dumps({"session_id": "s", "images_base64": ["x"], **fields}).encode("utf-8", "surrogatepass"))


@MANY
@given(st.data())
def test_any_damage_to_a_request_is_refused_or_harmless(data):
    body = bytearray(
        json.dumps(
            {"session_id": "s", "images_base64": ["eA==", "\ud83d\ude00"], "prompt": "\u00e9", "seed": 3}
        ).encode()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    check_http(bytes(body[: data.draw(st.integers(0, len(body)))]))


def check_observation(data: bytes) -> None:
    try:
        observation = decode_observation(data, LIMITS)
        frames = observation.images.decode(slice(None), keep=128, room_bytes=10**9)
    except ProtocolError as error:
        code, msg = error.code, error.msg
    else:
        check_frames(observation, frames)
        return
    assert code in ERRORS
    assert "\n" not in msg


def check_frames(observation: Observation, frames: list[np.ndarray]) -> None:
    assert all(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 for frame in frames)
    assert observation.prompt is None or isinstance(observation.prompt, str)
    assert observation.seed is None or type(observation.seed) is int
    assert isinstance(observation.reset, bool)


MSGPACK_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.binary(max_size=4), inner, max_size=3)
        | st.fixed_dictionaries(
            {
                b"__ndarray__": st.just(True),
                b"data": st.binary(max_size=24) | inner,
                b"dtype": st.sampled_from(["|u1", "<f4", "<i8", "|b1", "<U2", "|O", "V8", "f1", "i4,i4", ""]) | inner,
                b"shape": st.lists(st.integers(-1, 2**40), max_size=4) | inner,
            }
        )
        | st.fixed_dictionaries({b"__npgeneric__": st.just(True), b"data": inner})
    ),
    max_leaves=8,
)


@MANY
@given(st.binary(max_size=200))
def test_any_bytes_are_an_observation_or_refused(data):
    check_observation(data)


@MANY
@given(st.dictionaries(st.sampled_from(OBSERVATION_KEYS), MSGPACK_VALUES, max_size=5))
def test_any_msgpack_map_is_an_observation_or_refused(message):
    check_observation(msgspec.msgpack.encode(message))


@MANY
@given(st.data())
def test_any_damage_to_an_observation_is_refused_or_harmless(data):
    array = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    message = bytearray(encode_map({"images": array, "prompt": "go", "seed": 3, "reset": True, "session_id": "s"}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    check_observation(bytes(message[: data.draw(st.integers(0, len(message)))]))


@MANY
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 255))
def test_frames_come_out_as_they_went_in(count, height, width, channels_first, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    sent = frames.transpose(0, 3, 1, 2) if channels_first and width != 3 else frames
    observation = decode_observation(encode_map({"images": sent, "prompt": "go"}), LIMITS)
    decoded = observation.images.decode(slice(1, None), keep=5, room_bytes=10**6)
    assert all(np.array_equal(got, want) for got, want in zip(decoded, frames[1:], strict=True))


def test_stored_frames_do_not_keep_the_message_that_they_came_in():
    observation = decode_observation(encode_map({"images": np.zeros((4, 4, 3), np.uint8)}), LIMITS)
    assert observation.images.decode(slice(None), keep=1, room_bytes=1000)[0].base is None


def test_frames_that_find_no_room_are_refused():
    frames = FrameList([np.zeros((4, 4, 3), np.uint8)] * 2, LIMITS)
    with pytest.raises(ProtocolError, match="store of undigested frames is full") as refused:
        frames.decode(slice(None), keep=2, room_bytes=95)
    assert refused.value.code == "overloaded"


def test_what_openpi_cannot_read_is_never_sent():
    with pytest.raises(NotImplementedError, match="cannot send object"):
        encode_map({"actions": object()})
