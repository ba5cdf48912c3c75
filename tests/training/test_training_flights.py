"""What a run is told about its flights: their rows, their size, and what tells them from others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flight_files import straight_poses
from PIL import Image

from worldvln_edge.presets import preset
from worldvln_edge.training.data.open_flights import ReadingOptions
from worldvln_edge.training.sim.flights import FlightsConfig, generate_flights
from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.stages.flight_sources import open_held_out_flights, open_training_flights
from worldvln_edge.training.stages.flight_subset import FlightSubset, first_flights
from worldvln_edge.training.stages.recorded_latents import recorded_latents

NANO = preset("nano")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flights")
    generate_flights(FlightsConfig(split="train"), 3, folder, workers=1, show_progress=False)
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """One flight of 9 frames to train on, two to validate on."""
    items = []
    for name in ("a", "b", "c"):
        images = tmp_path / name / "images"
        images.mkdir(parents=True)
        for index in range(9):
            Image.fromarray(np.full((32, 48, 3), 20 * index, np.uint8)).save(images / f"frame_{index:06d}.png")
        torch.save({"latents": torch.full((1, 64, 3, 4, 4), float(len(items)))}, tmp_path / name / "l.pt")
        (tmp_path / name / "poses.json").write_text(json.dumps(straight_poses(9).tolist()))
        paths = {"latent_path": f"{name}/l.pt", "traj_json_path": f"{name}/poses.json", "images_dir": f"{name}/images"}
        units = {"traj_layout": "pose6", "traj_units": {"length": "cm", "angle": "deg"}}
        items.append({**paths, **units, "instruction": f"fly to {name}"})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"items_train": items[:1], "items_val": items[1:]}))
    return path


def test_frames_have_the_size_of_the_preset(shards: Path):
    flights = open_training_flights(shards, NANO, ReadingOptions())
    assert len(flights.source) == 3
    assert flights.source.frames(0).shape == (49, 64, 64, 3)
    smaller = open_training_flights(shards, NANO, ReadingOptions(image_hw=(32, 32)))
    assert smaller.source.frames(0).shape == (49, 32, 32, 3)
    assert smaller.fingerprint == flights.fingerprint


def test_a_manifest_is_validated_on_its_own_split(manifest: Path):
    train = open_training_flights(manifest, NANO, ReadingOptions())
    held_out = open_held_out_flights(None, manifest, NANO, ReadingOptions())
    assert held_out is not None
    assert [train.source.instruction(row) for row in range(len(train.source))] == ["fly to a"]
    assert [held_out.source.instruction(row) for row in range(len(held_out.source))] == ["fly to b", "fly to c"]
    assert train.fingerprint != held_out.fingerprint


def test_flights_that_are_trained_on_are_not_held_out(shards: Path):
    assert open_held_out_flights(None, shards, NANO, ReadingOptions()) is None
    with pytest.raises(FlightDataError, match="flights that are trained on cannot be held out; give others"):
        open_held_out_flights(shards, shards, NANO, ReadingOptions())


def test_the_fingerprint_changes_with_the_motion(manifest: Path):
    before = open_training_flights(manifest, NANO, ReadingOptions()).fingerprint
    assert open_training_flights(manifest, NANO, ReadingOptions()).fingerprint == before
    poses = straight_poses(9)
    poses[4, 1] += 1
    (manifest.parent / "a" / "poses.json").write_text(json.dumps(poses.tolist()))
    assert open_training_flights(manifest, NANO, ReadingOptions()).fingerprint != before


def test_a_subset_is_the_rows_of_its_source(shards: Path, manifest: Path):
    source = open_training_flights(shards, NANO, ReadingOptions()).source
    subset = FlightSubset(source, [2, 0])
    assert len(subset) == 2
    for row, of in enumerate((2, 0)):
        for name in ("key", "name", "frame_count", "instruction"):
            assert getattr(subset, name)(row) == getattr(source, name)(of)
        assert np.array_equal(subset.frames(row), source.frames(of))
        assert np.array_equal(subset.deltas(row), source.deltas(of))
        assert recorded_latents(subset, row) is None
    assert first_flights(source, None) is first_flights(source, 3) is source
    assert [first_flights(source, 2).key(row) for row in range(2)] == [source.key(row) for row in range(2)]
    named = open_held_out_flights(manifest, manifest, NANO, ReadingOptions())
    assert named is not None
    held_out = named.source
    latents = recorded_latents(FlightSubset(held_out, [1]), 0)
    assert latents is not None
    assert float(latents.mean()) == 2.0


def test_a_motion_that_cannot_be_read_stops_only_who_needs_it(manifest: Path):
    """The backbone learns from frames and words alone; older trajectory files often do not say their units."""
    content = json.loads(manifest.read_text())
    for key in ("traj_layout", "traj_units"):
        del content["items_train"][0][key]
    manifest.write_text(json.dumps(content))
    flights = open_training_flights(manifest, NANO, ReadingOptions())
    assert len(flights.source) == 1
    with pytest.raises(FlightDataError, match="does not say its layout and units"):
        flights.source.deltas(0)


def test_a_held_out_manifest_of_one_split_gives_that(manifest: Path):
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"items_train": content["items_train"]}))
    held_out = open_held_out_flights(manifest, manifest.parent / "others.json", NANO, ReadingOptions())
    assert held_out is not None
    assert len(held_out.source) == 1
