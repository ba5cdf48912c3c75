"""A recorded flight, fed to its bundle again, gives the same bits; anything else is said with its place."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from crashing_server import SeeingPolicy
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from mcap.reader import make_reader
from recorded_flights import files, messages, recording_server, replayed
from small_models import random_frames

from worldvln_edge import cli
from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.generation_profile import GenerationProfile
from worldvln_edge.images import decode_image
from worldvln_edge.protocol import Observe, Start
from worldvln_edge.runtime.recording.prediction_teller import PredictionTeller
from worldvln_edge.runtime.recording.recorded_policy import OtherPolicyError, load_recorded_policy, settings_of
from worldvln_edge.runtime.recording.recording_file import RecordingFile
from worldvln_edge.runtime.recording.recording_messages import Instruction, Opening, Picture, Segment, Step
from worldvln_edge.runtime.recording.recording_reader import Recording
from worldvln_edge.runtime.recording.replay import ReplayError, replay
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.session_events import FramesPredicted
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig
from worldvln_edge.runtime.worldvln.worldvln_policy import PREVIEW_GRAPHS, WorldVLNPolicy, load_policy

FRAMES, SEGMENTS = 13, 3  # of the tiny model's horizon


@pytest.fixture(scope="module")
def policy(tiny_bundle: Path) -> WorldVLNPolicy:
    return load_policy(tiny_bundle, backend="cpu", threads=1)


@pytest.fixture(scope="module")
def frames(policy: WorldVLNPolicy) -> list[np.ndarray]:
    return random_frames(policy.config, 2 * FRAMES, seed=7, hw=(30, 50))


def record(policy: WorldVLNPolicy, folder: Path, fly, **options) -> Recording:
    """`fly(client)` against a server that records; the last session's recording."""
    settings = settings_of(policy, threads=1)
    with (
        recording_server(policy, folder, settings=settings, **options) as server,
        SessionClient(server.url) as client,
    ):
        fly(client)
    return Recording(files(folder)[-1])


def segments(recording: Recording) -> list[Segment]:
    return [message for message in messages(recording) if isinstance(message, Segment)]


@pytest.fixture(scope="module")
def recording(policy, frames, tmp_path_factory) -> Recording:
    """Frames in uneven groups, and an instruction that changes."""

    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m", seed=3)
        client.observe(frames[:2])
        client.observe(frames[2:3])
        client.observe(frames[3:8], prompt="turn left to the tower")
        client.observe(frames[8:13])
        client.end()

    return record(policy, tmp_path_factory.mktemp("flight"), fly)


def test_replayed_flight_has_the_same_actions_to_the_last_bit(recording, policy):
    report = replayed(recording, policy)
    assert (report.segments, report.different, report.missing) == (SEGMENTS, 0, "")
    assert report.first_difference is None
    assert len({segment.made for segment in segments(recording)}) == SEGMENTS


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_segments_that_were_generated_ahead_are_generated_ahead_again(threshold, frames, tiny_bundle, tmp_path):
    speculating = load_policy(tiny_bundle, backend="cpu", threads=1, speculation=SpeculationConfig(threshold=threshold))

    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m", seed=3)
        for index, frame in enumerate(frames[:FRAMES]):
            client.observe([frame])
            if index % 4 == 0:
                time.sleep(0.4)  # the device is idle

    recorded = record(speculating, tmp_path, fly)
    assert any(segment.was_ready for segment in segments(recorded)) == (threshold == 0)
    again = load_recorded_policy(recorded.opening, tiny_bundle, backend="cpu")
    assert again.speculation == SpeculationConfig(threshold=threshold)
    assert replayed(recorded, again).is_same


def test_chained_flight_replays_over_its_horizons(policy, frames, tmp_path):
    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m", chain=True, max_horizons=2)
        for frame in frames[: 2 * FRAMES - 1]:
            client.observe([frame])

    recorded = record(policy, tmp_path, fly)
    assert len(segments(recorded)) == 2 * SEGMENTS
    assert replayed(recorded, policy).is_same


def test_held_segments_are_compared_by_what_the_policy_gave(policy, frames, tmp_path):
    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m")
        assert client.observe(frames[:1]).hold == "step_translation"
        client.observe(frames[1:5])

    recorded = record(policy, tmp_path, fly, envelope=EnvelopeConfig(step_cm=1e-6))
    assert not segments(recorded)[0].answered_actions().any()
    report = replayed(recorded, policy)
    assert (report.segments, report.is_same) == (2, True)


