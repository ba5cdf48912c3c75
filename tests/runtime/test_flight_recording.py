"""Every session is recorded, whatever door it came through; the file opens elsewhere, and holds what happened."""

import asyncio
import base64
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from crashing_server import SeeingPolicy
from http_calls import HttpCalls, RememberingPolicy, nonfinite
from mcap.reader import make_reader
from openpi_calls import PolicyClient, pixels
from recorded_flights import files, kinds, messages, picture, pictures, recording_server, replayed

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import Observe, Start
from worldvln_edge.rigid_motion import rotations_of_angles
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.recording.foxglove_messages import viewer_pose
from worldvln_edge.runtime.recording.recorder import Recorder, RecorderConfig, RecordingError
from worldvln_edge.runtime.recording.recording_messages import (
    NOTE_TOPICS,
    Answer,
    Closing,
    FrameNote,
    Instruction,
    Refusal,
    Segment,
    json_schema,
)
from worldvln_edge.runtime.recording.recording_reader import Recording
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.session_events import SessionClosed, SessionEvents, SessionOpened
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_manager import SessionManager

JPEGS = [picture(value) for value in range(1, 50)]


def fly(server, count: int = 49, *, url: str | None = None, **options) -> None:
    with SessionClient(url or server.url) as client:
        client.start("go", seed=3)
        for index in range(count):
            client.observe([JPEGS[index]], **options)
        client.end()


def only(folder: Path) -> Recording:
    (path,) = files(folder)
    return Recording(path)


def test_recording_opens_with_the_readers_of_mcap_and_keeps_pictures_as_they_came(tmp_path):
    with recording_server(NullPolicy(), tmp_path / "r") as server:
        fly(server)
    (path,) = files(tmp_path / "r")
    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        summary = reader.get_summary()
        schemas = {each.topic: summary.schemas[each.schema_id] for each in summary.channels.values()}
        jpegs = [message.data for _, _, message in reader.iter_messages(topics="/camera")]
    assert {topic: schema.name for topic, schema in schemas.items()} == {
        "/session": "worldvln.Opening",
        "/frames": "worldvln.FrameNote",
        "/steps": "worldvln.Step",
        "/camera": "foxglove.CompressedImage",
        "/actions": "worldvln.Segment",
        "/timings": "worldvln.Answer",
        "/tf": "foxglove.FrameTransform",
        "/path": "foxglove.PosesInFrame",
        "/plan": "foxglove.PosesInFrame",
        "/end": "worldvln.Closing",
    }
    assert {schema.encoding for schema in schemas.values()} == {"jsonschema", "protobuf"}
    assert all(sent in stored for sent, stored in zip(JPEGS, jpegs, strict=True))
    recording = Recording(path)
    assert [each.data for each in pictures(recording)] == JPEGS
    assert kinds(recording) == {
        "Opening": 1, "FrameNote": 49, "Picture": 49, "Segment": 3, "Step": 33, "Answer": 49, "Closing": 1,
    }  # fmt: skip
    assert recording.problems == []


def test_frames_poses_instructions_and_answers_are_told(tmp_path):
    policy = NullPolicy()
    with recording_server(policy, tmp_path / "r") as server, SessionClient(server.url) as client:
        client.start("go", seed=3)
        client.observe([JPEGS[0]], t_ns=[7], poses=[(100.0, 50.0, 20.0, 0.0, 90.0, 0.0)])
        client.observe([np.zeros((8, 12, 3), np.uint8)], prompt="turn left")
    told = messages(only(tmp_path / "r"))
    first, second = (each for each in told if isinstance(each, FrameNote))
    assert (first.index, first.t_ns, first.pose.x, first.pose.yaw) == (1, 7, 100.0, 90.0)
    assert (second.index, second.t_ns, second.pose) == (2, None, None)
    assert [each.prompt for each in told if isinstance(each, Instruction)] == ["turn left"]
    answers = [each for each in told if isinstance(each, Answer)]
    assert [(each.segment, each.frames) for each in answers] == [(0, 1), (-1, 2)]
    assert all(0 <= each.infer_ms <= each.total_ms for each in answers)


def test_pose_is_turned_into_right_handed_metres():
    """Turned right by 90 degrees, forward is Foxglove's -y."""
    pose = viewer_pose([100.0, 50.0, 20.0, 0.0, 90.0, 0.0])
    position, turn = pose.position, pose.orientation
    assert (position.x, position.y, position.z) == (1.0, -0.5, 0.2)
    np.testing.assert_allclose((turn.x, turn.y, turn.z, turn.w), (0, 0, -np.sqrt(0.5), np.sqrt(0.5)), atol=1e-12)


