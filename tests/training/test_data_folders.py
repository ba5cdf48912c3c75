"""Manifests and route folders: pictures, poses and words in folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flight_files import HeldFlights, files_no_larger_than, numbered_frames, numbers_of, straight_poses
from PIL import Image

from worldvln_edge.training.data.action_manifest import ActionManifest, is_manifest
from worldvln_edge.training.data.frame_selection import FrameSelection
from worldvln_edge.training.data.route_folder import RouteFolder
from worldvln_edge.training.data.route_folder_writer import write_routes
from worldvln_edge.training.sim.shards import FlightDataError

DECLARED = {"traj_layout": "pose6", "traj_units": {"length": "cm", "angle": "deg"}}


def write_pictures(folder: Path, count: int, suffix: str = ".png") -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(numbered_frames(count, (16, 24))):
        Image.fromarray(frame).save(folder / f"frame_{i:06d}{suffix}", quality=95)


def write_flight(folder: Path, latent_frames: int = 3, suffix: str = ".png") -> dict[str, str]:
    """Latents, pictures and an old trajectory; returns the item, relative to the folder's parent."""
    count = 4 * (latent_frames - 1) + 1
    write_pictures(folder / "images", count, suffix)
    torch.save({"latents": torch.arange(latent_frames * 16.0).reshape(1, 4, latent_frames, 2, 2)}, folder / "l.pt")
    (folder / "poses.json").write_text(json.dumps(straight_poses(count).tolist()))
    name = folder.name
    return {"latent_path": f"{name}/l.pt", "traj_json_path": f"{name}/poses.json", "images_dir": f"{name}/images"}


def write_manifest(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def item(tmp_path: Path) -> dict[str, Any]:
    return write_flight(tmp_path / "a")


def test_manifest_gives_pictures_motion_latents_and_words(tmp_path: Path, item: dict[str, Any]):
    path = write_manifest(tmp_path, {"items_train": [{**item, **DECLARED, "instruction": "fly"}]})
    flights = ActionManifest(path, None)
    assert (len(flights), flights.frame_count(0), flights.skipped) == (1, 9, [])
    assert numbers_of(flights.frames(0)) == list(range(9))
    assert flights.deltas(0).shape == (8, 6)
    np.testing.assert_allclose(np.linalg.norm(flights.deltas(0)[:, 3:], axis=1), 0.1, atol=1e-6)
    assert flights.latents(0).shape == (1, 4, 3, 2, 2)
    assert flights.latent_path(0) == tmp_path / "a/l.pt"
    assert flights.instruction(0) == "fly"
    assert flights.name(0) == f"{path}: items_train[0]"


def test_layout_and_units_may_stand_at_the_top(tmp_path: Path, item: dict[str, Any]):
    path = write_manifest(tmp_path, {**DECLARED, "items_train": [item]})
    assert ActionManifest(path, None).deltas(0).shape == (8, 6)


def test_pictures_may_be_jpeg_and_of_another_size(tmp_path: Path):
    item = write_flight(tmp_path / "a", suffix=".jpg")
    flights = ActionManifest(write_manifest(tmp_path, {"items_train": [item]}), (8, 8))
    assert flights.frames(0).shape == (9, 8, 8, 3)
    assert numbers_of(flights.frames(0)) == list(range(9))


def test_training_takes_the_training_items_unless_told_otherwise(tmp_path: Path):
    content = {f"items_{n}": [{**write_flight(tmp_path / n), "instruction": n}] for n in ("train", "val", "test")}
    path = write_manifest(tmp_path, {**content, "comment": "x"})

    def words(key: str) -> list[str]:
        flights = ActionManifest(path, None, items_key=key)
        return [flights.instruction(row) for row in range(len(flights))]

    assert words("items_train") == ["train"]
    assert words("items_val, items_test") == ["val", "test"]
    assert words("ALL") == ["train", "val", "test"]


def test_undeclared_trajectory_is_refused(tmp_path: Path, item: dict[str, Any]):
    flights = ActionManifest(write_manifest(tmp_path, {"items_train": [item]}), None)
    with pytest.raises(FlightDataError, match=r"items_train\[0\]: .*poses\.json: does not say its layout"):
        flights.deltas(0)


def test_trajectory_of_another_length_is_refused(tmp_path: Path, item: dict[str, Any]):
    (tmp_path / "a/poses.json").write_text(json.dumps(straight_poses(8).tolist()))
    flights = ActionManifest(write_manifest(tmp_path, {**DECLARED, "items_train": [item]}), None)
    with pytest.raises(FlightDataError, match=r"items_train\[0\]: .* covers 8 frames \(pose6\), the latents 9"):
        flights.deltas(0)


def test_items_that_cannot_be_used_are_left_out(tmp_path: Path, item: dict[str, Any]):
    torch.save(torch.zeros(3, 3), tmp_path / "flat.pt")
    (tmp_path / "broken.pt").write_bytes(b"no tensors")
    bad = [
        {**item, "images_dir": ""},
        7,
        {**item, "latent_path": "flat.pt"},
        {**item, "latent_path": "broken.pt"},
        {**item, "latent_path": "none.pt"},
        {**item, "traj_units": "cm"},
    ]
    flights = ActionManifest(write_manifest(tmp_path, {"items_train": [*bad, item]}), None)
    assert len(flights) == 1
    assert [problem.where.rpartition("[")[2] for problem in flights.skipped] == ["0]", "1]", "2]", "3]", "4]", "5]"]
    reasons = [problem.reason for problem in flights.skipped]
    assert "needs latent_path, traj_json_path, images_dir" in reasons[0]
    assert "flat.pt: wanted latents [1, C, T, h, w]" in reasons[2]
    assert "broken.pt" in reasons[3]
    assert "none.pt: no such file" in reasons[4]
    assert "traj_units" in reasons[5]


def test_other_lengths_are_left_out_when_one_is_required(tmp_path: Path, item: dict[str, Any]):
    path = write_manifest(tmp_path, {"items_train": [item]})
    flights = ActionManifest(path, None, require_latent_frames=13)
    assert [problem.reason for problem in flights.skipped] == ["3 latent frames, 13 are required"]
    assert len(ActionManifest(path, None, require_latent_frames=3)) == 1


def test_missing_and_broken_pictures_are_named(tmp_path: Path, item: dict[str, Any]):
    flights = ActionManifest(write_manifest(tmp_path, {"items_train": [item]}), None)
    (tmp_path / "a/images/frame_000003.png").write_bytes(b"no picture")
    with pytest.raises(FlightDataError, match=r"items_train\[0\]: .*frame_000003\.png: "):
        flights.frames(0)
    (tmp_path / "a/images/frame_000003.png").unlink()
    with pytest.raises(FlightDataError, match=r"items_train\[0\]: .*frame_000003\.png: no such picture \(nor"):
        flights.frames(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"x": []}, "no manifest"), ([], "no manifest"), ({"items_val": []}, "no list 'items_train'; it has items_val")],
)
def test_manifests_that_are_none_are_refused(tmp_path: Path, content: Any, message: str):
    with pytest.raises(FlightDataError, match=message):
        ActionManifest(write_manifest(tmp_path, content), None)


