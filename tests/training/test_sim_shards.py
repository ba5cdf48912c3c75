"""Flight shards: those of one run only, in order, and broken ones named."""

import json
from pathlib import Path

import numpy as np
import pytest

from worldvln_edge.training.data.simulator_flights import SimulatorFlights
from worldvln_edge.training.sim.shards import FlightDataError, fingerprint_shards, list_shards, shard_sizes

FRAMES, HW = 5, (4, 6)


def write_shard(path: Path, first: int, count: int, **changes) -> None:
    numbers = np.arange(first, first + count)
    arrays = {
        "frames": np.broadcast_to(numbers[:, None, None, None, None].astype(np.uint8), (count, FRAMES, *HW, 3)),
        "actions": np.broadcast_to(numbers[:, None, None].astype(np.float32), (count, FRAMES - 1, 6)),
        "poses": np.zeros((count, FRAMES, 6)),
        "instructions": np.array([f"fly {i}" for i in numbers]),
        "kinds": np.array(["forward"] * count),
    }
    np.savez_compressed(path, **{**arrays, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shard(tmp_path / "flights-3.npz", 3, 2)
    write_shard(tmp_path / "flights-0.npz", 0, 3)
    return tmp_path


def instructions(folder: Path) -> list[str]:
    flights = SimulatorFlights(folder, None)
    return [flights.instruction(row) for row in range(len(flights))]


def test_shards_are_read_in_name_order(folder: Path):
    assert instructions(folder) == [f"fly {i}" for i in range(5)]


def test_empty_folder_says_how_to_make_flights(tmp_path: Path):
    with pytest.raises(FlightDataError, match="worldvln-edge sim flights"):
        instructions(tmp_path)


def test_shard_without_an_array_is_refused(folder: Path):
    np.savez(folder / "flights-0.npz", frames=np.zeros((1, FRAMES, *HW, 3), np.uint8))
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: lacks actions"):
        instructions(folder)


def test_shard_that_is_no_archive_is_refused(folder: Path):
    (folder / "flights-0.npz").write_bytes(b"not a shard")
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: broken shard"):
        instructions(folder)


def test_truncated_shard_is_refused(folder: Path):
    path = folder / "flights-0.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: broken shard"):
        instructions(folder)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A whole run of 5 flights in shards of 2, as `sim flights` leaves it."""
    for name, (first, count) in shard_sizes(5, 2).items():
        write_shard(tmp_path / name, first, count)
    (tmp_path / "flights.json").write_text(json.dumps({"format": 2, "count": 5, "shard_flights": 2}))
    return tmp_path


def test_a_whole_run_is_loaded_and_its_half_written_shards_are_not(run_folder: Path):
    write_shard(run_folder / ".flights-0000000-0002.x1.npz", 90, 2)
    assert instructions(run_folder) == [f"fly {i}" for i in range(5)]


def test_a_run_that_does_not_say_its_count_is_loaded_as_far_as_it_goes(run_folder: Path):
    (run_folder / "flights.json").write_text(json.dumps({"format": 1, "shard_flights": 2}))
    assert len(instructions(run_folder)) == 5
    (run_folder / "flights-0000002-0002.npz").unlink()
    with pytest.raises(FlightDataError, match=r"0002-0002\.npz is missing"):
        instructions(run_folder)


def test_an_unfinished_run_is_refused(run_folder: Path):
    (run_folder / "flights-0000004-0001.npz").unlink()
    with pytest.raises(FlightDataError, match=r"holds 2 of 3 shards, .*0004-0001\.npz is missing; finish the run"):
        instructions(run_folder)


@pytest.mark.parametrize("name", ["flights-0000004-0002.npz", "flights-0000006-0002.npz", "other.npz"])
@pytest.mark.parametrize("settings", [{"count": 5, "shard_flights": 2}, {"shard_flights": 2}])
def test_shards_of_two_runs_are_never_mixed(run_folder: Path, name: str, settings: dict):
    (run_folder / "flights.json").write_text(json.dumps(settings))
    write_shard(run_folder / name, 6, 2)
    with pytest.raises(FlightDataError, match=r"is not of the run|is missing"):
        instructions(run_folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"shard_flights": 0}', '{"shard_flights": 2, "count": "5"}'])
def test_settings_that_are_none_are_refused(run_folder: Path, content: str):
    (run_folder / "flights.json").write_text(content)
    with pytest.raises(FlightDataError, match="not the settings of a run"):
        instructions(run_folder)


def test_fingerprint_follows_the_content_and_not_the_date(run_folder: Path):
    before = fingerprint_shards(list_shards(run_folder))
    write_shard(run_folder / "flights-0000000-0002.npz", 0, 2)
    assert fingerprint_shards(list_shards(run_folder)) == before
    write_shard(run_folder / "flights-0000000-0002.npz", 0, 2, poses=np.ones((2, FRAMES, 6)))
    changed = fingerprint_shards(list_shards(run_folder))
    assert changed != before
    assert fingerprint_shards(list_shards(run_folder)[:2]) not in (before, changed)
    (run_folder / "flights-0000000-0002.npz").write_bytes(b"not a shard")
    with pytest.raises(FlightDataError, match="broken shard"):
        fingerprint_shards(list_shards(run_folder))
