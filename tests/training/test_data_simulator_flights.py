"""Flights of the simulator as every stage sees them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from flight_files import numbered_frames

from worldvln_edge.poses import actions_to_deltas
from worldvln_edge.training.data.data_check import check_dataset
from worldvln_edge.training.data.simulator_flights import SimulatorFlights, map_frames
from worldvln_edge.training.sim.shards import FlightDataError

FRAMES, HW = 5, (8, 12)


def write_shard(path: Path, first: int, count: int, frames: int = FRAMES) -> None:
    numbers = np.arange(first, first + count)
    pictures = numbered_frames(first + count, HW)[first:]
    np.savez(
        path,
        frames=np.repeat(pictures[:, None], frames, axis=1),
        actions=np.broadcast_to(numbers[:, None, None].astype(np.float32), (count, frames - 1, 6)),
        instructions=np.array([f"fly {i}" for i in numbers]),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for first in (0, 2, 4):
        write_shard(tmp_path / f"flights-{first}.npz", first, 2)
    return tmp_path


def test_rows_are_those_of_the_shards(folder: Path):
    stored = SimulatorFlights(folder, None)
    assert len(stored) == 6
    pictures = numbered_frames(6, HW)
    for row in (5, 0, 3, 4, 0):
        assert stored.instruction(row) == f"fly {row}"
        assert stored.frame_count(row) == FRAMES
        np.testing.assert_array_equal(stored.frames(row), np.repeat(pictures[row][None], FRAMES, axis=0))
        assert stored.deltas(row).dtype == np.float32
        np.testing.assert_allclose(stored.deltas(row), actions_to_deltas(np.full((FRAMES - 1, 6), float(row))))


def test_frames_stay_on_disk_and_may_be_written_to(folder: Path):
    flights = SimulatorFlights(folder, None)
    assert isinstance(map_frames(folder / "flights-2.npz"), np.memmap)
    flights.frames(2)[:] = 0
    assert flights.frames(2).any()


def test_compressed_shards_are_read_too(folder: Path):
    before = SimulatorFlights(folder, None).frames(3)
    arrays = dict(np.load(folder / "flights-2.npz"))
    np.savez_compressed(folder / "flights-2.npz", **arrays)
    np.testing.assert_array_equal(SimulatorFlights(folder, None).frames(3), before)


def test_arrays_that_are_no_frames_are_refused(folder: Path):
    arrays = dict(np.load(folder / "flights-2.npz"))
    np.savez(folder / "flights-2.npz", **{**arrays, "frames": arrays["frames"].astype(np.float32)})
    with pytest.raises(FlightDataError, match=r"flights-2\.npz: frames are float32 .*, wanted uint8 \[N, F, H, W, 3\]"):
        SimulatorFlights(folder, None).frames(2)
    np.savez(folder / "flights-2.npz", **{key: arrays[key] for key in ("actions", "instructions")})
    with pytest.raises(FlightDataError, match=r"flights-2\.npz: broken shard"):
        SimulatorFlights(folder, None).frames(2)


def test_damaged_shards_are_found(folder: Path):
    flights = SimulatorFlights(folder, None)
    assert flights.broken_shards() == []
    path = folder / "flights-2.npz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1  # inside the frames
    path.write_bytes(content)
    (problem,) = flights.broken_shards()
    assert (problem.where, problem.reason) == (str(path), "damaged (frames.npy); delete it and generate again")
    assert check_dataset(folder, show_progress=False).problems[0] == problem


def test_a_worker_gets_the_rows_and_not_the_frames(folder: Path):
    flights = SimulatorFlights(folder, None)
    flights.frames(0)
    sent = pickle.dumps(flights)  # as a data loader does
    assert len(sent) < 8 * HW[0] * HW[1] * FRAMES * 3
    np.testing.assert_array_equal(pickle.loads(sent).frames(3), flights.frames(3))


def test_frames_have_the_size_that_is_asked_for(folder: Path):
    assert SimulatorFlights(folder, (4, 4)).frames(0).shape == (FRAMES, 4, 4, 3)


def test_keys_tell_content_apart(folder: Path):
    stored = SimulatorFlights(folder, None)
    assert len({stored.key(row) for row in range(6)}) == 6
    assert SimulatorFlights(folder, (4, 4)).key(0) != stored.key(0)


def test_names_say_shard_and_flight(folder: Path):
    assert SimulatorFlights(folder, None).name(3) == f"{folder / 'flights-2.npz'}: flight 1"


def test_flights_of_another_length_are_refused(tmp_path: Path):
    write_shard(tmp_path / "flights-0.npz", 0, 1, frames=6)
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: flights of 6 frames, which is not 4k\+1"):
        SimulatorFlights(tmp_path, None)


def test_actions_and_frames_must_agree(tmp_path: Path):
    write_shard(tmp_path / "flights-0.npz", 0, 1)
    arrays = dict(np.load(tmp_path / "flights-0.npz"))
    np.savez(tmp_path / "flights-0.npz", **{**arrays, "frames": arrays["frames"][:, :4]})
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: flight 0: 4 frames for 4 actions"):
        SimulatorFlights(tmp_path, None).frames(0)


def rewrite(path: Path, **changes: np.ndarray) -> None:
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, **changes})


def test_words_of_fewer_flights_are_refused_and_never_shifted_to_others(folder: Path):
    words = np.load(folder / "flights-0.npz")["instructions"]
    rewrite(folder / "flights-0.npz", instructions=words[1:])
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: actions \[2, 4, 6\] and 1 instructions, wanted"):
        SimulatorFlights(folder, None)


def test_frames_of_fewer_flights_are_named(folder: Path):
    rewrite(folder / "flights-0.npz", frames=np.load(folder / "flights-0.npz")["frames"][:1])
    flights = SimulatorFlights(folder, None)
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: flight 1: the shard holds frames of 1 flights"):
        flights.frames(1)
    reasons = [problem.reason for problem in check_dataset(folder, show_progress=False).problems]
    assert reasons.count("the shard holds frames of 1 flights") == 1


def test_actions_that_are_not_finite_are_named(folder: Path):
    actions = np.load(folder / "flights-0.npz")["actions"]
    actions[1, 2, 0] = np.nan
    rewrite(folder / "flights-0.npz", actions=actions)
    flights = SimulatorFlights(folder, None)
    assert np.isfinite(flights.deltas(0)).all()
    with pytest.raises(FlightDataError, match=r"flights-0\.npz: flight 1: actions that are not finite"):
        flights.deltas(1)
    found = [problem for problem in check_dataset(folder, show_progress=False).problems if problem.kind == "motion"]
    assert [problem.where for problem in found] == [f"{folder / 'flights-0.npz'}: flight 1"]
