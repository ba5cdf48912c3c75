"""Flight shards in memory: all or some of them, and broken ones named."""

from pathlib import Path

import numpy as np
import pytest

from worldvln_edge.poses import actions_to_deltas
from worldvln_edge.training.flight_data import load_flights
from worldvln_edge.training.sim.shards import FlightDataError

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


def load(folder: Path, **options):
    return load_flights(folder, num_frames=FRAMES, image_hw=HW, **options)


def test_shards_are_read_in_name_order(folder: Path):
    flights = load(folder)
    assert flights.instructions == tuple(f"fly {i}" for i in range(5))
    assert flights.frames[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(flights.deltas[4], actions_to_deltas(np.full((4, 6), 4.0)), rtol=1e-6)
    assert flights.deltas.dtype == np.float32


@pytest.mark.parametrize("limit", [1, 3, 4, 99])
def test_limit_cuts_the_last_shard(folder: Path, limit: int):
    flights = load(folder, limit=limit)
    expected = min(limit, 5)
    assert len(flights) == len(flights.deltas) == len(flights.instructions) == len(flights.kinds) == expected


def test_rows_may_be_taken(folder: Path):
    flights = load(folder).take(np.array([4, 0]))
    assert flights.instructions == ("fly 4", "fly 0")
    assert flights.frames[0, 0, 0, 0, 0] == 4


def test_empty_folder_says_how_to_make_flights(tmp_path: Path):
    with pytest.raises(FlightDataError, match="worldvln-edge sim flights"):
        load(tmp_path)


def test_frames_of_another_preset_are_refused(folder: Path):
    with pytest.raises(
        FlightDataError, match=r"flights-0\.npz: frames \(5, 4, 6, 3\), the preset needs \(49, 4, 6, 3\)"
    ):
        load_flights(folder, num_frames=49, image_hw=HW)


def test_shard_without_an_array_is_refused(folder: Path):
    np.savez(folder / "flights-0.npz", frames=np.zeros((1, FRAMES, *HW, 3), np.uint8))
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: lacks actions"):
        load(folder)


def test_shard_that_is_no_archive_is_refused(folder: Path):
    (folder / "flights-0.npz").write_bytes(b"not a shard")
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: broken shard"):
        load(folder)


def test_truncated_shard_is_refused(folder: Path):
    path = folder / "flights-0.npz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: broken shard"):
        load(folder)