def test_every_turn_is_the_one_of_our_poses_in_the_mirror():
    mirror = np.diag([1.0, -1.0, 1.0])
    for roll, yaw, pitch in np.random.default_rng(0).uniform(-180, 180, (50, 3)).tolist():
        turn = viewer_pose([0, 0, 0, roll, yaw, pitch]).orientation
        v, w = np.array([turn.x, turn.y, turn.z]), turn.w
        cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
        rotation = (w * w - v @ v) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross
        expected = mirror @ rotations_of_angles(np.radians([roll, yaw, pitch])) @ mirror
        np.testing.assert_allclose(rotation, expected, atol=1e-12)


@pytest.mark.parametrize("kind", NOTE_TOPICS.values(), ids=lambda kind: kind.__name__)
def test_schema_is_one_that_viewers_understand(kind):
    def check(schema: dict) -> None:
        assert set(schema) <= {
            "title", "type", "description", "contentEncoding", "properties", "items", "additionalProperties",
        }  # fmt: skip
        assert schema["type"] in ("object", "array", "string", "integer", "number", "boolean")
        for each in (*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])):
            check(each)

    check(json_schema(kind))


def test_every_door_is_recorded_alike(tmp_path):
    """The same frames through four doors; each recording replays by itself."""
    pngs = [picture(value, "PNG") for value in range(1, 18)]
    texts = ["data:image/png;base64," + base64.b64encode(png).decode() for png in pngs]
    local = ZmqConfig(endpoints=("tcp://127.0.0.1:*",))
    with recording_server(SeeingPolicy(), tmp_path / "r", zmq=local) as server:
        for url in (server.url, server.server.zmq_urls[0]):
            with SessionClient(url) as client:
                client.start("go", seed=3)
                for png in pngs:
                    client.observe([png])
        with HttpCalls(server) as http:
            for text in texts:
                http.fly([text], prompt="go" if text == texts[0] else None, seed=3, allow_future_segments=True)
        with PolicyClient(server) as openpi:
            for number, png in enumerate(pngs):
                openpi.ask(images=[png], **({"prompt": "go", "seed": 3} if number == 0 else {}))
    found = [Recording(path) for path in files(tmp_path / "r")]
    assert len(found) == 4
    for recording in found:
        assert [each.data for each in pictures(recording)] == pngs
        assert (recording.opening.prompt, recording.opening.seed) == ("go", 3)
        report = replayed(recording, SeeingPolicy())
        assert (report.segments, report.is_same) == (2, True)


def test_raw_frames_are_recorded_as_pixels(tmp_path):
    raw = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    with recording_server(NullPolicy(), tmp_path / "r") as server:
        with SessionClient(server.url, frame_format="rgb8") as client:
            client.start("go")
            client.observe([raw])
        with PolicyClient(server) as openpi:
            openpi.ask(images=pixels(1), prompt="go")
    native, openpi = (Recording(path) for path in files(tmp_path / "r"))
    assert (pictures(native)[0].raw_hw, pictures(native)[0].data) == ((8, 12), raw.tobytes())
    assert (pictures(openpi)[0].raw_hw, pictures(openpi)[0].data) == ((4, 6), pixels(1).tobytes())


def test_holds_and_refusals_are_recorded_with_what_the_policy_gave(tmp_path):
    policy = RememberingPolicy()
    envelope = EnvelopeConfig(step_cm=1.5)
    with recording_server(policy, tmp_path / "r", envelope=envelope) as server, SessionClient(server.url) as client:
        client.start("go")
        client.observe([JPEGS[0]])
        policy.opened[0].fail_with = RuntimeError("broken engine")
        with pytest.raises(ServerError):
            client.observe(JPEGS[1:17])
        assert client.observe([]).hold == "step_translation"
    told = messages(only(tmp_path / "r"))
    first, second = (each for each in told if isinstance(each, Segment))
    assert (first.hold, second.hold) == ("step_translation", "step_translation")
    assert not second.answered_actions().any()
    assert second.made_actions()[0, 0] == 2.0
    assert [each.code for each in told if isinstance(each, Refusal)] == ["internal"]


def test_actions_that_are_not_finite_are_recorded_as_they_were(tmp_path):
    policy = RememberingPolicy()
    envelope = EnvelopeConfig()
    with recording_server(policy, tmp_path / "r", envelope=envelope) as server, SessionClient(server.url) as client:
        client.start("go")
        policy.opened[0].fail_with = nonfinite()
        policy.opened[0].pass_over = lambda: setattr(policy.opened[0], "emitted", 0)
        assert client.observe([JPEGS[0]]).hold == "nonfinite"
    (segment,) = (each for each in messages(only(tmp_path / "r")) if isinstance(each, Segment))
    assert np.isnan(segment.made_actions()).all()
    assert not segment.answered_actions().any()


