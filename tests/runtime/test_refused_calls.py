"""A refused call changes nothing, and a call sent again changes nothing the second time: at every door, in mid-flight.

The policy's actions are a number made of every frame, the prompts and the seed, so that nothing can change unseen.
Source: spec/session_protocol.md 9, items 2 and 4; 2.3, 7.4.
"""

import base64
import json
import zlib
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from chaos_witness import Line
from http_calls import HttpCalls, frame
from openpi_calls import PolicyClient, pixels

from worldvln_edge.protocol import PROTOCOL_VERSION
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession

TEXTS = [frame(index) for index in range(33)]
IMAGES = [base64.b64decode(text.partition(",")[2]) for text in TEXTS]
CALLS = ((0, 1), (1, 17), (17, 33))  # frames of each call, one segment each
TURN = "turn left"  # the prompt of the second call


class TellTaleSession(NullSession):
    digest = 0

    def observe(self, frames, **options):
        for seen in frames[: self._policy.info.horizon.num_frames - self.frames]:
            self.digest = zlib.crc32(seen.tobytes(), self.digest)
        chunk = super().observe(frames, **options)
        asked = f"{self.prompt}|{self.negative_prompt}|{self._seed}".encode()
        return chunk and replace(chunk, actions=chunk.actions + np.float32(zlib.crc32(asked, self.digest) % 10_007))


class TellTalePolicy(NullPolicy):
    opened = 0

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.opened += 1
        return TellTaleSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt)


@pytest.fixture
def policy() -> TellTalePolicy:
    return TellTalePolicy()


@pytest.fixture
def server(policy, tmp_path):
    with BackgroundServer(policy, zmq=ZmqConfig(endpoints=(f"ipc://{tmp_path}/s",))) as server:
        yield server


class NativeLine:
    """The native protocol, field by field."""

    def __init__(self, server: BackgroundServer, transport: str):
        self._is_json = transport == "websocket json"
        self._line = Line(server.server.zmq_urls[0] if transport == "zmq" else server.url)
        self._id = 0

    def __enter__(self) -> "NativeLine":
        self.ask({"t": "hello", "v": [PROTOCOL_VERSION]})
        return self

    def __exit__(self, *_: object) -> None:
        self._line.__exit__()

    def ask(self, fields: dict) -> dict:
        """The answer, without what differs from one time to the next."""
        self._id += 1
        return self.ask_bytes(self._encoded({"id": self._id, **fields}))

    def ask_bytes(self, data: bytes | str) -> dict:
        self._line.send(data)
        answer = msgspec.to_builtins(self._line.hear())
        return {key: value for key, value in answer.items() if key not in ("re", "ms", "server_ns")}

    def _encoded(self, fields: dict) -> bytes | str:
        if not self._is_json:
            return msgspec.msgpack.encode(fields)
        return json.dumps(fields, default=lambda image: base64.b64encode(image).decode())


TRANSPORTS = pytest.mark.parametrize("transport", ["websocket msgpack", "websocket json", "zmq"])
START = {"t": "start", "session": "s", "prompt": "go", "seed": 3, "negative_prompt": "fog"}


def native_call(index: int) -> dict:
    first, end = CALLS[index]
    fields = {"t": "observe", "session": "s", "first": first + 1, "frames": IMAGES[first:end], "seg": index}
    return fields | ({"prompt": TURN} if index == 1 else {})


def observe(**fields: object) -> dict:
    """An observation that would change the session if it were taken."""
    return {"t": "observe", "session": "s", "first": 1, "frames": IMAGES[20:33] * 2, "prompt": "other", **fields}