def test_manifest_is_told_by_its_items(tmp_path: Path):
    assert is_manifest(write_manifest(tmp_path, {"items_val": []}))
    assert not is_manifest(write_manifest(tmp_path, {"a": 1}))
    assert not is_manifest(tmp_path)


def write_route(folder: Path, count: int = 9, meta: dict[str, Any] | None = None, **logs: Any) -> Path:
    write_pictures(folder / "images", count, ".JPG")
    (folder / "meta.json").write_text(json.dumps({"instruction": "go on", **(meta or {})}))
    for name, rows in logs.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


FULL = FrameSelection(mode="segment_full")


def test_routes_come_in_name_order_with_their_words_and_motion(tmp_path: Path):
    write_route(tmp_path / "r2", raw_logs=straight_poses(9).tolist())
    write_route(tmp_path / "r1", meta={"instruction": " ", "prompt": "<<<t=3s>>>turn"})
    (tmp_path / "notes").mkdir()
    routes = RouteFolder(tmp_path, None, selection=FULL)
    assert [routes.instruction(row) for row in range(len(routes))] == ["turn", "go on"]
    assert numbers_of(routes.frames(1)) == list(range(9))
    assert routes.deltas(0) is None
    np.testing.assert_allclose(np.linalg.norm(routes.deltas(1)[:, 3:], axis=1), 0.1, atol=1e-6)


def test_real_flights_say_that_they_are_in_metres(tmp_path: Path):
    write_route(tmp_path / "r", meta={"units": "m"}, raw_logs=straight_poses(9, step=0.1).tolist())
    np.testing.assert_allclose(
        np.linalg.norm(RouteFolder(tmp_path, None, selection=FULL).deltas(0)[:, 3:], axis=1), 0.1, atol=1e-6
    )


def test_pictures_that_come_or_go_while_a_folder_is_read_are_refused(tmp_path: Path):
    route = write_route(tmp_path / "r")
    flights = RouteFolder(tmp_path, None, selection=FULL)
    assert len(flights.frames(0)) == 9
    next((route / "images").iterdir()).unlink()
    for read in (flights.frames, flights.key):
        with pytest.raises(FlightDataError, match="images: 8 pictures, there were 9; start again"):
            read(0)