def test_flight_with_missed_deadlines_replays(policy, frames, tmp_path):
    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m")
        client.observe(frames[:1])
        with pytest.raises(ServerError, match="needs about"):
            client.observe(frames[1:5], deadline_ms=0.01)
        client.observe(frames[5:6])

    recorded = record(policy, tmp_path, fly)
    assert replayed(recorded, policy).is_same
    assert len(segments(recorded)) == 2


def test_flight_that_went_on_after_a_restart_replays(policy, frames, tmp_path):
    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m", session="flight", seed=5)
        client.observe(frames[:3])

    def go_on(client: SessionClient) -> None:
        client.start(session="flight", resume=True)
        client.observe(frames[3:9])
        client.observe([])

    record(policy, tmp_path / "r", fly, journal=SessionJournal(tmp_path / "journal"))
    recorded = record(policy, tmp_path / "r", go_on, journal=SessionJournal(tmp_path / "journal"))
    assert recorded.opening.restored_frames == 3
    assert [segment.segment for segment in segments(recorded)] == [1, 2]
    assert replayed(recorded, policy).is_same


def test_profiles_of_the_flight_are_loaded_and_flown_again(frames, tiny_bundle, tmp_path):
    own = GenerationProfile(name="shallow", max_repetitions=1, guided_scales=0)
    shallow = load_policy(tiny_bundle, backend="cpu", threads=1, profiles={"shallow": own}, profile="shallow")

    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m")
        client.observe(frames[:5])
        client.observe([])

    recorded = record(shallow, tmp_path, fly)
    assert {segment.profile for segment in segments(recorded)} == {"shallow"}
    again = load_recorded_policy(recorded.opening, tiny_bundle, backend="cpu")
    assert again.profile == own
    assert replayed(recorded, again).is_same


def test_first_difference_is_named_and_may_be_allowed(recording, policy):
    def altered() -> list:
        found = messages(recording)
        at = next(index for index, each in enumerate(found) if isinstance(each, Segment) and each.segment == 1)
        actions = found[at].made_actions().copy()
        actions[2, 4] += 0.5
        found[at] = msgspec.structs.replace(found[at], made=actions.tobytes())
        return found

    report = replay(recording.opening, altered(), policy)
    assert (report.segments, report.different, report.is_same) == (SEGMENTS, 1, False)
    assert str(report.first_difference).startswith("segment 1, step 2, dyaw: ")
    assert (report.max_cm, round(report.max_deg, 3)) == (0.0, 0.5)
    assert not replay(recording.opening, altered(), policy, within_cm=9, within_deg=0.4).is_same
    assert replay(recording.opening, altered(), policy, within_deg=0.6).is_same


def test_another_seed_does_not_replay(recording, policy):
    opening = msgspec.structs.replace(recording.opening, seed=4)
    assert replay(opening, messages(recording), policy).different > 0


def test_recording_that_contradicts_itself_is_refused_with_the_place(recording, policy):
    found = messages(recording)
    first = next(each for each in found if isinstance(each, Segment))
    cases = {
        "segment 0 is recorded behind segment 2": [*found, first],
        "the session had 50 frames; here it has 13": [*found, Step(did="took_frames", frames=50)],
        "segment 0 has 1 steps in the recording, and 4 here": [
            msgspec.structs.replace(each, made=each.made[:24]) if each is first else each for each in found
        ],
        "segment 0: its actions are cut": [
            msgspec.structs.replace(each, made=each.made[:7]) if each is first else each for each in found
        ],
        "frame 1 cannot be decoded": [Picture(index=1, data=b"no picture")],
        "is not ready with 1 frames": [
            *found[: next(index for index, each in enumerate(found) if isinstance(each, Picture)) + 1],
            msgspec.structs.replace(first, observed_frames=1),
            msgspec.structs.replace(first, segment=1, observed_frames=1),
        ],
    }
    for text, altered in cases.items():
        with pytest.raises(ReplayError, match=text):
            replay(recording.opening, altered, policy)


def test_missing_frame_ends_the_comparison(recording, policy):
    found = [each for each in messages(recording) if not (isinstance(each, Picture) and each.index == 4)]
    report = replay(recording.opening, found, policy)
    assert (report.segments, report.is_same) == (1, False)
    assert report.missing == "frame 4 is not in the recording; the next one in it is 5"


