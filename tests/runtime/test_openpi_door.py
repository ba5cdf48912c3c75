"""openpi's protocol: both reply modes, sessions that outlive a connection, and refusals after which one flies on."""

import io

import numpy as np
import pytest
from http_calls import RememberingPolicy
from openpi_calls import PolicyClient, pixels
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy

RESULT_KEYS = {
    "actions", "segment_index", "num_received_frames", "prefix_latents", "done", "session_id", "need_frames",
    "server_timing",
}  # fmt: skip


def encoded(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(value)[0]).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def policy() -> RememberingPolicy:
    return RememberingPolicy()


@pytest.fixture
def server(policy):
    with BackgroundServer(policy) as server:
        yield server


@pytest.mark.parametrize("path", ["", "/", "/openpi"])
def test_segments_take_three_calls(server, policy, path):
    with PolicyClient(server, path) as client:
        assert client.metadata["protocol"] == "worldvln-openpi"
        assert client.metadata["limits"]["max_bytes"] == Limits().max_msg_bytes
        results = [client.ask(images=pixels(0), prompt="go", seed=5, negative_prompt="fog")]
        results.append(client.ask(images=pixels(*range(1, 17))))
        results.append(client.ask(images=pixels(*range(17, 33)), prompt="left"))
    assert all(result.keys() == RESULT_KEYS for result in results)
    assert [result["segment_index"] for result in results] == [0, 1, 2]
    assert [result["prefix_latents"] for result in results] == [5, 9, 13]
    assert [result["done"] for result in results] == [False, False, True]
    assert [result["need_frames"] for result in results] == [16, 16, 0]
    assert all(result["actions"].shape == (16, 6) and result["actions"].dtype == np.float32 for result in results)
    assert "prev_total_ms" not in results[0]["server_timing"]
    assert results[1]["server_timing"]["prev_total_ms"] > 0
    assert policy.opened[0].seen == list(range(33))
    assert policy.opened[0].asked_with == [("go", "fog", 5), ("go", "fog", 5), ("left", "fog", 5)]


def test_steps_take_forty_eight_calls_of_one_frame(server, policy):
    with PolicyClient(server) as client:
        # An openpi runtime sends the same keys with every observation.
        results = [client.ask(**{"observation/image": pixels(i)[0]}, prompt="go", reply="step") for i in range(48)]
        end = client.ask(image=pixels(48)[0])
    actions = np.concatenate([result["actions"] for result in results])
    expected = np.repeat([1, 2, 3], 16) + np.tile(np.arange(16), 3) / 100
    assert actions.shape == (48, 6)
    assert np.allclose(actions[:, 0], expected)
    assert [result["done"] for result in results] == [False] * 47 + [True]
    assert [result["segment_index"] for result in results] == [0] * 16 + [1] * 16 + [2] * 16
    assert (end["actions"].shape, end["segment_index"], end["done"]) == ((0, 6), -1, True)
    assert policy.opened[0].seen == list(range(33)) or len(policy.opened[0].seen) >= 33


@pytest.mark.parametrize(
    "images",
    [
        pixels(9)[0],
        pixels(9),
        pixels(9).transpose(0, 3, 1, 2),
        pixels(9)[0].transpose(2, 0, 1),
        encoded(9),
        [encoded(9)],
        [encoded(9, "WEBP")],
    ],
    ids=["HWC", "kHWC", "kCHW", "CHW", "bytes", "list of bytes", "WebP"],
)
def test_every_form_of_an_image_arrives_as_the_same_frame(server, policy, images):
    with PolicyClient(server) as client:
        assert client.ask(images=images, prompt="go")["num_received_frames"] == 1
    assert policy.opened[0].seen[0] in (8, 9, 10)


def test_session_with_a_name_outlives_its_connection_and_keeps_its_reply(server):
    with PolicyClient(server) as client:
        client.ask(images=pixels(0), prompt="go", session_id="flight", reply="step")
    with PolicyClient(server) as client:
        result = client.ask(images=pixels(1), session_id="flight")
    assert (result["num_received_frames"], result["actions"].shape) == (2, (1, 6))
    assert result["session_id"] == "flight"
    assert server.server.manager.sessions == 1


def test_name_of_the_private_session_may_be_sent_back(server, policy):
    with PolicyClient(server) as client:
        name = client.ask(images=pixels(0), prompt="go")["session_id"]
        assert client.ask(images=pixels(1), session_id=name)["num_received_frames"] == 2
    assert len(policy.opened) == 1


