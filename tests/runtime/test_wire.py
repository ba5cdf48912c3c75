"""The codec: what goes in comes out, and nothing that a stranger sends ends in anything but a ProtocolError."""

import json
import math
import time
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.protocol import ERRORS, Cancel, End, Hello, Limits, Observe, Ping, ProtocolError, Start
from worldvln_edge.wire import decode_answer, decode_request, encode

LIMITS = Limits(max_msg_bytes=100_000)
REQUESTS = [
    Hello(id=1, v=[1], client="c"),
    Start(id=2, session="s", prompt="go", seed=-5, emit="behind"),
    Observe(id=3, session="s", first=4, frames=[b"\x00\xff"], seg=1, deadline_ms=2.5, t_ns=[7], poses=[(0.0,) * 6]),
    End(id=4, session="s"),
    Cancel(id=5, target=3),
    Ping(id=2**63 - 1, t_ns=123),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("t", "id", "v", "session", "prompt", "seed", "emit", "first", "frames", "fmt", "w", "h", "seg")
FIELDS += ("deadline_ms", "t_ns", "poses", "target", "resume", "key", "negative_prompt")
message_like = st.dictionaries(
    st.sampled_from(FIELDS),
    json_values
    | st.sampled_from(["hello", "start", "observe", "end", "cancel", "ping", "rgb8", 1, 2, [], ["a"], True]),
)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_msgpack_round_trip(request_):
    assert decode_request(encode(request_, "msgpack"), "msgpack", LIMITS) == request_


def test_json_carries_images_as_base64():
    request = decode_request(encode(REQUESTS[2], "json"), "json", LIMITS)
    assert request.frames == ["AP8="]


def refusal_of(decode, *args) -> str | None:
    """Code of the refusal, None if the message was accepted; any other exception fails the test."""
    try:
        decode(*args)
    except ProtocolError as error:
        return error.code
    return None


@given(st.binary(max_size=200), st.sampled_from(["msgpack", "json"]))
def test_random_bytes_never_crash_the_decoder(data, encoding):
    assert refusal_of(decode_request, data, encoding, LIMITS) in (None, *ERRORS)
    assert refusal_of(decode_answer, data, encoding) in (None, "bad_request")


@given(message_like | json_values)
def test_random_messages_never_crash_the_decoder(value):
    expected = (None, "bad_request", "invalid_field", "too_large")
    assert refusal_of(decode_request, json.dumps(value).encode(), "json", LIMITS) in expected
    packed = _msgpack(value)
    if packed is not None:
        assert refusal_of(decode_request, packed, "msgpack", LIMITS) in expected


def _msgpack(value) -> bytes | None:
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:  # msgpack holds 64-bit integers only
        return None


@given(st.integers(1, 60))
def test_json_depth_is_limited_to_32(depth):
    data = b'{"t":"ping","id":1,"x":' + b"[" * depth + b"]" * depth + b"}"
    if depth + 1 <= 32:
        decode_request(data, "json", LIMITS)
    else:
        with pytest.raises(ProtocolError, match="deeper than 32"):
            decode_request(data, "json", LIMITS)


def test_brackets_inside_strings_are_no_depth():
    text = '[{"\\' * 50
    data = json.dumps({"t": "start", "id": 1, "prompt": text}).encode()
    assert decode_request(data, "json", LIMITS).prompt == text


def test_absurd_nesting_is_refused_in_msgpack_too():
    data = b"\x83\xa1t\xa4ping\xa2id\x01\xa1z" + b"\x91" * 50_000 + b"\x01"
    with pytest.raises(ProtocolError, match="malformed"):
        decode_request(data, "msgpack", LIMITS)


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        ({"t": "dance", "id": 7}, "bad_request", "unknown message type"),
        ({"id": 7}, "bad_request", "missing required field `t`"),
        ({"t": "observe", "id": 7, "session": "s", "first": 1}, "bad_request", "`frames`"),
        ({"t": "observe", "id": 7, "session": "s", "first": 0, "frames": []}, "invalid_field", r"\$\.first"),
        ({"t": "observe", "id": 7, "session": "s", "first": "1", "frames": []}, "invalid_field", r"\$\.first"),
        ({"t": "start", "id": 7, "prompt": "go", "seed": 2**63}, "invalid_field", r"\$\.seed"),
        ({"t": "start", "id": 7, "prompt": "go", "emit": "soon"}, "invalid_field", r"\$\.emit"),
        ({"t": "start", "id": 7, "prompt": "  "}, "bad_request", "needs a prompt"),
        ({"t": "start", "id": 7, "resume": True}, "bad_request", "resume needs"),
        ({"t": "start", "id": 7, "prompt": "x" * 4097}, "too_large", "4097 characters"),
        ({"t": "start", "id": 7, "prompt": "go", "session": "s" * 257}, "bad_request", "257 characters"),
        ({"t": "start", "id": 7, "prompt": "go", "session": "a\u0007"}, "bad_request", "control character"),
        ({"t": "end", "id": 7, "session": " "}, "bad_request", "blank"),
        ({"t": "observe", "id": 7, "session": "s", "first": 1, "frames": [""] * 129}, "too_large", "129 frames"),
        (
            {"t": "observe", "id": 7, "session": "s", "first": 1, "frames": [""], "fmt": "rgb8"},
            "bad_request",
            "w and h",
        ),
        ({"t": "observe", "id": 7, "session": "s", "first": 1, "frames": [], "t_ns": [1]}, "bad_request", "t_ns has 1"),
        ({"t": "observe", "id": 7, "session": "s", "first": 1, "frames": [], "prompt": " "}, "bad_request", "blank"),
    ],
)
def test_refusal_names_the_field_and_the_request(message, code, text):
    with pytest.raises(ProtocolError, match=text) as refusal:
        decode_request(json.dumps(message).encode(), "json", LIMITS)
    assert (refusal.value.code, refusal.value.re) == (code, 7)