def test_settings_are_told_only_when_they_were_told_in_flight():
    """A policy that sees everything; the prompt that came with frames which were not flown changes nothing."""
    opening = msgspec.convert(
        {
            "uid": "a", "part": 0, "software": "0", "prompt": "go", "seed": 1, "emit": "ahead", "settings": {},
            "horizon": {"num_frames": 49, "step": 16, "fps": 16},
            "policy": {
                "name": "null", "precision": "", "backend": "", "device": "", "image_hw": (8, 8), "weights": "",
            },
        },
        Opening,
    )  # fmt: skip
    frame = Picture(index=1, data=bytes(8 * 8 * 3), raw_hw=(8, 8))
    segment = Segment(
        segment=0, actions=[], made=np.full((16, 6), 102, np.float32).tobytes(), observed_frames=1, seed=1,
        head="latent", profile="exact", device_ms=0,
    )  # fmt: skip
    late = Instruction(prompt="go on", seed=1)
    assert replay(opening, [frame, segment, late], SeeingPolicy()).is_same
    assert not replay(opening, [frame, late, segment], SeeingPolicy()).is_same


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_command_compares_and_ends_with_0(recording, tiny_bundle):
    result = run("replay", recording.parts[0], "--bundle", tiny_bundle, "--backend", "cpu")
    assert result.exit_code == 0, result.output
    assert "3 segments, flown with onnx on cpu, replayed with onnx on cpu" in result.output
    assert "all actions are the same" in result.output


