"""What a flown run leaves behind: files that programs and people can read."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from worldvln_edge.client import ServerUnreachableError
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    ReplayPilot,
    SceneSimulators,
    expert_actions,
    fly_task,
)
from worldvln_edge.training.evaluation.flight_report import file_stems, summarise, summary_table, write_flight_files
from worldvln_edge.training.evaluation.flight_run import FlightRunConfig, fly_tasks
from worldvln_edge.training.evaluation.flight_view import draw_predicted_path, render_views, view_hw
from worldvln_edge.training.sim.instructions import TASK_KINDS
from worldvln_edge.training.sim.tasks import generate_task

FLIGHT_KEYS = [
    "task",
    "instruction",
    "kind",
    "success",
    "final_distance_m",
    "final_yaw_error_deg",
    "segments",
    "latency_ms_p50",
    "latency_ms_p95",
]


class SegmentedExpert(ReplayPilot):
    """The expert in three segments, as a policy would give it."""

    image_hw = (64, 64)

    def __init__(self):
        super().__init__(expert_actions, num_actions=48)
        self.points = (1, 17, 33, 49)

    def start(self, task, seed):
        super().start(task, seed)
        self._next = 0

    def observe(self, frames):
        first, self._next = self._next, self._next + 16
        return self._actions[first : self._next]


@pytest.fixture(scope="module")
def flight():
    index = [kind.name for kind in TASK_KINDS].index("approach")
    task = generate_task("test", index)
    with SceneSimulators((64, 64)) as simulators:
        return fly_task(task, SegmentedExpert(), simulators.for_task(task))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tasks = [generate_task("test", index) for index in (0, 2)]
    out = tmp_path_factory.mktemp("run")
    with BackgroundServer(NullPolicy(image_hw=(64, 64))) as server:
        return out, fly_tasks(tasks, out, FlightRunConfig(server=server.url, with_video=False), measure=lambda: {})


def test_summary_holds_the_agreed_fields(run):
    out, flown = run
    summary = json.loads((out / "summary.json").read_text())
    assert [list(flight) for flight in summary["flights"]] == [FLIGHT_KEYS] * 2
    assert summary["success_rate"] == 0.0
    assert [flight["segments"] for flight in summary["flights"]] == [3, 3]
    assert summary["flights"][0]["task"] == "test-000000"
    assert summary["flights"][0]["kind"] == "forward"
    assert summary["flights"][0]["latency_ms_p50"] <= summary["flights"][0]["latency_ms_p95"]
    assert summary["seconds_per_segment"] > 0
    assert "server_rss_mb" not in summary
    assert flown.summary_file == out / "summary.json"


def test_every_listed_picture_is_there_and_nothing_half_written(run):
    out, flown = run
    assert flown.pictures[0] == out / "index.png"
    assert all(picture.is_file() for picture in flown.pictures)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_flight_files_hold_what_was_flown(flight, tmp_path):
    write_flight_files(flight, tmp_path, "approach", with_video=False)
    actions = json.loads((tmp_path / "approach_actions.json").read_text())
    poses = json.loads((tmp_path / "approach_poses.json").read_text())
    np.testing.assert_allclose(actions["actions_server_order"], flight.actions, atol=1e-4)
    np.testing.assert_allclose(poses["points"], flight.poses, atol=1e-4)
    assert actions["action_order_server"] == ["dx", "dy", "dz", "droll", "dyaw", "dpitch"]
    assert [segment["frames_in_call"] for segment in actions["segments"]] == [1, 16, 16]
    assert [segment["num_received_frames"] for segment in actions["segments"]] == [1, 17, 33]
    assert poses["final"]["success"] is True
    assert poses["final"]["frames_captured"] == 49


def test_plot_and_sheet_are_pictures_with_something_on_them(flight, run, tmp_path):
    plot, *_ = write_flight_files(flight, tmp_path, "approach", with_video=False)
    for path in (plot, run[0] / "index.png"):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 500
        assert picture.std() > 20


def test_video_plays_and_shows_the_flight(flight, tmp_path):
    video = write_flight_files(flight, tmp_path, "approach", with_video=True)[1]
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 16
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 49 + 2 * 15
    assert frames[0].shape[1] == 320
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 5
    (view,) = render_views(flight, (320, 320), [0])
    caption = frames[0].shape[0] - 320
    shown = draw_predicted_path(view, flight, 0)[:200, :200].astype(int)
    assert np.abs(frames[0][caption : caption + 200, :200] - shown).mean() < 8


def test_predicted_path_is_drawn_until_the_last_frame(flight):
    for frame in (0, 16, 40):
        (view,) = render_views(flight, (160, 160), [frame])
        changed = (draw_predicted_path(view, flight, frame) != view).any(-1)
        assert 20 < changed.sum() < 0.2 * changed.size
    (view,) = render_views(flight, (160, 160), [48])
    np.testing.assert_array_equal(draw_predicted_path(view, flight, 48), view)


def test_pictures_keep_the_cameras_shape_in_even_numbers():
    assert view_hw((64, 64), 320) == (320, 320)
    assert view_hw((90, 160), 320) == (180, 320)
    assert all(side % 2 == 0 for side in view_hw((37, 64), 321))


def test_file_names_are_safe_and_different():
    assert file_stems(["a", "a", "../../etc/passwd", "", "fly to: x?"]) == [
        "a",
        "a-2",
        "_.._etc_passwd",
        "task",
        "fly_to_x_",
    ]


def test_table_shows_every_flight_and_the_rate(flight):
    table = summary_table(summarise([flight], model="nano", server="ws://x", seed=0))
    assert flight.task.task_id in table
    assert flight.instruction in table
    assert "1 of 1 flights succeeded (100%)" in table


def test_nothing_is_written_when_no_server_answers(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ServerUnreachableError):
        fly_tasks([generate_task("test", 0)], out, FlightRunConfig(server="ws://127.0.0.1:9"))
    assert not out.exists()


def test_a_run_without_tasks_is_refused(tmp_path):
    with pytest.raises(FlightError, match="no tasks"):
        fly_tasks([], tmp_path, FlightRunConfig(server="ws://127.0.0.1:9"))
