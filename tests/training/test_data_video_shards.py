"""Video shards: where they lie, what a row may say, what is left out and why."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flight_files import HW, numbered_frames, numbered_video, numbers_of, straight_poses, video_row, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from worldvln_edge.training.data.captions import CaptionConfig
from worldvln_edge.training.data.frame_selection import FrameSelection
from worldvln_edge.training.data.trajectory_file import TrajectoryUnits, write_trajectory
from worldvln_edge.training.data.video_shards import VideoShards
from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.trainer.stage import row_generator


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    numbered_video(folder / "v.mp4", 60)
    return folder


def shards(tmp_path: Path, videos: Path, rows: list[Any], **options: Any) -> VideoShards:
    """Rows that name their video by its place."""
    placed = [r if isinstance(r, str) else dict(r) for r in rows]
    for row in placed:
        if isinstance(row, dict) and row.get("video_path"):
            row["video_path"] = str(videos / row["video_path"])
        elif isinstance(row, dict):
            row.pop("video_path", None)
    write_rows(tmp_path / "rows.jsonl", placed)
    return VideoShards(tmp_path, options.pop("image_hw", None), **options)


def test_row_shows_its_frames_caption_and_motion(tmp_path: Path, videos: Path):
    write_trajectory(tmp_path / "poses.json", straight_poses(60), "pose6", TrajectoryUnits(length="cm", angle="deg"))
    row = video_row(begin_frame_id=8, end_frame_id=26, gt_pose_json="poses.json", quality_prompt="sharp")
    flights = shards(tmp_path, videos, [row])
    assert len(flights) == 1
    assert flights.frame_count(0) == 17
    assert numbers_of(flights.frames(0)) == list(range(8, 25))
    assert flights.instruction(0) == "fly forward sharp"
    assert flights.name(0) == f"{tmp_path / 'rows.jsonl'}:1"
    deltas = flights.deltas(0)
    assert deltas is not None
    assert (deltas.shape, deltas.dtype) == ((16, 6), np.float32)
    np.testing.assert_allclose(deltas[:, 0], np.radians(0.5), atol=1e-6)


def test_motion_is_between_the_frames_that_are_shown(tmp_path: Path, videos: Path):
    write_trajectory(tmp_path / "poses.json", straight_poses(60), "pose6", TrajectoryUnits(length="cm", angle="deg"))
    flights = shards(tmp_path, videos, [video_row(frame_idxs=[0, 10, 20, 30, 59], gt_pose_json="poses.json")])
    np.testing.assert_allclose(np.degrees(flights.deltas(0)[:, 0]), [5, 5, 5, 14.5], atol=1e-4)


def test_rows_without_a_trajectory_have_no_motion(tmp_path: Path, videos: Path):
    assert shards(tmp_path, videos, [video_row()]).deltas(0) is None


def test_frames_have_the_size_that_is_asked_for(tmp_path: Path, videos: Path):
    assert shards(tmp_path, videos, [video_row()]).frames(0).shape == (49, *HW, 3)
    assert shards(tmp_path, videos, [video_row()], image_hw=(16, 16)).frames(0).shape == (49, 16, 16, 3)


def test_folders_one_down_come_before_files_of_the_folder(tmp_path: Path):
    for name in ("b", "a"):
        numbered_video(tmp_path / name / "v.mp4", 9)
        write_rows(tmp_path / name / "rows.jsonl", [video_row(end_frame_id=8, tarsier2_caption=name)])
    write_rows(tmp_path / "rows.jsonl", [video_row()])
    flights = VideoShards(tmp_path, None, selection=FrameSelection(mode="segment_full"))
    assert [flights.instruction(row) for row in range(len(flights))] == ["a", "b"]
    assert numbers_of(flights.frames(1)) == list(range(9))  # beside its own shard


def test_paths_are_relative_to_the_shard_then_to_the_working_directory(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
):
    write_rows(tmp_path / "rows.jsonl", [video_row()])
    monkeypatch.chdir(videos)
    assert numbers_of(VideoShards(tmp_path, None).frames(0)) == list(range(49))
    numbered_video(tmp_path / "v.mp4", 49, (16, 16))
    assert VideoShards(tmp_path, None).frames(0).shape[1:3] == (16, 16)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ("{not json", "row", "malformed|invalid|expected"),
        ("[1]", "row", "Expected `object`"),
        ({"image_path": "a.png", "text": " "}, "caption", 'no text in "long_caption" or "text"'),
        ({"image_path": "", "text": "a"}, "row", "image_path"),
        (video_row(fps=None), "row", "missing required field `fps`"),
        (video_row(begin_frame_id="0"), "row", "begin_frame_id"),
        (video_row(tarsier2_caption=None, text="fly"), "caption", 'no text in "tarsier2_caption"; .* text in: text'),
        (video_row(tarsier2_caption=" "), "caption", "no text"),
        (video_row(tarsier2_caption="<<<t=3s>>> "), "caption", "no text"),
        (video_row(MiniCPM_V_2_6_caption=3), "caption", '"MiniCPM_V_2_6_caption" is not text'),
        (video_row(frame_idxs=[0, 1]), "length", "2 frames, which is not 4k"),
        (video_row(begin_frame_id=50), "length", "are no segment"),
    ],
)
def test_rows_that_cannot_be_used_are_left_out_with_file_line_and_reason(
    tmp_path: Path, videos: Path, row: Any, kind: str, message: str
):
    flights = shards(tmp_path, videos, [video_row(), row, "", video_row()])
    assert len(flights) == 2
    (problem,) = flights.skipped
    assert problem.where == f"{tmp_path / 'rows.jsonl'}:2"
    assert problem.kind == kind
    assert re.search(message, problem.reason), problem.reason


def test_neighbouring_frames_take_no_room_and_others_are_kept(tmp_path: Path, videos: Path):
    listed = list(range(0, 34, 2))
    flights = shards(tmp_path, videos, [video_row(begin_frame_id=3, end_frame_id=51), video_row(frame_idxs=listed)])
    assert flights.rows[0].frames == range(3, 52)
    assert list(flights.rows[1].frames) == listed
    assert numbers_of(flights.frames(0)) == list(range(3, 52))
    assert numbers_of(flights.frames(1)) == listed


def test_optional_fields_may_be_null(tmp_path: Path, videos: Path):
    rows = [{**video_row(), "MiniCPM_V_2_6_caption": None, "quality_prompt": None, "frame_idxs": None}]
    rows += [{"image_path": "a.png", "long_caption": None, "text": "a tower", "quality_prompt": None}]
    flights = shards(tmp_path, videos, rows)
    assert flights.skipped == []
    assert [flights.instruction(row, row_generator(0, 0, row)) for row in range(2)] == ["fly forward", "a tower"]


def test_caption_may_stand_elsewhere(tmp_path: Path, videos: Path):
    row = video_row(tarsier2_caption=None, text="climb")
    flights = shards(tmp_path, videos, [row], captions=CaptionConfig(caption_field="text"))
    assert flights.instruction(0, row_generator(0, 0, 0)) == "climb"


def test_other_aspects_are_left_out(tmp_path: Path, videos: Path):
    rows = [video_row(force_h_div_w_template=ratio) for ratio in (1.0, 1.05, 0.562)]
    flights = shards(tmp_path, videos, rows, image_hw=(32, 32))
    assert len(flights) == 2
    assert "wants the aspect h/w 0.562" in flights.skipped[0].reason


def test_broken_video_names_row_and_file(tmp_path: Path):
    (tmp_path / "v.mp4").write_bytes(b"no video" * 99)
    write_rows(tmp_path / "rows.jsonl", [video_row()])
    with pytest.raises(FlightDataError, match=r"rows\.jsonl:1: .*v\.mp4: broken video"):
        VideoShards(tmp_path, None).frames(0)


def test_segment_after_the_video_names_row_and_file(tmp_path: Path, videos: Path):
    flights = shards(tmp_path, videos, [video_row(begin_frame_id=20, end_frame_id=68)])
    with pytest.raises(FlightDataError, match=r"rows\.jsonl:1: .*v\.mp4: frame 68 is wanted, the video holds 60"):
        flights.frames(0)


def test_trajectory_that_is_too_short_names_row_and_file(tmp_path: Path, videos: Path):
    write_trajectory(tmp_path / "poses.json", straight_poses(20), "pose6", TrajectoryUnits(length="cm", angle="deg"))
    flights = shards(tmp_path, videos, [video_row(gt_pose_json="poses.json"), video_row(gt_pose_json="none.json")])
    with pytest.raises(FlightDataError, match=r"rows\.jsonl:1: .*poses\.json: frame 48 has no pose"):
        flights.deltas(0)
    with pytest.raises(FlightDataError, match=r"rows\.jsonl:2: .*none\.json: No such file"):
        flights.deltas(1)


def test_older_trajectory_is_declared_by_its_row(tmp_path: Path, videos: Path):
    (tmp_path / "poses.json").write_text(json.dumps(straight_poses(60).tolist()))
    units = {"length": "cm", "angle": "deg"}
    rows = [video_row(gt_pose_json="poses.json", traj_layout="pose6", traj_units=units)]
    flights = shards(tmp_path, videos, [*rows, video_row(gt_pose_json="poses.json")])
    np.testing.assert_allclose(flights.deltas(0)[0], [np.radians(0.5), 0, 0, 0.1, 0, 0], atol=1e-6)
    with pytest.raises(FlightDataError, match=r"rows\.jsonl:2: .*poses\.json: does not say .* or the JSONL row"):
        flights.deltas(1)


def test_an_image_row_is_a_flight_of_one_frame(tmp_path: Path, videos: Path):
    Image.fromarray(numbered_frames(4)[3]).save(tmp_path / "a.png")
    words = {"long_caption": "a red tower", "text": "tower", "quality_prompt": "sharp"}
    rows = [video_row(), {"image_path": "a.png", **words}, {"image_path": "none.png", "text": "gone"}]
    flights = shards(tmp_path, videos, rows, image_hw=(16, 24))
    assert [flights.frame_count(row) for row in range(3)] == [49, 1, 1]
    assert flights.frames(1).shape == (1, 16, 24, 3)
    assert numbers_of(flights.frames(1)) == [3]
    assert flights.deltas(1) is None
    assert flights.instruction(1) == "a red tower sharp"
    drawn = [flights.instruction(1, row_generator(0, epoch, 1)) for epoch in range(400)]
    assert set(drawn) == {"a red tower sharp", "tower sharp"}
    assert 0.2 < drawn.count("tower sharp") / 400 < 0.4
    assert flights.instruction(2) == "gone"
    with pytest.raises(FlightDataError, match=r"rows\.jsonl:3: .*none\.png: No such file"):
        flights.frames(2)


def test_reference_rule_doubles_the_first_frame(tmp_path: Path, videos: Path):
    flights = shards(tmp_path, videos, [video_row()], selection=FrameSelection(rule="reference"))
    assert numbers_of(flights.frames(0))[:3] == [0, 0, 1]


def test_reference_rule_needs_a_rate(tmp_path: Path):
    numbered_video(tmp_path / "v.mp4", 1)
    write_rows(tmp_path / "rows.jsonl", [video_row()])
    flights = VideoShards(tmp_path, None, selection=FrameSelection(rule="reference"))
    assert "the video holds one frame" in flights.skipped[0].reason


def test_reference_rule_needs_the_video_when_rows_are_read(tmp_path: Path, videos: Path):
    row = video_row(video_path="none.mp4")
    flights = shards(tmp_path, videos, [row], selection=FrameSelection(rule="reference"))
    assert [problem.kind for problem in flights.skipped] == ["video"]


def test_key_follows_file_frames_and_size(tmp_path: Path, videos: Path):
    rows = [video_row(), video_row(), video_row(begin_frame_id=1, end_frame_id=49)]
    flights = shards(tmp_path, videos, rows)
    assert flights.key(0) == flights.key(1) != flights.key(2)
    assert shards(tmp_path, videos, rows, image_hw=(16, 16)).key(0) != flights.key(0)
    other = numbered_video(tmp_path / "other.mp4", 55)
    moved = shards(tmp_path, other.parent, [video_row(video_path="other.mp4")])
    before = moved.key(0)
    numbered_video(other, 58)
    assert moved.key(0) != before


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from([*video_row(), "frame_idxs", "quality_prompt"]), _VALUES, max_size=3))
def test_any_row_is_used_or_left_out_with_a_reason(tmp_path: Path, changes: dict[str, Any]):
    write_rows(tmp_path / "rows.jsonl", [{**video_row(), **changes}])
    flights = VideoShards(tmp_path, None)
    assert len(flights) + len(flights.skipped) == 1
    for row in range(len(flights)):
        assert flights.frame_count(row) % 4 == 1
        assert flights.instruction(row).strip()
    assert all(problem.reason for problem in flights.skipped)


def test_folder_without_shards_is_refused(tmp_path: Path):
    with pytest.raises(FlightDataError, match=r"no video shards \(\*\.jsonl\)"):
        VideoShards(tmp_path, None)
