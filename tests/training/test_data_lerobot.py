"""LeRobot datasets, version 3: ours as the format wants them, and those of others."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flight_files import (
    HW,
    HeldFlights,
    files_no_larger_than,
    numbered_frames,
    numbered_video,
    numbers_of,
    straight_poses,
)
from PIL import Image

from worldvln_edge.training.data import lerobot_writer
from worldvln_edge.training.data.frame_selection import FrameSelection
from worldvln_edge.training.data.lerobot_format import ACTION_NAMES, STATE_NAMES
from worldvln_edge.training.data.lerobot_reader import LeRobotFlights, LeRobotMotion
from worldvln_edge.training.data.lerobot_writer import write_lerobot
from worldvln_edge.training.data.trajectory_file import Trajectory, TrajectoryUnits
from worldvln_edge.training.data.video_file import read_video_index
from worldvln_edge.training.sim.shards import FlightDataError

WHOLE = FrameSelection(mode="whole")
WORDS = ("fly on", "turn", "fly on")


def flights(frames: int = 9, count: int = 3, kind: type[HeldFlights] = HeldFlights) -> HeldFlights:
    """Flights whose frames are numbered on from one flight to the next."""
    pictures = numbered_frames(frames * count).reshape(count, frames, *HW, 3)
    rng = np.random.default_rng(0)
    deltas = rng.normal(0, 0.05, (count, frames - 1, 6)).astype(np.float32)
    return kind(pictures, deltas, WORDS[:count])


class _Mixed(HeldFlights):
    """The last flight has no motion."""

    def deltas(self, row: int) -> Any:
        return None if row == len(self) - 1 else super().deltas(row)


class _Silent(HeldFlights):
    def deltas(self, row: int) -> Any:
        return None


def write(out: Path, source: HeldFlights | None = None, **options: Any) -> Path:
    source = source or flights()
    write_lerobot(source, range(len(source)), out, show_progress=False, **options)
    return out


def test_what_is_written_is_read(tmp_path: Path):
    source = flights()
    read = LeRobotFlights(write(tmp_path / "d", source), None, selection=WHOLE)
    assert (len(read), read.skipped) == (3, [])
    for row in range(3):
        assert numbers_of(read.frames(row)) == list(range(9 * row, 9 * row + 9))
        assert read.instruction(row) == WORDS[row]
        assert read.frame_count(row) == 9
        np.testing.assert_allclose(read.deltas(row), source.deltas(row), atol=1e-6)
        np.testing.assert_allclose(read.stamps_s(row), np.arange(9) / 16)
    assert len({read.key(row) for row in range(3)}) == 3
    assert read.name(1) == f"{tmp_path / 'd'}: episode 1"


def test_dataset_has_the_files_columns_and_sizes_of_the_format(tmp_path: Path):
    folder = write(tmp_path / "d")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "videos/observation.images.camera/chunk-000/file-000.mp4",
    ]
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"]) == (3, 27, 2, 16)
    assert info["splits"] == {"train": "0:3"}
    assert info["features"]["action"]["names"] == ACTION_NAMES
    assert info["features"]["observation.images.camera"]["shape"] == [*HW, 3]
    data = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    assert data["index"].to_pylist() == list(range(27))
    assert data["episode_index"].to_pylist() == [i // 9 for i in range(27)]
    assert data["frame_index"].to_pylist() == 3 * list(range(9))
    assert data["task_index"].to_pylist() == 9 * [0] + 9 * [1] + 9 * [0]
    assert data.schema.field("action").type == pa.list_(pa.float32(), 6)
    assert set(data.column_names) == set(info["features"]) - {"observation.images.camera"}
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(e["dataset_from_index"], e["dataset_to_index"], e["length"]) for e in episodes] == [
        (0, 9, 9),
        (9, 18, 9),
        (18, 27, 9),
    ]
    camera = "videos/observation.images.camera"
    assert [e[f"{camera}/from_timestamp"] for e in episodes] == [0, 9 / 16, 18 / 16]
    assert [e["tasks"] for e in episodes] == [[words] for words in WORDS]
    assert read_video_index(folder / files[-1]).frames == 27


def test_instructions_are_the_index_of_a_pandas_frame(tmp_path: Path):
    table = pq.read_table(write(tmp_path / "d") / "meta/tasks.parquet")
    assert table.to_pydict() == {"task_index": [0, 1], "task": ["fly on", "turn"]}
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_last_action_is_zero_and_states_are_the_path(tmp_path: Path):
    source = flights()
    data = pq.read_table(write(tmp_path / "d", source) / "data/chunk-000/file-000.parquet")
    actions, states = (np.array(data[key].to_pylist())[:9] for key in ("action", "observation.state"))
    assert not actions[-1].any()
    assert not states[0].any()
    poses = states * ([0.01] * 3 + [np.pi / 180] * 3)
    np.testing.assert_allclose(Trajectory("pose6", poses).deltas(), source.deltas(0), atol=1e-5)
    assert len(STATE_NAMES) == states.shape[1]


def test_statistics_are_those_of_all_rows(tmp_path: Path):
    folder = write(tmp_path / "d")
    stats = json.loads((folder / "meta/stats.json").read_text())
    actions = np.array(pq.read_table(folder / "data/chunk-000/file-000.parquet")["action"].to_pylist(), np.float64)
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0), rtol=1e-5)
    np.testing.assert_allclose(stats["action"]["q90"], np.quantile(actions, 0.9, axis=0), rtol=1e-5)
    assert stats["action"]["count"] == [27]
    camera = stats["observation.images.camera"]
    assert np.shape(camera["mean"]) == np.shape(camera["q50"]) == (3, 1, 1)
    assert 0 < camera["min"][0][0][0] < camera["mean"][0][0][0] < camera["max"][0][0][0] < 1
    assert np.shape(stats["timestamp"]["mean"]) == (1,)
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet")
    np.testing.assert_allclose(episodes["stats/action/mean"][1].as_py(), actions[9:18].mean(0), rtol=1e-5)


def test_large_videos_are_cut_between_episodes(tmp_path: Path):
    folder = write(tmp_path / "d", video_bytes=1)
    videos, data = list(folder.rglob("*.mp4")), list((folder / "data").rglob("*.parquet"))
    assert len(videos) == len(data) > 1  # the encoder holds frames back, so a file may take two episodes
    read = LeRobotFlights(folder, None, selection=WHOLE)
    assert [numbers_of(read.frames(row))[0] for row in range(3)] == [0, 9, 18]
    np.testing.assert_allclose(read.deltas(2), flights().deltas(2), atol=1e-6)


def test_episodes_are_described_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = write(tmp_path / "whole")
    monkeypatch.setattr(lerobot_writer, "_EPISODES_TOGETHER", 2)
    parts = write(tmp_path / "parts")
    place = "meta/episodes/chunk-000/file-000.parquet"
    assert pq.ParquetFile(parts / place).num_row_groups == 2
    assert pq.read_table(parts / place).to_pylist() == pq.read_table(whole / place).to_pylist()
    assert (parts / "meta/info.json").read_bytes() == (whole / "meta/info.json").read_bytes()


def test_flights_without_motion_have_no_action(tmp_path: Path):
    read = LeRobotFlights(write(tmp_path / "d", flights(kind=_Silent)), (16, 16), selection=WHOLE)
    assert read.deltas(0) is None
    assert read.frames(0).shape == (9, 16, 16, 3)


def test_motion_in_some_flights_only_is_refused_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(FlightDataError, match=r"flight 2: no motion, unlike the first flight"):
        write(tmp_path / "d", flights(kind=_Mixed))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path):
    with files_no_larger_than(2000), pytest.raises(FlightDataError, match="cannot be written"):
        write(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_no_flights_are_no_dataset(tmp_path: Path):
    with pytest.raises(FlightDataError, match="not written, no flights are left to write"):
        write_lerobot(flights(), [], tmp_path / "d")


FRONT, DOWN = "observation.images.front", "observation.images.down"


def foreign_dataset(root: Path, *, embedded: bool = False, **changes: Any) -> Path:
    """Two episodes at 32 fps, as others write them: grouped names, several cameras, an episode that starts late."""
    lengths, columns = (37, 5), {"dtype": "float32", "shape": [6], "names": {"motors": list("xyzrap")}}
    features: dict[str, Any] = {
        FRONT: {"dtype": "image" if embedded else "video", "shape": [3, *HW], "names": ["c", "h", "w"]},
        DOWN: {"dtype": "video", "shape": [3, *HW], "names": ["c", "h", "w"]},
        "observation.state": columns,
        "action": columns,
    }
    info = {"codebase_version": "v3.0", "fps": 32, "features": features, "robot_type": None, **changes}
    info.setdefault("video_path", "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    pictures = numbered_frames(sum(lengths))
    numbered_video(root / f"videos/{FRONT}/chunk-000/file-000.mp4", sum(lengths), fps=32)
    rows, episodes, first = [], [], 0
    for episode, length in enumerate(lengths):
        poses = straight_poses(length).tolist()
        for i in range(length):
            row = {"episode_index": episode, "timestamp": i / 32, "observation.state": poses[i], "action": [0.0] * 6}
            if embedded:
                data = io.BytesIO()
                Image.fromarray(pictures[first + i]).save(data, "PNG")
                row[FRONT] = {"bytes": data.getvalue(), "path": "x.png"}
            rows.append(row)
        record = {"episode_index": episode, "tasks": ["", "go"], "length": length}
        record |= {"data/chunk_index": 0, "data/file_index": 0}
        for camera in (FRONT, DOWN):
            record |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0}
            record |= {f"videos/{camera}/from_timestamp": first / 32}
        episodes.append(record)
        first += length
    pq.write_table(pa.Table.from_pylist(rows), root / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


STATE_MOTION = LeRobotMotion(
    column="observation.state", layout="pose6", units=TrajectoryUnits(length="cm", angle="deg")
)


@pytest.mark.parametrize("embedded", [False, True])
def test_other_datasets_are_resampled_and_their_motion_is_as_declared(tmp_path: Path, embedded: bool):
    root = foreign_dataset(tmp_path, embedded=embedded)
    read = LeRobotFlights(root, None, selection=WHOLE, camera=FRONT, motion=STATE_MOTION)
    assert numbers_of(read.frames(0)) == list(range(0, 34, 2))  # 16 of 32 a second, 17 frames
    assert numbers_of(read.frames(1)) == [37]
    assert read.instruction(0) == "go"
    np.testing.assert_allclose(np.linalg.norm(read.deltas(0)[:, 3:], axis=1), 0.2, atol=1e-5)
    assert LeRobotFlights(root, None, camera=FRONT).deltas(0) is None


def test_recorded_deltas_lead_to_the_next_frame(tmp_path: Path):
    units = TrajectoryUnits(length="m", angle="rad")
    motion = LeRobotMotion(column="observation.state", layout="delta6", units=units)
    read = LeRobotFlights(foreign_dataset(tmp_path, fps=16), None, selection=WHOLE, camera=FRONT, motion=motion)
    expected = straight_poses(37)[:36].astype(np.float32)
    np.testing.assert_allclose(read.deltas(0), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, f"no camera chosen; it has {FRONT}, {DOWN}"),
        ({"camera": "left"}, "no camera 'left' chosen; it has"),
        (
            {"camera": FRONT, "motion": LeRobotMotion(column="odometry", layout="pose6", units=STATE_MOTION.units)},
            "no column 'odometry'; it has",
        ),
    ],
)
def test_choices_that_are_not_there_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(FlightDataError, match=message):
        LeRobotFlights(foreign_dataset(tmp_path), None, **options)


def test_layout_must_fit_the_column(tmp_path: Path):
    motion = LeRobotMotion(column="observation.state", layout="delta4", units=STATE_MOTION.units)
    read = LeRobotFlights(foreign_dataset(tmp_path), None, camera=FRONT, motion=motion, selection=WHOLE)
    with pytest.raises(FlightDataError, match=r"episode 0: .*file-000\.parquet: delta4 has rows of 4 numbers, found"):
        read.deltas(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v2.1"}, r"version v2\.1, wanted v3\.0; convert it with LeRobot's own script"),
        ({"fps": 0}, "fps must be above 0"),
        ({"fps": "fast"}, "not the info of a LeRobot dataset"),
        ({"video_path": "videos/{camera}.mp4"}, r"unknown path pattern 'videos/\{camera\}\.mp4'"),
    ],
)
def test_infos_that_do_not_work_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(FlightDataError, match=rf"info\.json: .*{message}"):
        LeRobotFlights(foreign_dataset(tmp_path, **changes), None, camera=FRONT)


def test_missing_parts_are_named(tmp_path: Path):
    with pytest.raises(FlightDataError, match=r"info\.json: No such file"):
        LeRobotFlights(tmp_path, None)
    root = foreign_dataset(tmp_path / "d")
    down = LeRobotFlights(root, None, camera=DOWN, selection=WHOLE)
    with pytest.raises(FlightDataError, match=r"episode 0: .*observation\.images\.down.*mp4: No such file"):
        down.frames(0)
    (root / "data/chunk-000/file-000.parquet").unlink()
    read = LeRobotFlights(root, None, camera=FRONT, motion=STATE_MOTION)
    with pytest.raises(FlightDataError, match=r"episode 0: .*data/chunk-000/file-000\.parquet: No such file"):
        read.deltas(0)
    for file in (root / "meta/episodes").rglob("*.parquet"):
        file.unlink()
    with pytest.raises(FlightDataError, match="no parquet files in meta/episodes"):
        LeRobotFlights(root, None, camera=FRONT)


def test_episodes_that_cannot_be_used_are_left_out(tmp_path: Path):
    root = foreign_dataset(tmp_path)
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    records = pq.read_table(file).to_pylist()
    records[0]["tasks"] = [" "]
    pq.write_table(pa.Table.from_pylist(records), file)
    read = LeRobotFlights(root, None, camera=FRONT, selection=FrameSelection(min_video_frames=33))
    assert [problem.reason for problem in read.skipped] == [
        "no instruction in `tasks`",
        "segment of 0 s is shorter than 33 frames",
    ]
    assert len(read) == 0


def test_episodes_without_a_place_are_left_out_and_a_bare_task_is_one(tmp_path: Path):
    root = foreign_dataset(tmp_path)
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    records = [{**record, "tasks": "go up"} for record in pq.read_table(file).to_pylist()]
    records[0] |= {"length": None, f"videos/{FRONT}/from_timestamp": None}
    pq.write_table(pa.Table.from_pylist(records), file)
    read = LeRobotFlights(root, None, camera=FRONT, selection=WHOLE)
    assert [problem.reason for problem in read.skipped] == [f"nothing in length, videos/{FRONT}/from_timestamp"]
    assert [read.instruction(row) for row in range(len(read))] == ["go up"]


def test_video_without_the_episodes_times_is_refused(tmp_path: Path):
    root = foreign_dataset(tmp_path)
    numbered_video(root / f"videos/{FRONT}/chunk-000/file-000.mp4", 40, fps=32)
    read = LeRobotFlights(root, None, camera=FRONT, selection=WHOLE)
    assert numbers_of(read.frames(1)) == [37]
    numbered_video(root / f"videos/{FRONT}/chunk-000/file-000.mp4", 20, fps=32)
    with pytest.raises(FlightDataError, match=r"episode 0: .*mp4: no frame at 1\.000 s .* the nearest is at 0\.594 s"):
        read.frames(0)
