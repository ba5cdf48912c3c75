"""`worldvln-edge data`: what is found wrong with every kind of dataset, what is converted, what is told."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from flight_files import numbered_frames, numbered_video, numbers_of, straight_poses, video_row, write_rows
from PIL import Image

from worldvln_edge.atomic import FolderInUseError
from worldvln_edge.cli import main
from worldvln_edge.training.data.data_check import CheckReport, MotionLimits, check_dataset, motion_problems
from worldvln_edge.training.data.flight_folder_writer import new_flight_folder
from worldvln_edge.training.data.frame_selection import FrameSelection
from worldvln_edge.training.data.latent_cache import LatentCache
from worldvln_edge.training.data.open_flights import ReadingOptions, kind_of_flights, open_flights
from worldvln_edge.training.data.trajectory_file import TrajectoryUnits, write_trajectory
from worldvln_edge.training.data.video_file import write_video
from worldvln_edge.training.sim.shards import FlightDataError

CM_DEG = TrajectoryUnits(length="cm", angle="deg")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good rows with motion."""
    numbered_video(tmp_path / "d/v.mp4", 60)
    write_trajectory(tmp_path / "d/poses.json", straight_poses(60), "pose6", CM_DEG)
    rows = [video_row(gt_pose_json="poses.json"), video_row(gt_pose_json="poses.json", end_frame_id=20)]
    write_rows(tmp_path / "d/rows.jsonl", rows)
    return tmp_path / "d"


def add_rows(folder: Path, *rows: Any) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def check(folder: Path, **options: Any) -> CheckReport:
    return check_dataset(folder, ReadingOptions(**options), show_progress=False)


def found(report: CheckReport) -> list[tuple[str, str]]:
    """(last part of where, kind) of every problem."""
    return [(problem.where.rpartition(":")[2].strip(), problem.kind) for problem in report.problems]


def test_good_dataset_has_nothing_wrong(folder: Path):
    report = check(folder)
    assert (report.rows, report.problems, report.kind) == (2, (), "video-shards")
    result = run("check", folder)
    assert result.exit_code == 0
    assert f"{folder}: video-shards, 2 rows, nothing wrong" in result.stdout


def test_an_image_row_needs_no_motion_and_has_no_rate(folder: Path):
    Image.fromarray(numbered_frames(1)[0]).save(folder / "a.png")
    add_rows(folder, {"image_path": "a.png", "text": "a tower"}, {"image_path": "none.png", "text": "a tower"})
    report = check(folder)
    assert report.rows == 4
    assert found(report) == [("4", "video")]


def test_every_bad_row_is_reported_with_file_line_and_reason(folder: Path):
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    numbered_video(folder / "fast.mp4", 60, fps=30)
    add_rows(
        folder,
        "{",
        video_row(tarsier2_caption=None, caption="fly"),
        video_row(frame_idxs=[0, 1, 2]),
        video_row(video_path="broken.mp4", gt_pose_json="poses.json"),
        video_row(video_path="none.mp4", gt_pose_json="poses.json"),
        video_row(video_path="fast.mp4", gt_pose_json="poses.json"),
        video_row(),
        video_row(gt_pose_json="none.json"),
    )
    report = check(folder)
    assert found(report) == [
        ("3", "row"),
        ("4", "caption"),
        ("5", "length"),
        ("6", "video"),
        ("7", "video"),
        ("8", "stamps"),
        ("10", "motion"),
        ("9", "motion"),
    ]
    reasons = {problem.where.rpartition(":")[2]: problem.reason for problem in report.problems}
    assert "broken.mp4: broken video" in reasons["6"]
    assert "none.mp4: No such file" in reasons["7"]
    assert "30 frames a second, the row says fps 16" in reasons["8"]
    assert "no motion, as in 1 of 7 rows" in reasons["9"]
    assert all(problem.where.startswith(str(folder / "rows.jsonl")) for problem in report.problems)
    result = run("check", folder, "--limit", "2")
    assert result.exit_code == 1
    assert "rows.jsonl:3" in result.stdout
    assert "... 6 more; --limit 8 prints all" in result.stdout
    assert "7 rows, 1 row, 1 caption, 1 length, 2 video, 1 stamps, 2 motion" in result.stdout