NATIVE_REFUSALS = [
    (observe(first=40), "gap"),
    (observe(frames=[*IMAGES, b"junk"]), "bad_image"),
    (observe(frames=[*IMAGES, IMAGES[0][:40]]), "bad_image"),
    (observe(first=0), "invalid_field"),
    (observe(first=1.5), "invalid_field"),
    (observe(first=None), "invalid_field"),
    (observe(frames=IMAGES * 4), "too_large"),
    (observe(frames=5), "invalid_field"),
    (observe(prompt="x" * 4097), "too_large"),
    (observe(prompt=7), "invalid_field"),
    (observe(prompt=" "), "bad_request"),
    (observe(seg=3), "invalid_field"),
    (observe(seg=-1), "invalid_field"),
    (observe(fmt="rgb8", frames=[bytes(12)] * 30, w=3, h=1), "bad_image"),
    (observe(fmt="rgb8", frames=[bytes(12)] * 30), "bad_request"),
    (observe(fmt="avif"), "invalid_field"),
    (observe(session="another"), "unknown_session"),
    (observe(session="a\nb"), "bad_request"),
    ({"t": "observe", "session": "s", "frames": IMAGES}, "bad_request"),
    ({"t": "observe", "first": 1, "frames": IMAGES}, "bad_request"),
    (START | {"prompt": " "}, "bad_request"),
    (START | {"prompt": None}, "bad_request"),
    (START | {"prompt": "x" * 4097}, "too_large"),
    (START | {"negative_prompt": "x" * 4097}, "too_large"),
    (START | {"seed": 2**63}, "invalid_field"),
    (START | {"seed": "3"}, "invalid_field"),
    (START | {"emit": "sideways"}, "invalid_field"),
    (START | {"session": "s" * 257}, "bad_request"),
    (START | {"chain": True, "max_horizons": 0}, "invalid_field"),
    ({"t": "start", "session": "another", "resume": True}, "unknown_session"),
    ({"t": "cancel", "target": 9999}, "bad_request"),
    ({"t": "cancel"}, "bad_request"),
    ({"t": "end"}, "bad_request"),
    ({"t": "land", "session": "s"}, "bad_request"),
    ({"session": "s"}, "bad_request"),
    (observe(id=-1), "invalid_field"),
    ({"t": "hello", "v": [PROTOCOL_VERSION + 8]}, "unsupported_version"),
]


@TRANSPORTS
def test_refused_native_messages_change_nothing(server, policy, transport):
    with NativeLine(server, transport) as line:
        line.ask(START)
        expected = [line.ask(native_call(index)) for index in range(3)]
        assert [answer["seg"] for answer in expected] == [0, 1, 2]

        line.ask(START)
        for index in range(3):
            before = line.ask({"t": "start", "session": "s", "resume": True})
            answers = [line.ask(fields) for fields, _ in NATIVE_REFUSALS]
            assert [(number, answer.get("code")) for number, answer in enumerate(answers)] == [
                (number, code) for number, (_, code) in enumerate(NATIVE_REFUSALS)
            ], answers
            for junk in (b"\xc1", b"{", b"[]", b"\x93\x01\x02\x03"):
                assert line.ask_bytes(junk)["t"] == "error"
            assert line.ask({"t": "start", "session": "s", "resume": True}) == before
            assert line.ask(native_call(index)) == expected[index]
    assert policy.opened == 2


@TRANSPORTS
def test_native_observation_sent_again_changes_nothing(server, transport):
    with NativeLine(server, transport) as line:
        line.ask(START)
        expected = [line.ask(native_call(index)) for index in range(3)]

        line.ask(START)
        for index in range(3):
            for _ in range(3):
                assert line.ask(native_call(index)) == expected[index]
            for earlier in range(index):
                again = line.ask(native_call(earlier))
                assert (again["seg"], again["actions"]) == (earlier, expected[earlier]["actions"])
            without = {key: value for key, value in native_call(index).items() if key not in ("seg", "prompt")}
            assert line.ask(without)["frames"] == expected[index]["frames"]


HTTP_REFUSALS = [
    ({"images_base64": [*TEXTS, "!"]}, 400, "bad_image"),
    ({"images_base64": TEXTS, "session_id": " "}, 400, "bad_request"),
    ({"images_base64": TEXTS, "session_id": "a\nb"}, 400, "bad_request"),
    ({"images_base64": TEXTS, "session_id": "another", "prompt": None}, 400, "unknown_session"),
    ({"images_base64": TEXTS, "reset_session": True, "prompt": " "}, 400, "bad_request"),
    ({"images_base64": TEXTS[:1], "prompt": "x" * 4097}, 413, "too_large"),
    ({"images_base64": []}, 400, "bad_request"),
    ({"images_base64": ["!"], "reset_session": True}, 400, "bad_image"),
    ({"images_base64": ["!"]}, 400, "bad_image"),
    ({"images_base64": ["http://127.0.0.1/frame.png"]}, 400, "bad_image"),
    ({"images_base64": TEXTS * 4}, 413, "too_large"),
    ({"images_base64": TEXTS, "first_frame": 40}, 409, "gap"),
    ({"images_base64": TEXTS, "first_frame": 0}, 422, "invalid_field"),
    ({"images_base64": TEXTS, "seed": 1.5}, 422, "invalid_field"),
    ({"images_base64": TEXTS, "seed": 2**63}, 422, "invalid_field"),
    ({"images_base64": TEXTS, "negative_prompt": 5}, 422, "invalid_field"),
    ({"images_base64": TEXTS, "action_head_mode": "nonsense"}, 422, "invalid_field"),
    ({"images_base64": TEXTS, "action_head_stride": 4}, 422, "invalid_field"),
    ({"images_base64": "text"}, 422, "invalid_field"),
    ({}, 422, "invalid_field"),
]