def test_private_session_ends_with_its_connection(server):
    with PolicyClient(server) as client:
        client.ask(images=pixels(0), prompt="go")
        assert server.server.manager.sessions == 1
        with PolicyClient(server) as other:
            assert "unknown_session" in other.ask(images=pixels(0))
    with PolicyClient(server) as client:
        for _ in range(100):
            if server.server.manager.sessions == 0:
                break
            client.ask()
    assert server.server.manager.sessions == 0


def test_frame_sent_again_is_not_stored_twice_and_gets_the_same_answer(server, policy):
    with PolicyClient(server) as client:
        first = client.ask(images=pixels(0), prompt="go", first_frame=1)
        again = client.ask(images=pixels(0), prompt="go", first_frame=1)
        assert np.array_equal(first["actions"], again["actions"])
        assert (again["num_received_frames"], again["segment_index"]) == (1, 0)
        assert client.ask(images=pixels(0, 0), first_frame=5) == "gap: expected frame 2, got 5"
    assert policy.opened[0].seen == [0]


def test_reset_starts_afresh_and_a_new_prompt_alone_does_not(server, policy):
    with PolicyClient(server) as client:
        client.ask(images=pixels(0), prompt="go")
        assert client.ask(images=pixels(0), prompt="left")["num_received_frames"] == 2
        assert client.ask(images=pixels(0), prompt="left", reset=True)["num_received_frames"] == 1
    assert len(policy.opened) == 2


def test_numpy_scalars_are_read_as_the_values_that_they_are(server, policy):
    def scalar(value: np.generic) -> dict[bytes, object]:
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}

    with PolicyClient(server) as client:
        client.ask(
            images=pixels(0), prompt=np.array("go"), seed=scalar(np.int64(3)), reset=scalar(np.bool_(True)),
            deadline_ms=scalar(np.float32(1e6)), first_frame=np.array(1),
        )  # fmt: skip
    assert policy.opened[0].asked_with == [("go", "", 3)]


REFUSALS = [
    ({}, "unknown_session: the first observation of a session needs a prompt and an image"),
    ({"reset": True}, "bad_request: reset needs a prompt and an image"),
    ({"prompt": "go"}, "bad_request: the first observation of a session needs an image"),
    ({"images": pixels(0), "prompt": " "}, "bad_request: prompt is blank"),
    ({"images": pixels(0), "prompt": "x" * 4097}, "too_large: prompt is longer than 4096 characters"),
    ({"images": pixels(0), "prompt": 5}, "invalid_field: prompt must be text"),
    ({"images": pixels(0), "prompt": "go", "reply": "chunk"}, "invalid_field: reply must be one of segment, step"),
    ({"images": pixels(0), "prompt": "go", "seed": 1.5}, "invalid_field: seed must be an integer"),
    ({"images": pixels(0), "prompt": "go", "seed": True}, "invalid_field: seed must be an integer"),
    ({"images": pixels(0), "prompt": "go", "first_frame": 0}, "invalid_field: first_frame must be 1 to"),
    ({"images": pixels(0), "prompt": "go", "reset": 1}, "invalid_field: reset must be a boolean"),
    ({"images": pixels(0), "prompt": "go", "deadline_ms": float("nan")}, "invalid_field: deadline_ms must be finite"),
    ({"images": pixels(0), "prompt": "go", "session_id": "a\nb"}, "bad_request: session holds a control character"),
    ({"images": pixels(0).astype(np.float32), "prompt": "go"}, "bad_image: image must be uint8 (H,W,3) or (k,H,W,3)"),
    ({"images": pixels(0)[0, :, :, 0], "prompt": "go"}, "bad_image: image must be uint8"),
    ({"images": np.zeros((0, 4, 3), np.uint8), "prompt": "go"}, "bad_image: image must be uint8"),
    ({"images": np.zeros((129, 1, 1, 3), np.uint8), "prompt": "go"}, "too_large: more than 128 images"),
    ({"images": [b""] * 129, "prompt": "go"}, "too_large: more than 128 images"),
    ({"images": np.zeros((1, 9000, 3), np.uint8), "prompt": "go"}, "too_large: 9000x1 pixels"),
    ({"images": b"GIF89a" + bytes(64), "prompt": "go"}, "bad_image: format not accepted"),
    ({"images": [encoded(0), b"junk"], "prompt": "go"}, "bad_image: not a readable image"),
    ({"images": "text", "prompt": "go"}, "bad_image: image must be uint8 (H,W,3) or (k,H,W,3), got another type"),
    (
        {"images": {b"__ndarray__": True, b"data": b"x", b"dtype": "|O", b"shape": [1]}, "prompt": "go"},
        "bad_image: image must be uint8 (H,W,3) or (k,H,W,3), got a map that is no array of numbers",
    ),
    (
        {"images": {b"__ndarray__": True, b"data": b"xx", b"dtype": "|u1", b"shape": [1, 1, 3]}, "prompt": "go"},
        "bad_image: image must be uint8",
    ),
]