def test_empty_log_is_no_motion(tmp_path: Path):
    write_route(tmp_path / "r", raw_logs=[])
    assert RouteFolder(tmp_path, None, selection=FULL).deltas(0) is None


def test_start_pose_alone_is_no_motion(tmp_path: Path):
    write_route(tmp_path / "r", raw_logs=[[1.0] * 6])
    assert RouteFolder(tmp_path, None, selection=FULL).deltas(0) is None


def test_preprocessed_logs_need_a_unit(tmp_path: Path):
    poses = straight_poses(9).tolist()
    write_route(tmp_path / "a", raw_logs=[[0.0] * 6], preprocessed_logs=poses)
    write_route(tmp_path / "b", meta={"units": "cm"}, preprocessed_logs=poses)
    routes = RouteFolder(tmp_path, None, selection=FULL)
    with pytest.raises(FlightDataError, match=r'preprocessed_logs\.json: cm or m\? Write "units"'):
        routes.deltas(0)
    assert routes.deltas(1).shape == (8, 6)


@pytest.mark.parametrize("name", ["raw_logs", "preprocessed_logs"])
def test_logs_that_end_early_are_refused(tmp_path: Path, name: str):
    write_route(tmp_path / "r", meta={"units": "m"}, **{name: straight_poses(5).tolist()})
    with pytest.raises(FlightDataError, match=rf"{name}\.json: 5 poses for 9 pictures"):
        RouteFolder(tmp_path, None, selection=FULL).deltas(0)


def test_routes_that_cannot_be_used_are_left_out(tmp_path: Path):
    write_route(tmp_path / "a")
    write_route(tmp_path / "b", meta={"instruction": ""})
    write_route(tmp_path / "c", meta={"units": "km"})
    (tmp_path / "d/images").mkdir(parents=True)
    (tmp_path / "d/meta.json").write_text("{}")
    routes = RouteFolder(tmp_path, None, selection=FrameSelection(min_video_frames=1))
    assert len(routes) == 1
    reasons = [problem.reason for problem in routes.skipped]
    assert "no instruction; give instruction, instruction_unified or prompt" in reasons[0]
    assert '"units" must be "cm" or "m", found km' in reasons[1]
    assert "images: no pictures" in reasons[2]
    strict = RouteFolder(tmp_path, None, selection=FrameSelection(min_video_frames=33))
    assert "segment of 0 s is shorter than 33 frames" in strict.skipped[0].reason


def flight_set(count: int = 2, words: str = "climb") -> HeldFlights:
    frames = np.stack([numbered_frames(5, (8, 12))] * count)
    deltas = np.random.default_rng(0).normal(0, 0.1, (count, 4, 6)).astype(np.float32)
    return HeldFlights(frames, deltas, (words,) * count)


def test_written_routes_are_read_back(tmp_path: Path):
    source = flight_set()
    write_routes(source, [1, 0], tmp_path / "r", show_progress=False)
    routes = RouteFolder(tmp_path / "r", None, selection=FULL)
    for row, before in enumerate([1, 0]):
        np.testing.assert_array_equal(routes.frames(row), source.frames(before))
        np.testing.assert_allclose(routes.deltas(row), source.deltas(before), atol=1e-6)
        assert routes.instruction(row) == "climb"


@pytest.mark.parametrize(("words", "rows", "message"), [("", [0], "flight 0: no instruction"), ("a", [], "no flights")])
def test_routes_that_cannot_be_written_leave_nothing(tmp_path: Path, words: str, rows: list[int], message: str):
    with pytest.raises(FlightDataError, match=message):
        write_routes(flight_set(words=words), rows, tmp_path / "r", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_routes(tmp_path: Path):
    with files_no_larger_than(40), pytest.raises(FlightDataError, match="r: cannot be written"):
        write_routes(flight_set(), [0], tmp_path / "r", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_picture_of_another_size_is_named(tmp_path: Path):
    write_route(tmp_path / "r")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "r/images/frame_000004.JPG")
    with pytest.raises(FlightDataError, match=r"frame_000004\.JPG: \(8, 8\) pixels, the first frame has \(16, 24\)"):
        RouteFolder(tmp_path, None, selection=FULL).frames(0)


def test_folder_without_routes_is_refused(tmp_path: Path):
    with pytest.raises(FlightDataError, match=r"no routes \(folders with images/ and meta\.json\)"):
        RouteFolder(tmp_path, None)
