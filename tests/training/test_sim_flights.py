import json

import numpy as np
import pytest
from click.testing import CliRunner

from worldvln_edge.cli import main
from worldvln_edge.poses import integrate_actions
from worldvln_edge.tasks import Task, read_task_list
from worldvln_edge.training.sim.flights import FlightsConfig, fly_expert, generate_flights
from worldvln_edge.training.sim.perturbation import PerturbationConfig, perturb_path
from worldvln_edge.training.sim.shards import FlightDataError, list_shards, read_shard
from worldvln_edge.training.sim.tasks import generate_task, score_flight

ALWAYS = PerturbationConfig(share=1.0, push_probability=1.0)


def test_an_expert_flight_succeeds_and_its_actions_lead_through_its_poses():
    task = generate_task("test", 2)
    flight = fly_expert(task, image_hw=(32, 48))
    assert flight.frames.shape == (49, 32, 48, 3)
    assert flight.frames.dtype == np.uint8
    assert flight.actions.shape == (48, 6)
    np.testing.assert_allclose(integrate_actions(flight.poses[0], flight.actions), flight.poses[1:], atol=1e-6)
    assert score_flight(task, flight.poses, flight.collided).success
    assert flight.instruction == task.instruction


def test_a_tracked_expert_flight_still_arrives():
    task = generate_task("test", 0, dynamics="tracked")
    flight = fly_expert(task, image_hw=(16, 16))
    score = score_flight(task, flight.poses, flight.collided)
    assert score.success
    assert score.final_distance_m > 0.001


def test_a_disturbed_flight_leaves_the_path_comes_back_and_is_the_same_for_the_same_seed():
    task = generate_task("test", 0)
    plain = fly_expert(task, image_hw=(16, 16))
    pushed = fly_expert(task, image_hw=(16, 16), perturbation=ALWAYS, seed=5)
    again = fly_expert(task, image_hw=(16, 16), perturbation=ALWAYS, seed=5)
    np.testing.assert_array_equal(pushed.frames, again.frames)
    error = np.linalg.norm((pushed.poses - plain.poses)[:, :3], axis=1)
    assert error[0] == 0.0
    assert error.max() > 10.0
    assert error[-1] < 0.7 * error.max()
    assert score_flight(task, pushed.poses, pushed.collided).success


def test_without_strength_a_disturbance_changes_nothing():
    path = np.array(generate_task("test", 0).reference_path_raw)
    calm = PerturbationConfig(
        noise_horizontal_cm=0, noise_vertical_cm=0, noise_yaw_deg=0, push_probability=0
    )  # fmt: skip
    np.testing.assert_allclose(perturb_path(path, calm, np.random.default_rng(0)), path)


def test_a_bad_perturbation_is_refused():
    with pytest.raises(ValueError, match="share must be"):
        PerturbationConfig(share=2.0)
    with pytest.raises(ValueError, match="push_start"):
        PerturbationConfig(push_start=(0, 45))


def test_a_task_without_a_path_cannot_be_flown():
    with pytest.raises(FlightDataError, match="reference_path_raw"):
        fly_expert(Task(instruction="go", initial_pos=(0.0,) * 6))


def test_shards_hold_the_flights_and_a_second_run_keeps_them(tmp_path):
    config = FlightsConfig(split="train", image_hw=(16, 16), shard_flights=3, perturbation=ALWAYS)
    first = generate_flights(config, 5, tmp_path, workers=1, show_progress=False)
    assert [path.name for path in first] == ["flights-0000000-0003.npz", "flights-0000003-0002.npz"]
    shard = read_shard(first[1])
    assert shard["frames"].shape == (2, 49, 16, 16, 3)
    assert shard["actions"].shape == (2, 48, 6)
    assert shard["actions"].dtype == shard["poses"].dtype == np.float32
    task = generate_task("train", 4)
    assert shard["task_indices"].tolist() == [3, 4]
    assert (shard["instructions"][1], shard["kinds"][1], shard["landmarks"][1]) == (task.instruction, task.kind, "")
    np.testing.assert_array_equal(shard["magnitudes"][1], np.array([task.magnitude[0], np.nan], np.float32))
    alone = fly_expert(task, image_hw=(16, 16), perturbation=ALWAYS, seed=task.seed)
    np.testing.assert_array_equal(shard["frames"][1], alone.frames)

    stamp = first[0].stat().st_mtime_ns
    first[1].unlink()  # as if the run had been stopped
    assert generate_flights(config, 5, tmp_path, workers=1, show_progress=False) == first == list_shards(tmp_path)
    assert first[0].stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(read_shard(first[1])["frames"], shard["frames"])
    assert not list(tmp_path.glob(".*"))