def test_report_is_json_on_demand(folder: Path):
    add_rows(folder, video_row(frame_idxs=[1, 2]))
    result = run("check", folder, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert (content["kind"], content["rows"]) == ("video-shards", 2)
    assert [problem["kind"] for problem in content["problems"]] == ["length"]
    assert content["problems"][0]["where"].endswith("rows.jsonl:3")


@pytest.mark.parametrize(
    ("units", "step", "message"),
    [
        ({"length": "m", "angle": "deg"}, 10.0, "moves 10 m from frame 0 to 1, more than 2 m; are lengths in cm"),
        ({"length": "cm", "angle": "rad"}, 10.0, r"turns 28.6 deg .* more than 20 deg; are angles in deg"),
        ({"length": "cm", "angle": "deg"}, 0.1, "nine flights of ten are shorter than 0.3 m; are lengths in m"),
    ],
)
def test_wrong_units_are_suspected(folder: Path, units: dict[str, Any], step: float, message: str):
    write_trajectory(folder / "poses.json", straight_poses(60, step), "pose6", TrajectoryUnits(**units))
    report = check_dataset(folder, None, MotionLimits(max_turn_deg=20), show_progress=False)
    assert {problem.kind for problem in report.problems} == {"units"}
    assert any(re.search(message, problem.reason) for problem in report.problems)
    result = run("check", folder, "--max-turn", "20")
    assert result.exit_code == 1


def test_a_trajectory_of_another_video_is_suspected(folder: Path):
    write_trajectory(folder / "more.json", straight_poses(75), "pose6", CM_DEG)
    add_rows(folder, video_row(gt_pose_json="more.json"))
    (problem,) = check(folder).problems
    assert (problem.kind, problem.reason) == ("motion", f"{folder / 'more.json'}: covers 75 frames, v.mp4 holds 60")


def test_motion_that_is_not_finite_is_a_problem():
    deltas = np.zeros((3, 6), np.float32)
    deltas[1, 2] = np.nan
    assert list(motion_problems(deltas, MotionLimits())) == ["motion 1 is not finite"]
    assert list(motion_problems(np.zeros((0, 6)), MotionLimits())) == []


def test_frames_of_one_colour_are_a_problem(folder: Path):
    write_video(folder / "black.mp4", np.zeros((60, 32, 48, 3), np.uint8), 16)
    add_rows(folder, video_row(video_path="black.mp4", gt_pose_json="poses.json"))
    (problem,) = check(folder).problems
    assert problem.reason == "all pixels of all 49 frames are 0"


def write_simulator(folder: Path, frames: int = 9, count: int = 2) -> Path:
    folder.mkdir()
    np.savez(
        folder / "flights.npz",
        frames=np.stack([numbered_frames(frames)] * count),
        actions=np.full((count, frames - 1, 6), 7.0, np.float32),
        instructions=np.array([f"fly {i}" for i in range(count)]),
    )
    return folder


def test_a_dataset_that_cannot_be_opened_is_a_problem_of_its_folder(tmp_path: Path):
    report = check(write_simulator(tmp_path / "s", frames=6))
    assert [problem.kind for problem in report.problems] == ["folder"]
    assert "flights of 6 frames, which is not 4k+1" in report.problems[0].reason


def test_manifests_and_routes_are_checked(tmp_path: Path):
    assert run("convert", write_simulator(tmp_path / "s"), "--out", tmp_path / "r", "--to", "routes").exit_code == 0
    (tmp_path / "r/flight_000001/images/frame_000002.png").write_bytes(b"no picture")
    report = check(tmp_path / "r", selection=FrameSelection(mode="whole"))
    assert [(Path(p.where).name, p.kind) for p in report.problems] == [("flight_000001", "video")]
    torch.save(torch.zeros(1, 4, 3, 2, 2), tmp_path / "l.pt")
    item = {"latent_path": "l.pt", "images_dir": "r/flight_000000/images"}
    items = [{**item, "traj_json_path": "r/flight_000000/raw_logs.json"}]
    (tmp_path / "m.json").write_text(json.dumps({"items_train": [], "items_val": items}))
    assert check(tmp_path / "m.json").rows == 0
    result = run("check", tmp_path / "m.json", "--items", "ALL")
    assert result.exit_code == 1
    assert "items_val[0]: " in result.stdout
    assert "does not say its layout and units" in result.stdout


def test_stamps_of_a_lerobot_dataset_are_checked(tmp_path: Path):
    assert run("convert", write_simulator(tmp_path / "s"), "--out", tmp_path / "d", "--to", "lerobot").exit_code == 0
    assert check(tmp_path / "d").problems == ()
    file = tmp_path / "d/data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    stamps = table["timestamp"].to_pylist()
    stamps[12] += 0.05
    at = table.column_names.index("timestamp")
    pq.write_table(table.set_column(at, "timestamp", pa.array(stamps, pa.float32())), file)
    (problem,) = check(tmp_path / "d").problems
    assert (problem.kind, problem.where) == ("stamps", f"{tmp_path / 'd'}: episode 1")
    assert problem.reason == "frame 3 is stamped 0.237 s, at 16 fps it is 0.188 s"


@pytest.mark.parametrize("target", ["video-shards", "lerobot", "routes"])
def test_conversions_keep_frames_words_and_motion(tmp_path: Path, target: str):
    source = write_simulator(tmp_path / "s")
    result = run("convert", source, "--out", tmp_path / "d", "--to", target, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "out": str(tmp_path / "d"),
        "kind": target,
        "flights": 2,
        "left_out": [],
    }
    before = open_flights(source)
    after = open_flights(tmp_path / "d", ReadingOptions(selection=FrameSelection(mode="whole")))
    for row in range(2):
        assert numbers_of(after.frames(row)) == list(range(9))
        assert after.instruction(row) == before.instruction(row)
        np.testing.assert_allclose(after.deltas(row), before.deltas(row), atol=1e-6)


def test_broken_rows_stop_a_conversion_or_are_left_out_on_demand(folder: Path, tmp_path: Path):
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    add_rows(folder, video_row(video_path="broken.mp4", gt_pose_json="poses.json"))
    result = run("convert", folder, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "rows.jsonl:3: " in result.stderr
    assert not (tmp_path / "out").exists()
    result = run("convert", folder, "--out", tmp_path / "out", "--skip-broken")
    assert result.exit_code == 0
    assert "2 flights from" in result.stdout
    assert "1 left out" in result.stdout
    assert "left out: " in result.stderr
    assert "rows.jsonl:3" in result.stderr


@pytest.mark.parametrize("target", ["video-shards", "lerobot", "routes"])
def test_a_dataset_is_never_replaced(tmp_path: Path, target: str):
    source = write_simulator(tmp_path / "s")
    arguments = ["convert", source, "--out", tmp_path / "d", "--to", target]
    assert run(*arguments).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    result = run(*arguments)
    assert result.exit_code == 1
    assert "holds files already; give an empty or a new folder" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")} == before


def test_of_two_conversions_into_one_folder_the_first_that_ends_stays(folder: Path, tmp_path: Path):
    out = tmp_path / "out"

    def slow_conversion() -> None:
        with new_flight_folder(out) as flights:
            flights.add(numbered_frames(5), "fly")
            assert run("convert", folder, "--out", out).exit_code == 0

    with pytest.raises(FolderInUseError, match="out holds files already"):
        slow_conversion()
    assert len((out / "flights.jsonl").read_bytes().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "out"]


def test_a_folder_with_other_things_is_not_replaced(folder: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    result = run("convert", folder, "--out", tmp_path / "mine")
    assert result.exit_code == 1
    assert "holds files already" in result.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_uav_flow_needs_its_unit_and_goes_to_video_shards(tmp_path: Path):
    pq.write_table(
        pa.Table.from_pylist([{"id": "a", "frame_idx": 0, "image": b"", "log": "{}"}]), tmp_path / "0.parquet"
    )
    result = run("convert", tmp_path / "0.parquet", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "give --length-unit m (real) or cm (simulated)" in result.stderr
    result = run("convert", tmp_path, "--out", tmp_path / "out", "--length-unit", "m", "--to", "lerobot")
    assert result.exit_code == 2
    assert "convert those afterwards" in result.stderr
    result = run("check", tmp_path)
    assert result.exit_code == 1
    assert "flight a: " in result.stdout
    result = run("info", tmp_path)
    assert result.exit_code == 1
    assert "are converted first" in result.stderr


def test_info_tells_what_a_dataset_holds(folder: Path):
    result = run("info", folder, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["rows_of_frames"] == {"17": 1, "49": 1}
    assert content["frame_hw"] == [32, 48]
    assert (content["instructions"], content["most_frequent"]) == (1, "fly forward")
    assert content["rows_with_motion"] == "2 of 2 measured"
    np.testing.assert_allclose(content["mean_step_m"][0], 0.1, atol=0.01)
    assert "rows_of_frames" in run("info", folder).stdout


def test_info_tells_the_size_of_a_latent_cache(tmp_path: Path):
    LatentCache(tmp_path / "c", weights_sha256="w").write("k", {"x": torch.zeros(8)})
    content = json.loads(run("info", tmp_path / "c", "--json").stdout)
    assert (content["kind"], content["files"]) == ("latent-cache", 1)
    assert content["total_bytes"] > 32


def test_info_of_unusable_rows_points_to_the_check(tmp_path: Path):
    write_rows(tmp_path / "rows.jsonl", ["{"])
    result = run("info", tmp_path)
    assert result.exit_code == 1
    assert "no usable row; `worldvln-edge data check" in result.stderr


def test_motion_column_must_be_described(tmp_path: Path):
    run("convert", write_simulator(tmp_path / "s"), "--out", tmp_path / "d", "--to", "lerobot")
    result = run("info", tmp_path / "d", "--motion-column", "observation.state", "--length-unit", "cm")
    assert result.exit_code == 1
    assert "needs its layout, length unit and angle unit" in result.stderr
    described = ["--motion-layout", "pose6", "--length-unit", "cm", "--angle-unit", "deg"]
    assert run("info", tmp_path / "d", "--motion-column", "observation.state", *described).exit_code == 0


def test_kinds_are_told_by_their_files(tmp_path: Path, folder: Path):
    assert kind_of_flights(folder) == "video-shards"
    assert kind_of_flights(write_simulator(tmp_path / "s")) == "simulator"
    (tmp_path / "m.json").write_text('{"items_train": []}')
    assert kind_of_flights(tmp_path / "m.json") == "manifest"
    (tmp_path / "routes/r/images").mkdir(parents=True)
    (tmp_path / "routes/r/meta.json").write_text("{}")
    assert kind_of_flights(tmp_path / "routes") == "routes"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "no such file or folder"),
        ("notes.txt", "x", "neither a manifest"),
        ("other.json", "{}", "neither a manifest"),
        ("empty/x.txt", "x", "no flights that are known here; wanted"),
    ],
)
def test_paths_without_flights_are_refused(tmp_path: Path, name: str, content: str | None, message: str):
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    path = tmp_path / name.split("/")[0]
    with pytest.raises(FlightDataError, match=message):
        kind_of_flights(path)
    assert run("check", path).exit_code == 1
