"""UAV-Flow's parquet files: grouped, ordered, converted; what is wrong is left out and named."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flight_files import files_no_larger_than, numbered_frames, numbers_of, straight_poses
from PIL import Image

from worldvln_edge.training.data.uav_flow import check_uav_flow, convert_uav_flow, spread_frames
from worldvln_edge.training.data.video_shards import VideoShards
from worldvln_edge.training.sim.shards import FlightDataError


def picture(level_frame: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(level_frame).save(data, "PNG")
    return data.getvalue()


def flight(name: str, count: int, **log: Any) -> list[dict[str, Any]]:
    """Rows of a flight in reversed order, as nothing promises an order."""
    content = {"instruction": "old words", "preprocessed_logs": straight_poses(count).tolist(), **log}
    frames = numbered_frames(count, (16, 24))
    rows = [
        {"id": name, "frame_idx": i, "image": {"bytes": picture(f), "path": None}, "log": json.dumps(content)}
        for i, f in enumerate(frames)
    ]
    return rows[::-1]


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 7) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "parquet"
    folder.mkdir()
    return folder


def convert(source: Path, out: Path, unit: Any = "cm") -> VideoShards:
    problems = convert_uav_flow(source, out, length_unit=unit, show_progress=False)
    assert problems == []
    return VideoShards(out, None)


def test_flights_are_converted_in_order_with_words_and_motion(source: Path, tmp_path: Path):
    long = flight("b", 60, instruction_unified="new words")
    write_parquet(source / "0.parquet", long[:30] + flight("a", 12))
    write_parquet(source / "1.parquet", long[30:])  # a flight over two files
    flights = convert(source, tmp_path / "out")
    assert [flights.instruction(row) for row in range(2)] == ["new words", "old words"]
    assert numbers_of(flights.frames(0)) == spread_frames(60)
    assert numbers_of(flights.frames(1)) == list(range(9))  # 12 are cut to 4k+1
    np.testing.assert_allclose(np.linalg.norm(flights.deltas(1)[:, 3:], axis=1), 0.1, atol=1e-6)
    steps = np.diff(spread_frames(60))
    np.testing.assert_allclose(np.degrees(flights.deltas(0)[:, 0]), 0.5 * steps, atol=1e-4)
    assert flights.rows[0].fps == 16.0


def test_lengths_are_in_the_unit_that_was_said(source: Path, tmp_path: Path):
    write_parquet(source / "0.parquet", flight("a", 5))
    flights = convert(source, tmp_path / "out", "m")
    np.testing.assert_allclose(np.linalg.norm(flights.deltas(0)[:, 3:], axis=1), 10.0, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 4, 5, 48, 49, 50, 97, 1000])
def test_frames_are_spread_as_the_rule_says(frames: int):
    chosen = spread_frames(frames)
    if frames > 49:
        assert chosen == [int(i * (frames - 1) / 48) for i in range(49)]
    else:
        assert chosen == list(range(max(n for n in range(1, frames + 1) if n % 4 == 1)))


def test_a_single_file_and_bare_bytes_are_taken(source: Path, tmp_path: Path):
    rows = [{**row, "image": row["image"]["bytes"]} for row in flight("a", 5)]
    assert len(convert(write_parquet(source / "0.parquet", rows), tmp_path / "out")) == 1


def test_flights_without_poses_have_no_motion(source: Path, tmp_path: Path):
    write_parquet(source / "0.parquet", flight("a", 5, preprocessed_logs=[]))
    assert convert(source, tmp_path / "out").deltas(0) is None


def test_raw_logs_stand_in_for_missing_ones(source: Path, tmp_path: Path):
    write_parquet(source / "0.parquet", flight("a", 5, preprocessed_logs=None, raw_logs=straight_poses(5).tolist()))
    assert convert(source, tmp_path / "out").deltas(0).shape == (4, 6)


def broken_flights() -> list[dict[str, Any]]:
    small = flight("size", 5)
    small[1]["image"]["bytes"] = picture(numbered_frames(1, (8, 8))[0])
    no_picture = flight("picture", 5)
    no_picture[2]["image"]["bytes"] = b"no picture"
    empty = flight("empty", 5)
    empty[2]["image"]["bytes"] = None
    bad_log = flight("log", 5)
    for row in bad_log:
        row["log"] = "{"
    rows = flight("words", 5, instruction="") + flight("poses", 5, preprocessed_logs=[[0.0] * 6] * 4)
    rows += flight("nan", 5, preprocessed_logs=[["x"] * 6] * 5)
    twice = flight("twice", 5, preprocessed_logs=None)
    return rows + small + no_picture + empty + bad_log + twice + twice[3:4]


def test_flights_that_cannot_be_used_are_left_out_and_named(source: Path, tmp_path: Path):
    write_parquet(source / "0.parquet", broken_flights() + flight("good", 5))
    problems = convert_uav_flow(source, tmp_path / "out", length_unit="m", show_progress=False)
    assert len(VideoShards(tmp_path / "out", None)) == 1
    found = {problem.where.rpartition(" ")[2]: problem.reason for problem in problems}
    assert "no text in instruction_unified or instruction" in found["words"]
    assert "4 poses of 6 finite numbers for 5 pictures are wanted" in found["poses"]
    assert "not rows of numbers" in found["nan"]
    assert "picture of another size" in found["size"]
    assert "not a readable image" in found["picture"]
    assert "no picture in `image`" in found["empty"]
    assert "`log` is not JSON" in found["log"]
    assert found["twice"].endswith("comes twice, in 0.parquet and 0.parquet")
    assert all("0.parquet" in problem.where for problem in problems)
    assert check_uav_flow(source, show_progress=False) == (9, problems)


def test_no_usable_flight_leaves_nothing(source: Path, tmp_path: Path):
    write_parquet(source / "0.parquet", broken_flights())
    with pytest.raises(FlightDataError, match="out: not written, no flights are left"):
        convert_uav_flow(source, tmp_path / "out", length_unit="m", show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parquet"]


def test_full_disk_leaves_nothing(source: Path, tmp_path: Path):
    write_parquet(source / "0.parquet", flight("a", 49))
    with files_no_larger_than(500), pytest.raises(FlightDataError, match="cannot be written"):
        convert_uav_flow(source, tmp_path / "out", length_unit="m", show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parquet"]


def test_files_that_are_not_uav_flow_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(FlightDataError, match="parquet: no parquet files"):
        check_uav_flow(source, show_progress=False)
    write_parquet(source / "0.parquet", [{"id": "a", "frame_idx": 0}])
    with pytest.raises(FlightDataError, match=r"0\.parquet: lacks the column image, log; it has id, frame_idx"):
        check_uav_flow(source, show_progress=False)
    (source / "0.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(FlightDataError, match=r"0\.parquet: broken parquet file"):
        check_uav_flow(source, show_progress=False)


def test_rows_without_a_number_are_refused(source: Path):
    rows = flight("a", 5)
    rows[2]["frame_idx"] = None
    write_parquet(source / "0.parquet", rows)
    with pytest.raises(FlightDataError, match=r"0\.parquet: row 2 of group 0 has no id or frame_idx"):
        check_uav_flow(source, show_progress=False)
    write_parquet(source / "0.parquet", [{**row, "frame_idx": f"frame {row['frame_idx']}"} for row in flight("a", 5)])
    with pytest.raises(FlightDataError, match=r"0\.parquet: row 0 of group 0: frame_idx 'frame \d' is no number"):
        check_uav_flow(source, show_progress=False)