def test_long_or_nested_lists_are_refused_before_they_take_memory():
    base = {"t": "observe", "id": 7, "session": "s", "first": 1, "frames": []}
    nested = msgspec.msgpack.encode(base | {"frames": [b"", "N"]}).replace(
        b"\xa1N", b"\xdd" + (2_000_000).to_bytes(4, "big") + b"\x90" * 2_000_000
    )
    long = [msgspec.msgpack.encode(base | {name: [0] * 2_000_000}) for name in ("frames", "t_ns")]
    poses = msgspec.msgpack.encode(base | {"poses": [[0] * 6] * 200_000})
    for data, text in ((nested, "bytes or text"), *((data, "length <= 4096") for data in (*long, poses))):
        tracemalloc.start()
        with pytest.raises(ProtocolError, match=text) as refusal:
            decode_request(data, "msgpack", Limits())
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()
        assert (refusal.value.code, refusal.value.re) == ("invalid_field", 7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_numbers_are_refused(value):
    base = {"t": "observe", "id": 7, "session": "s", "first": 1, "frames": [b""]}
    for extra in ({"deadline_ms": value}, {"poses": [[0, 0, value, 0, 0, 0]]}):
        with pytest.raises(ProtocolError, match="finite"):
            decode_request(msgspec.msgpack.encode(base | extra), "msgpack", LIMITS)
        with pytest.raises(ProtocolError):  # NaN is no JSON
            decode_request(json.dumps(base | {"frames": [""]} | extra).encode(), "json", LIMITS)
    with pytest.raises(ProtocolError):
        decode_request(
            b'{"t":"observe","id":7,"session":"s","first":1,"frames":[],"deadline_ms":1e400}', "json", LIMITS
        )


def test_message_over_the_limit_is_too_large():
    with pytest.raises(ProtocolError) as refusal:
        decode_request(bytes(100_001), "msgpack", LIMITS)
    assert refusal.value.code == "too_large"


def test_answers_with_unknown_keys_are_understood():
    data = json.dumps(
        {"t": "pong", "re": 1, "t_ns": 1, "server_ns": 2, "sessions": 0, "queue": 0, "ready": True, "x": 1}
    )
    assert decode_answer(data.encode(), "json").server_ns == 2


def test_an_endless_string_costs_linear_time():
    """Every quote of an unterminated string was once tried as a start: quadratic, minutes for 200 KB."""

    def seconds(quotes: int) -> float:
        data = b"[]" * 40 + b'"' + b'\\"' * quotes
        start = time.perf_counter()
        with pytest.raises(ProtocolError):
            decode_request(data, "json", Limits())
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(100_000) < 1.0  # quadratic time takes minutes for it
