"""A recorded flight becomes training data that the readers of route folders and LeRobot datasets take."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from worldvln_edge import cli
from worldvln_edge.client import SessionClient
from worldvln_edge.poses import actions_to_deltas
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.recording.recorder import Recorder, RecorderConfig
from worldvln_edge.runtime.recording.recording_file import RecordingFile
from worldvln_edge.runtime.recording.recording_messages import FrameNote, Gap, Picture, Segment
from worldvln_edge.runtime.recording.recording_reader import Recording
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.training.data.frame_selection import FrameSelection
from worldvln_edge.training.data.lerobot_reader import LeRobotFlights
from worldvln_edge.training.data.recording_flights import RecordingFlights
from worldvln_edge.training.data.route_folder import RouteFolder
from worldvln_edge.training.sim.shards import FlightDataError

FULL = FrameSelection(mode="whole")
FRAMES = np.random.default_rng(0).integers(0, 256, (40, 16, 24, 3), np.uint8)
POSES = [(10.0 * index, 2.0 * index, 100.0, 0.0, 3.0 * index, 0.0) for index in range(40)]


def record(folder: Path, *, has_poses: bool = True, is_larger: bool = False) -> Path:
    """40 frames; the instruction changes with frame 20, so it holds from frame 33 on."""
    policy = NullPolicy()
    recorder = Recorder(folder, policy.info, config=RecorderConfig(least_free_bytes=0))
    with (
        BackgroundServer(policy, recorder=recorder) as server,
        SessionClient(server.url, frame_format="rgb8") as client,
    ):
        client.start("fly forward")
        for index, frame in enumerate(FRAMES):
            client.observe(
                [np.concatenate([frame, frame]) if is_larger and index == 5 else frame],
                prompt="turn left" if index == 19 else None,
                poses=[POSES[index]] if has_poses else None,
            )
        client.end()
    recorder.close()
    (path,) = folder.glob("*.mcap")
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("recording"))


def export(path: Path, *options: object) -> Result:
    return CliRunner().invoke(cli.main, ["record", "export", str(path), *map(str, options)])


def test_routes_hold_frames_words_and_poses_of_the_flight(recording, tmp_path):
    result = export(recording, "--route", tmp_path / "routes")
    assert result.exit_code == 0, result.output
    routes = RouteFolder(tmp_path / "routes", None, selection=FULL)
    assert [routes.instruction(row) for row in range(len(routes))] == ["fly forward", "turn left"]
    np.testing.assert_array_equal(routes.frames(0), FRAMES[:33])
    np.testing.assert_array_equal(routes.frames(1), FRAMES[32:37])  # whole latents: 4n + 1 frames
    flown = RecordingFlights(Recording(recording))
    assert [flown.frame_count(row) for row in range(2)] == [33, 8]
    for row in range(2):
        read = routes.deltas(row)
        np.testing.assert_allclose(read, flown.deltas(row)[: len(read)], atol=1e-6)
    np.testing.assert_allclose(flown.deltas(0)[:, 0], np.radians(3.0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(flown.deltas(0)[:, 3:], axis=1), np.hypot(0.1, 0.02), atol=1e-6)


def test_lerobot_dataset_holds_the_same_flights(recording, tmp_path):
    result = export(recording, "--lerobot", tmp_path / "set", "--image-size", 32, 32)
    assert result.exit_code == 0, result.output
    flights = LeRobotFlights(tmp_path / "set", None, selection=FULL)
    assert [flights.instruction(row) for row in range(len(flights))] == ["fly forward", "turn left"]
    assert flights.frames(0).shape == (33, 32, 32, 3)
    np.testing.assert_allclose(flights.deltas(0), RecordingFlights(Recording(recording)).deltas(0), atol=1e-5)


def test_answered_actions_may_stand_for_the_motion(tmp_path):
    flights = RecordingFlights(Recording(record(tmp_path, has_poses=False)), motion="actions")
    np.testing.assert_array_equal(flights.deltas(0), actions_to_deltas(np.zeros((32, 6))))
    assert [flights.frame_count(row) for row in range(2)] == [33, 8]


def test_flight_without_poses_is_written_without_motion(tmp_path):
    path = record(tmp_path / "r", has_poses=False)
    assert RecordingFlights(Recording(path)).deltas(0) is None
    assert export(path, "--route", tmp_path / "routes").exit_code == 0
    assert RouteFolder(tmp_path / "routes", None, selection=FULL).deltas(0) is None


def test_keys_tell_rows_apart(recording):
    flights = RecordingFlights(Recording(recording))
    assert flights.key(0) != flights.key(1)
    assert flights.key(0) != RecordingFlights(Recording(recording), (32, 32)).key(0)
    assert "frames 1 to 33" in flights.name(0)


def rewritten(recording: Path, path: Path, change) -> Recording:
    """A copy whose messages went through `change`, which may leave one out (None)."""
    file = RecordingFile(path)
    for timed in Recording(recording):
        message = change(timed.message)
        if message is not None:
            (file.add_picture if isinstance(message, Picture) else file.add_note)(message, timed.time_ns)
    file.finish()
    return Recording(path)


def test_flight_with_a_hole_in_it_is_refused(recording, tmp_path):
    def without_frame_7(message):
        return None if isinstance(message, Picture) and message.index == 7 else message

    def with_a_gap(message):
        is_7 = isinstance(message, Picture) and message.index == 7
        return Gap(first_frame=7, last_frame=7, events=1) if is_7 else message

    with pytest.raises(FlightDataError, match="frame 7 is missing"):
        RecordingFlights(rewritten(recording, tmp_path / "a.mcap", without_frame_7))
    with pytest.raises(FlightDataError, match=r"frames 7 to 7; a flight with a hole in it is no training data"):
        RecordingFlights(rewritten(recording, tmp_path / "b.mcap", with_a_gap))


def test_flight_that_is_too_short_is_refused(recording, tmp_path):
    short = rewritten(recording, tmp_path / "short.mcap", lambda each: None if isinstance(each, Picture) else each)
    with pytest.raises(FlightDataError, match="0 frames, which is too short for a flight"):
        RecordingFlights(short)


def test_frame_that_cannot_be_decoded_is_named(recording, tmp_path):
    def broken(message):
        is_3 = isinstance(message, Picture) and message.index == 3
        return Picture(index=3, data=b"no picture") if is_3 else message

    with pytest.raises(FlightDataError, match="frame 3: not a readable image"):
        RecordingFlights(rewritten(recording, tmp_path / "a.mcap", broken)).frames(0)


def test_frames_of_several_sizes_need_one_size(tmp_path):
    path = record(tmp_path / "r", is_larger=True)
    result = export(path, "--route", tmp_path / "routes")
    assert result.exit_code == 1
    assert "frame 6 has (32, 24) pixels, the first one (16, 24); give --image-size" in result.output
    assert export(path, "--route", tmp_path / "routes", "--image-size", 16, 16).exit_code == 0


def test_missing_poses_or_actions_are_named(recording, tmp_path):

    def without_a_pose(message):
        return FrameNote(index=7) if isinstance(message, FrameNote) and message.index == 7 else message

    def without_a_segment(message):
        return None if isinstance(message, Segment) and message.segment == 1 else message

    with pytest.raises(FlightDataError, match="39 poses for 40 frames; give --motion actions, or none"):
        RecordingFlights(rewritten(recording, tmp_path / "a.mcap", without_a_pose)).deltas(0)
    flights = RecordingFlights(rewritten(recording, tmp_path / "b.mcap", without_a_segment), motion="actions")
    with pytest.raises(FlightDataError, match="some of its actions are not in the recording; leave it out"):
        flights.deltas(0)


def test_export_needs_a_place(recording):
    result = export(recording)
    assert result.exit_code == 2
    assert "--route FOLDER, --lerobot FOLDER, or both" in result.output