def test_connection_flies_on_after_every_refusal(server, policy):
    with PolicyClient(server) as client:
        for observation, message in REFUSALS:
            answer = client.ask(**observation)
            assert isinstance(answer, str), observation.keys()
            assert answer.startswith(message), answer
        for data in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\x81\x01\x02", b"\x91" * 100_000):
            assert client.ask_bytes(data) == "bad_request: an observation must be a msgpack map with text keys"
        assert client.ask_bytes("text") == "bad_request: send binary frames of msgpack, not text"
        assert policy.opened == []
        results = [client.ask(images=pixels(0), prompt="go")]
        results += [client.ask(images=pixels(*[0] * 16)) for _ in range(2)]
    assert [result["segment_index"] for result in results] == [0, 1, 2]


def test_refused_observation_changes_nothing(server, policy):
    with PolicyClient(server) as client:
        client.ask(images=pixels(0), prompt="go")
        assert client.ask(images=b"junk", prompt="other", reset=True) == "bad_image: not a readable image"
        result = client.ask(images=pixels(*[0] * 16))
        assert (result["num_received_frames"], result["segment_index"]) == (17, 1)
    assert [session.prompt for session in policy.opened] == ["go"]


def test_policy_failure_is_an_error_text_without_its_traceback(server, policy, caplog):
    with PolicyClient(server) as client:
        client.ask(images=pixels(0), prompt="go")
        policy.opened[0].fail_with = KeyError("secret /path")
        answer = client.ask(images=pixels(*[0] * 16))
        assert answer.startswith("internal: ")
        assert "secret" not in answer
        assert "secret" in caplog.text
        assert client.ask()["segment_index"] == 1


@pytest.mark.parametrize(("reply", "count"), [("segment", 16), ("step", 1)])
def test_actions_beyond_the_envelope_are_a_hold_with_its_reason(policy, reply, count):
    envelope = EnvelopeConfig(step_cm=0.5)
    with BackgroundServer(policy, envelope=envelope) as server, PolicyClient(server) as client:
        result = client.ask(images=pixels(0), prompt="go", reply=reply)
    assert result["hold"] == "step_translation"
    assert np.array_equal(result["actions"], np.zeros((count, 6), np.float32))


def test_deadline_that_passes_meanwhile_is_said():
    with BackgroundServer(NullPolicy(infer_s=0.1)) as server, PolicyClient(server) as client:
        assert client.ask(images=pixels(0), prompt="go", deadline_ms=50)["late"] is True


def test_deadline_that_cannot_be_met_is_refused_and_the_frames_stay():
    with BackgroundServer(NullPolicy(infer_s=0.2)) as server, PolicyClient(server) as client:
        client.ask(images=pixels(0), prompt="go")
        assert client.ask(images=pixels(*[0] * 16), deadline_ms=10).startswith("deadline: needs about 2")
        assert client.ask()["segment_index"] == 1


def test_key_is_asked_for_before_the_upgrade():
    with BackgroundServer(NullPolicy(), keys=["right"]) as server:
        with pytest.raises(InvalidStatus) as refused:
            PolicyClient(server, additional_headers={"Authorization": "Api-Key wrong"})
        assert refused.value.response.status_code == 401
        with PolicyClient(server, additional_headers={"Authorization": "Api-Key right"}) as client:
            assert client.ask(images=pixels(0), prompt="go")["segment_index"] == 0


def test_frame_over_the_size_limit_closes_with_1009_and_the_server_lives():
    with BackgroundServer(NullPolicy(), limits=Limits(max_msg_bytes=10_000)) as server:
        with PolicyClient(server) as client, pytest.raises(ConnectionClosed) as closed:
            client.ask(images=np.zeros((100, 100, 3), np.uint8), prompt="go")
        assert closed.value.rcvd.code == 1009
        with PolicyClient(server) as client:
            assert client.ask(images=pixels(0), prompt="go")["segment_index"] == 0


def test_shutdown_closes_with_1001():
    with BackgroundServer(NullPolicy()) as server:
        client = PolicyClient(server)
        client.ask(images=pixels(0), prompt="go")
    with pytest.raises(ConnectionClosed) as closed:
        client.socket.recv(timeout=5)
    assert closed.value.rcvd.code == 1001