def test_command_ends_with_1_where_actions_differ(recording, tiny_bundle, tmp_path):
    file = RecordingFile(tmp_path / "other.mcap")
    for timed in recording:
        message = timed.message
        if isinstance(message, Opening):
            message = msgspec.structs.replace(message, seed=4)
        (file.add_picture if isinstance(message, Picture) else file.add_note)(message, timed.time_ns)
    file.finish()
    command = ("replay", tmp_path / "other.mcap", "--bundle", tiny_bundle, "--backend", "cpu")
    result = run(*command, "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert report["first_difference"]["segment"] == 0
    assert report["different"] > 0
    assert "first difference: segment 0, step 0, d" in run(*command).output


def test_command_ends_with_1_where_nothing_was_compared(policy, frames, tiny_bundle, tmp_path):
    empty = record(policy, tmp_path, lambda client: client.start("go"))
    result = run("replay", empty.parts[0], "--bundle", tiny_bundle, "--backend", "cpu")
    assert result.exit_code == 1
    assert "not compared: no segment is recorded" in result.output
    assert "same" not in result.output


def test_command_ends_with_1_where_a_part_is_missing(policy, frames, tiny_bundle, tmp_path):
    def fly(client: SessionClient) -> None:
        client.start("go")
        for first in range(0, FRAMES, 2):
            client.observe(frames[first : first + 2])
        client.end()

    parts = record(policy, tmp_path, fly, config={"part_bytes": 6_000}).parts
    assert len(parts) > 3
    parts[-2].unlink()
    result = run("replay", parts[0], "--bundle", tiny_bundle, "--backend", "cpu")
    assert result.exit_code == 1
    assert "not compared further: " in result.output
    assert "is missing" in result.output


def test_another_bundle_is_refused_unless_it_is_wanted(recording, tiny_bundle):
    opening = msgspec.structs.replace(
        recording.opening, policy=msgspec.structs.replace(recording.opening.policy, weights="0" * 64)
    )
    with pytest.raises(OtherPolicyError, match=r"not the bundle that was flown.*000000000000.*--other-weights"):
        load_recorded_policy(opening, tiny_bundle, backend="cpu")
    load_recorded_policy(opening, tiny_bundle, backend="cpu", takes_other_weights=True).close()


def test_profiles_that_cannot_be_read_are_refused(recording, tiny_bundle):
    settings = msgspec.structs.replace(recording.opening.settings, own_profiles='[{"name": ""}]')
    with pytest.raises(OtherPolicyError, match="own profiles cannot be read"):
        load_recorded_policy(msgspec.structs.replace(recording.opening, settings=settings), tiny_bundle)


def test_info_tells_what_was_flown(recording, policy):
    result = run("record", "info", recording.parts[0])
    assert result.exit_code == 0
    for text in (
        f"tiny fp32, onnx on cpu, weights {policy.info.weights[:12]}",
        "profile exact, guidance 3, seed 3, emit ahead, speculation off",
        "instruction  fly forward 5 m",
        "instruction  turn left to the tower",
        "frames       13 jpeg",
        "segments     3 (3 exact), 0 late",
        "end          ended",
    ):
        assert text in result.output
    summary = json.loads(run("record", "info", recording.parts[0], "--json").output)
    assert summary["frames"] == {"jpeg": 13}
    assert summary["opening"]["policy"]["weights"] == policy.info.weights


def test_predicted_frames_are_recorded_when_asked_and_change_no_action(frames, tiny_bundle, tmp_path):
    previewing = load_policy(tiny_bundle, backend="cpu", threads=1, side_graphs=PREVIEW_GRAPHS)

    def fly(client: SessionClient) -> None:
        client.start("fly forward 5 m")
        for start, end in ((0, 1), (1, 5), (5, 9)):
            client.observe(frames[start:end])
            time.sleep(0.4)  # nobody wants the device

    recorded = record(previewing, tmp_path, fly, tells_predictions=True)
    with recorded.parts[0].open("rb") as file:
        found = [message for _, _, message in make_reader(file).iter_messages(topics="/predicted")]
    found.sort(key=lambda message: message.sequence)
    assert [message.sequence for message in found] == list(range(2, 14))
    shown = decode_image(CompressedImage.FromString(found[0].data).data)
    assert shown.shape == (*previewing.config.image_hw, 3)
    step_ns = 10**9 // previewing.info.horizon.fps
    assert [later.log_time - found[0].log_time for later in found[1:4]] == pytest.approx(
        [step_ns, 2 * step_ns, 3 * step_ns], abs=2
    )
    assert replayed(recorded, load_policy(tiny_bundle, backend="cpu", threads=1)).is_same


def test_predictions_that_come_too_late_are_left_out():
    """A result behind the next segment's would be taken for that one's."""
    told: list = []

    class Slow(NullSession):
        def predicted_frames(self, should_stop=lambda: False):
            return np.full((2, 4, 4, 3), self.emitted, np.uint8)

    class SlowPolicy(NullPolicy):
        def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
            return Slow(self, prompt, seed=seed, emit=emit)

    async def fly() -> None:
        manager = SessionManager(SlowPolicy())
        manager.events.subscribe(PredictionTeller(manager).watch)
        manager.events.subscribe(lambda event: told.append(event) if isinstance(event, FramesPredicted) else None)
        await manager.start("", Start(id=1, session="a", prompt="go"))
        raw = {"fmt": "rgb8", "w": 8, "h": 8}
        for index, (first, count) in enumerate(((1, 1), (2, 16), (18, 16)), start=2):
            frames = [bytes(8 * 8 * 3)] * count
            await manager.observe("", Observe(id=index, session="a", first=first, frames=frames, **raw))
            if index != 3:  # the third request comes before the second one's frames are predicted
                await asyncio.sleep(0.1)
        await manager.end("", "a", 9)
        manager.close()

    asyncio.run(fly())
    assert [event.segment for event in told][::2][:1] == [0]
    assert told[-1].segment == 2
    assert all(event.segment == int(event.frames[0, 0, 0, 0]) for event in told)


def test_served_flight_is_recorded_and_replays(frames, tiny_bundle, tmp_path):
    """As a user does it: a server of its own, SIGTERM, the command."""
    options = ["--ws", "127.0.0.1:0", "--backend", "cpu", "--threads", "1"]
    command = [sys.executable, "-m", "worldvln_edge", "serve", tiny_bundle, *options, "--record", tmp_path / "r"]
    process = subprocess.Popen([*command, "--record-predicted"], stderr=subprocess.PIPE, text=True)
    try:
        url = next(line.split()[-1] for line in process.stderr if " is ready at " in line)
        with SessionClient(url) as client:
            client.start("fly forward 5 m")
            client.observe(frames[:1])
            client.observe(frames[1:5])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    found = [
        Recording(path) for path in files(tmp_path / "r")
    ]  # the flights that warm the server up are not among them
    assert [each.opening.prompt for each in found] == ["fly forward 5 m"]
    result = run("replay", found[0].parts[0], "--bundle", tiny_bundle, "--backend", "cpu")
    assert (result.exit_code, "2 segments" in result.output) == (0, True), result.output


def test_wrong_options_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    refused = run("serve", tmp_path, "--record", tmp_path / "file" / "r")
    assert refused.exit_code == 1
    assert refused.output.startswith(f"error: recordings cannot be written to {tmp_path}/file/r")
    alone = run("serve", tmp_path, "--record-predicted")
    assert alone.exit_code == 2
    assert "--record-predicted needs --record FOLDER" in alone.output


def test_missing_package_names_the_extra_of_a_subcommand(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mcap.stream_reader", None)
    monkeypatch.delitem(sys.modules, "worldvln_edge.runtime.recording.recording_reader")
    result = run("record", "info", tmp_path / "x.mcap")
    assert result.exit_code == 1
    assert "`worldvln-edge record info` needs mcap" in result.output
    assert "pip install 'worldvln-edge[record]'" in result.output


def test_help_lists_what_can_be_done_with_recordings():
    result = run("record", "--help")
    assert result.exit_code == 0
    for name, subcommand in cli.RECORD_SUBCOMMANDS.items():
        assert f"  {name}" in result.output
        assert subcommand.help in result.output
        assert run("record", name, "--help").exit_code == 0