def http_flight(calls: HttpCalls, before_call=lambda: None) -> list[dict]:
    answers = []
    for index, (first, end) in enumerate(CALLS):
        before_call()
        start = {"instruction": "go", "seed": 3, "negative_prompt": "fog", "reset_session": True}
        said = start if index == 0 else {"prompt": TURN} if index == 1 else {}
        answers.append(calls.fly(TEXTS[first:end], allow_future_segments=True, debug=True, **said))
    return [{key: value for key, value in answer.items() if key != "timing"} for answer in answers]


def test_refused_http_calls_change_nothing(server, policy):
    with HttpCalls(server) as calls:
        expected = http_flight(calls)
        assert [answer["segment_index"] for answer in expected] == [0, 1, 2]

        def be_refused() -> None:
            for fields, status, code in HTTP_REFUSALS:
                body = {"session_id": "s", "prompt": "other", "seed": 9, "negative_prompt": "rain", **fields}
                refused, answer = calls.send(json.dumps(body))
                assert (refused, answer["code"]) == (status, code), fields.keys()
            for body in ("", "{", "[]", '{"session_id": "s", "seed": NaN}', '{"session_id": "s", "seed": 1e400}'):
                assert calls.send(body)[0] == 422
            text = json.dumps({"session_id": "s", "images_base64": TEXTS, "prompt": "other"})
            assert calls.send(text, **{"Content-Type": "text/plain"})[0] == 415

        assert http_flight(calls, be_refused) == expected
    with HttpCalls(server) as calls:  # a shorter prefix too, which there is in mid-flight only
        http_flight(calls)
        assert calls.ask(TEXTS[:5], prefix_mode=True, prompt="other")[1]["code"] == "prefix_shrunk"
        assert calls.fly(TEXTS, prefix_mode=True, debug=True)["used_prompt"] == TURN
    assert policy.opened == 3


OPENPI_REFUSALS = [
    ({"images": pixels(9), "prompt": " "}, "bad_request"),
    ({"images": pixels(9), "prompt": "x" * 4097}, "too_large"),
    ({"images": pixels(9), "prompt": 5}, "invalid_field"),
    ({"images": pixels(9), "prompt": "other", "first_frame": 60}, "gap"),
    ({"images": pixels(9), "prompt": "other", "first_frame": 0}, "invalid_field"),
    ({"images": pixels(9), "prompt": "other", "seed": 1.5, "reset": True}, "invalid_field"),
    ({"images": pixels(9), "reset": True}, "bad_request"),
    ({"prompt": "other", "reset": True}, "bad_request"),
    ({"images": b"junk", "prompt": "other", "reset": True}, "bad_image"),
    ({"images": pixels(9).astype(np.float32), "prompt": "other"}, "bad_image"),
    ({"images": np.zeros((129, 1, 1, 3), np.uint8), "prompt": "other"}, "too_large"),
    ({"images": pixels(9), "prompt": "other", "reply": "chunk", "reset": True}, "invalid_field"),
    ({"images": pixels(9), "prompt": "other", "deadline_ms": float("nan")}, "invalid_field"),
    ({"images": pixels(9), "session_id": "a\nb"}, "bad_request"),
]


def openpi_flight(client: PolicyClient, reply: str, before_call=lambda: None) -> list[dict]:
    groups = [range(*call) for call in CALLS] if reply == "segment" else [range(i, i + 1) for i in range(48)]
    results = []
    for index, group in enumerate(groups):
        before_call()
        prompt = {"prompt": TURN if index else "go"} if index < 2 else {}
        start = {"seed": 3, "negative_prompt": "fog", "reply": reply, "reset": True} if index == 0 else {}
        result = client.ask(images=pixels(*group), **prompt, **start)
        assert isinstance(result, dict), result
        results.append({**result, "actions": result["actions"].tolist(), "server_timing": None})
    return results


@pytest.mark.parametrize("reply", ["segment", "step"])
def test_refused_openpi_observations_change_nothing_and_the_connection_flies_on(server, policy, reply):
    with PolicyClient(server) as client:
        expected = openpi_flight(client, reply)
        assert sum(len(result["actions"]) for result in expected) == 48

        def be_refused() -> None:
            for observation, code in OPENPI_REFUSALS:
                answer = client.ask(**observation)
                assert isinstance(answer, str), observation.keys()
                assert answer.startswith(f"{code}: "), answer
            for junk in (b"", b"\xc1", b"\x93\x01\x02\x03", "text"):
                assert str(client.ask_bytes(junk)).startswith("bad_request: ")

        assert openpi_flight(client, reply, be_refused) == expected
    assert policy.opened == 2