def test_session_that_goes_on_after_a_restart_is_recorded_whole_again(tmp_path):
    def serve(recordings: str):
        journal = SessionJournal(tmp_path / "journal")
        return recording_server(SeeingPolicy(), tmp_path / recordings, journal=journal)

    with serve("before") as server, SessionClient(server.url) as client:
        client.start("go", session="flight", seed=3)
        for jpeg in JPEGS[:20]:
            client.observe([jpeg])
    with serve("after") as server, SessionClient(server.url) as client:
        client.start(session="flight", resume=True)
        for jpeg in JPEGS[20:40]:
            client.observe([jpeg])
    recording = only(tmp_path / "after")
    assert (recording.opening.restored_frames, recording.opening.restored_emitted) == (20, 1)
    assert [each.index for each in pictures(recording)] == list(range(1, 41))
    assert [each.segment for each in messages(recording) if isinstance(each, Segment)] == [2]
    assert replayed(recording, SeeingPolicy()).is_same


def test_client_that_connects_again_goes_on_in_the_same_recording(tmp_path):
    with recording_server(NullPolicy(), tmp_path / "r") as server:
        for resume, part in ((False, JPEGS[:10]), (True, JPEGS[10:20])):
            with SessionClient(server.url) as client:
                client.start(None if resume else "go", session="flight", resume=resume)
                client.observe(part)
    assert [each.data for each in pictures(only(tmp_path / "r"))] == JPEGS[:20]


def test_new_session_of_the_same_name_has_a_recording_of_its_own(tmp_path):
    with recording_server(NullPolicy(), tmp_path / "r") as server:
        for _ in range(2):
            with SessionClient(server.url) as client:
                client.start("go", session="flight")
                client.observe([JPEGS[0]])
    ends = [messages(Recording(path))[-1] for path in files(tmp_path / "r")]
    assert sorted(each.reason for each in ends if isinstance(each, Closing)) == ["replaced", "shutdown"]


def test_name_of_a_session_is_in_no_file(tmp_path):
    """It is enough to resume the session where no keys are used."""
    with recording_server(NullPolicy(), tmp_path / "r") as server, SessionClient(server.url) as client:
        client.start("go", session="secret-name")
        client.observe([JPEGS[0]])
    (path,) = files(tmp_path / "r")
    assert b"secret-name" not in path.read_bytes()


def test_only_the_owner_can_read_recordings(tmp_path):
    with recording_server(NullPolicy(), tmp_path / "deep" / "r") as server:
        fly(server, 1)
    (path,) = files(tmp_path / "deep" / "r")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_folder_that_cannot_be_used_is_refused_with_its_reason(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match=r"file.*(Not a directory|File exists).*--record"):
        Recorder(tmp_path / "file", NullPolicy().info)


def test_full_file_is_followed_by_another_one(tmp_path):
    with recording_server(SeeingPolicy(), tmp_path / "r", config={"part_bytes": 8000}) as server:
        fly(server)
    parts = files(tmp_path / "r")
    assert len(parts) > 3
    assert [path.name[-9:] for path in parts[:3]] == [".000.mcap", ".001.mcap", ".002.mcap"]
    whole = Recording(parts[2])  # any part stands for all of them
    assert [each.data for each in pictures(whole)] == JPEGS
    assert replayed(whole, SeeingPolicy()).is_same
    assert whole.problems == []
    for path in parts:
        with path.open("rb") as file:
            assert make_reader(file).get_summary().statistics.message_count


def test_events_reach_watchers_until_they_are_forgotten():
    seen: list = []

    async def run() -> None:
        events = SessionEvents()
        manager = SessionManager(NullPolicy(), events=events)
        forget = events.subscribe(seen.append)
        await manager.start("", Start(id=1, session="a", prompt="go"))
        await manager.observe("", Observe(id=2, session="a", first=1, frames=[JPEGS[0]]))
        await manager.end("", "a", 3)
        forget()
        forget()
        await manager.start("", Start(id=4, session="b", prompt="go"))
        manager.close()

    asyncio.run(run())
    assert isinstance(seen[0], SessionOpened)
    assert isinstance(seen[-1], SessionClosed)
    assert (seen[0].key, seen[-1].reason, seen[-1].emitted) == (("", "a"), "ended", 0)
    assert len({event.uid for event in seen}) == 1


def test_recording_can_be_read_while_it_is_written(tmp_path):
    """So can one whose computer lost its power: chunks of a second are whole."""
    policy = NullPolicy()
    recorder = Recorder(tmp_path, policy.info, config=RecorderConfig(flush_s=0.05, least_free_bytes=0))

    async def fly_on() -> Recording:
        manager = SessionManager(policy)
        manager.events.subscribe(recorder.watch)
        await manager.start("", Start(id=1, session="a", prompt="go"))
        await manager.observe("", Observe(id=2, session="a", first=1, frames=JPEGS[:5]))
        until = time.monotonic() + 10
        while not files(tmp_path) or files(tmp_path)[0].stat().st_size < 5 * len(JPEGS[0]):
            assert time.monotonic() < until, "nothing is on the disk"
            await asyncio.sleep(0.02)
        found = only(tmp_path)
        assert [each.data for each in pictures(found)] == JPEGS[:5]
        manager.close()
        return found

    found = asyncio.run(fly_on())
    recorder.close()
    assert len(found.problems) == 1
    assert "was cut" in found.problems[0]