def test_two_workers_write_the_same_shards_as_one(tmp_path):
    config = FlightsConfig(split="validation", image_hw=(16, 16), shard_flights=2)
    one = generate_flights(config, 4, tmp_path / "one", workers=1, show_progress=False)
    two = generate_flights(config, 4, tmp_path / "two", workers=2, show_progress=False)
    for a, b in zip(one, two, strict=True):
        left, right = read_shard(a), read_shard(b)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_a_folder_of_other_settings_is_refused(tmp_path):
    generate_flights(FlightsConfig(split="test", image_hw=(16, 16)), 1, tmp_path, workers=1, show_progress=False)
    with pytest.raises(FlightDataError, match=r"another run \(image_hw is \[16, 16\] there and \[32, 32\] here\)"):
        generate_flights(FlightsConfig(split="test", image_hw=(32, 32)), 1, tmp_path, workers=1, show_progress=False)
    with pytest.raises(ValueError, match="count and workers"):
        generate_flights(FlightsConfig(split="test"), 0, tmp_path)
    with pytest.raises(ValueError, match="shard_flights"):
        FlightsConfig(split="test", shard_flights=0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_another_count_is_another_run_and_changes_nothing(tmp_path, count):
    config = FlightsConfig(split="test", image_hw=(16, 16), shard_flights=2)
    generate_flights(config, 3, tmp_path, workers=1, show_progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(FlightDataError, match=f"count is 3 there and {count} here"):
        generate_flights(config, count, tmp_path, workers=1, show_progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_the_folder_says_which_run_it_holds(tmp_path):
    generate_flights(FlightsConfig(split="validation", image_hw=(16, 16)), 1, tmp_path, workers=1, show_progress=False)
    assert json.loads((tmp_path / "flights.json").read_text()) == {
        "format": 2,
        "count": 1,
        "split": "validation",
        "image_hw": [16, 16],
        "shard_flights": 64,
        "dynamics": "kinematic",
        "perturbation": None,
    }


def test_shards_of_an_unknown_run_are_refused(tmp_path):
    config = FlightsConfig(split="test", image_hw=(16, 16))
    (tmp_path / "flights-0000000-0001.npz").write_bytes(b"")
    with pytest.raises(FlightDataError, match=r"holds shards but no flights\.json"):
        generate_flights(config, 1, tmp_path, workers=1, show_progress=False)
    (tmp_path / "flights-0000000-0001.npz").unlink()
    generate_flights(config, 1, tmp_path, workers=1, show_progress=False)
    (tmp_path / "mine.npz").write_bytes(b"")
    with pytest.raises(FlightDataError, match=r"mine\.npz \(1 such\) is not of the run"):
        generate_flights(config, 1, tmp_path, workers=1, show_progress=False)
    for content, message in (("{", "not JSON"), ("[1]", "holds no settings")):
        (tmp_path / "flights.json").write_text(content)
        with pytest.raises(FlightDataError, match=message):
            generate_flights(config, 1, tmp_path, workers=1, show_progress=False)


def test_a_broken_shard_says_what_to_do(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK not really")
    with pytest.raises(FlightDataError, match="delete it and generate again"):
        read_shard(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", frames=np.zeros(1))
    with pytest.raises(FlightDataError, match="lacks actions"):
        read_shard(tmp_path / "b.npz")


def test_the_commands_write_tasks_and_flights(tmp_path):
    runner = CliRunner()
    out = tmp_path / "tasks.json"
    result = runner.invoke(main, ["sim", "tasks", "--split", "test", "--count", "18", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"out": str(out), "tasks": 18, "kinds": 18, "split": "test"}
    assert read_task_list(out)[7] == generate_task("test", 7)

    flights = ["sim", "flights", "--split", "train", "--count", "2", "--out", str(tmp_path / "f"), "--workers", "1"]
    result = runner.invoke(main, [*flights, "--image-size", "16"])
    assert result.exit_code == 0, result.output
    assert "2 flights in 1 shards" in result.stdout
    result = runner.invoke(main, [*flights, "--image-size", "32"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "image_hw is [16, 16] there and [32, 32] here" in result.stderr
    assert len(result.stderr.splitlines()) == 1
