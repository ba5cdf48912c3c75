"""Closed-loop flights with the real simulator: over a real server, in process, and replayed."""

from contextlib import nullcontext

import msgspec
import numpy as np
import pytest

from worldvln_edge.client import SessionClient
from worldvln_edge.config import HorizonConfig
from worldvln_edge.poses import integrate_actions
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.tasks import SceneRef
from worldvln_edge.training.evaluation.baselines import read_action_tables, shuffled_instructions
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    PolicyPilot,
    ReplayPilot,
    SceneSimulators,
    ServerPilot,
    expert_actions,
    flight_seed,
    fly_task,
)
from worldvln_edge.training.evaluation.evaluation import evaluate
from worldvln_edge.training.evaluation.evaluation_tables import evaluation_markdown
from worldvln_edge.training.evaluation.intervals import wilson_interval
from worldvln_edge.training.evaluation.pilot_sources import RemotePilot
from worldvln_edge.training.evaluation.row_flights import EXPERT, MEAN_KIND, POLICY, SHUFFLED, ZERO
from worldvln_edge.training.sim.flights import FlightsConfig, generate_flights
from worldvln_edge.training.sim.instructions import TASK_KINDS
from worldvln_edge.training.sim.shards import FlightDataError
from worldvln_edge.training.sim.tasks import generate_task

SMALL = (32, 32)


class SteadyPolicy(NullPolicy):
    """Flies 10 cm ahead and turns 1 deg a step, and remembers what it saw."""

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        self.prompt, self.seed, self.seen = prompt, seed, []
        self.session = super().new_session(prompt, seed=seed, emit=emit)
        observe = self.session.observe

        def steady(frames, **options):
            self.seen += [frame.copy() for frame in frames]
            chunk = observe(frames, **options)
            actions = np.tile(np.float32([10, 0, 0, 0, 1, 0]), (len(chunk.actions), 1))
            return ActionChunk(segment=chunk.segment, actions=actions, observed_frames=chunk.observed_frames, seed=seed)

        self.session.observe = steady
        return self.session


@pytest.fixture(scope="module")
def tasks():
    return [generate_task("test", index) for index in range(len(TASK_KINDS))]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flights")
    generate_flights(
        FlightsConfig(split="train", image_hw=(8, 8), shard_flights=20), 40, folder, workers=1, show_progress=False
    )
    return read_action_tables(folder)


def open_null():
    return nullcontext(PolicyPilot(NullPolicy(image_hw=SMALL)))


def test_null_policy_over_a_real_server_leaves_the_drone_where_it_is(tasks):
    with (
        BackgroundServer(NullPolicy(image_hw=SMALL)) as server,
        SessionClient(server.url, frame_format="rgb8") as client,
        SceneSimulators(SMALL) as simulators,
    ):
        flight = fly_task(tasks[0], ServerPilot(client), simulators.for_task(tasks[0]))
        assert client.ping().sessions == 0
    assert flight.poses.shape == (49, 6)
    np.testing.assert_array_equal(flight.poses, np.tile(tasks[0].initial_pos, (49, 1)))
    assert flight.actions.shape == (48, 6)
    assert flight.frames.shape == (49, *SMALL, 3)
    assert flight.segments == 3
    assert all(ms > 0 for ms in flight.latency_ms)
    assert not flight.score.success


def test_the_pilot_sees_every_frame_once_and_the_last_segment_is_flown_too(tasks):
    policy = SteadyPolicy(image_hw=SMALL)
    with SceneSimulators(SMALL) as simulators:
        flight = fly_task(tasks[0], PolicyPilot(policy), simulators.for_task(tasks[0]), seed=9)
    np.testing.assert_array_equal(np.stack(policy.seen), flight.frames[:33])
    np.testing.assert_allclose(flight.poses[1:], integrate_actions(flight.poses[0], flight.actions))
    assert (policy.prompt, policy.seed, flight.seed) == (tasks[0].instruction, 9, 9)
    assert flight.poses[-1, 4] - flight.poses[0, 4] == pytest.approx(48)


def test_segments_follow_the_policys_horizon(tasks):
    policy = SteadyPolicy(HorizonConfig(num_frames=13, step=4), image_hw=SMALL)
    with SceneSimulators(SMALL) as simulators:
        flight = fly_task(tasks[0], PolicyPilot(policy), simulators.for_task(tasks[0]))
    assert (flight.points, flight.segments, len(flight.poses)) == ((1, 5, 9, 13), 3, 13)
    assert flight.segment_actions(1).shape == (4, 6)


def test_server_and_process_give_the_same_flight(tasks):
    with SceneSimulators(SMALL) as simulators:
        simulator = simulators.for_task(tasks[1])
        inside = fly_task(tasks[1], PolicyPilot(SteadyPolicy(image_hw=SMALL)), simulator, seed=3)
        policy = SteadyPolicy(image_hw=SMALL)
        with BackgroundServer(policy) as server, SessionClient(server.url, frame_format="rgb8") as client:
            outside = fly_task(tasks[1], ServerPilot(client), simulator, seed=3)
    np.testing.assert_array_equal(inside.poses, outside.poses)
    np.testing.assert_array_equal(inside.frames, outside.frames)
    np.testing.assert_array_equal(np.stack(policy.seen), inside.frames[:33])


def test_expert_replay_succeeds_for_every_kind(tasks):
    pilot = ReplayPilot(expert_actions, num_actions=48)
    with SceneSimulators(pilot.image_hw) as simulators:
        scores = {task.kind: fly_task(task, pilot, simulators.for_task(task)).score for task in tasks}
    assert set(scores) == {kind.name for kind in TASK_KINDS}
    assert all(score.success for score in scores.values())


def test_actions_of_the_wrong_number_or_not_finite_are_refused(tasks):
    wrong = ReplayPilot(lambda task: np.zeros((5, 6)), num_actions=48)
    broken = ReplayPilot(lambda task: np.full((48, 6), np.nan), num_actions=48)
    with SceneSimulators(wrong.image_hw) as simulators:
        for pilot in (wrong, broken):
            with pytest.raises(FlightError, match="expected 48 actions of 6 finite numbers"):
                fly_task(tasks[0], pilot, simulators.for_task(tasks[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": None}, "names no scene"),
        ({"scene": SceneRef(family="moon", seed=1)}, "families are city, rooms"),
        ({"end_pos": None}, "cannot be scored"),
    ],
)
def test_a_task_that_cannot_be_flown_is_refused_with_the_reason(tasks, change, message):
    task = msgspec.structs.replace(tasks[0], **change)
    with SceneSimulators((8, 8)) as simulators, pytest.raises(FlightError, match=message):
        simulators.for_task(task)


def test_frames_larger_than_the_camera_gives_are_refused():
    with pytest.raises(FlightError, match="frames of 5000x5000"):
        SceneSimulators((5000, 5000))


def test_every_task_has_its_own_seed_whatever_the_order(tasks):
    assert len({flight_seed(task, 0) for task in tasks}) == len(tasks)
    assert flight_seed(tasks[0], 5) == flight_seed(tasks[0], 0) + 5


def test_shuffled_instructions_are_a_permutation_that_never_keeps_the_kind(tasks):
    told = shuffled_instructions(tasks * 2)
    assert told == shuffled_instructions(tasks * 2)
    assert sorted(told) == sorted(task.instruction for task in tasks * 2)
    kind_of = {task.instruction: task.kind for task in tasks}
    assert all(kind_of[text] != task.kind for text, task in zip(told, tasks * 2, strict=True))


def test_there_is_no_shuffle_when_one_kind_prevails(tasks):
    assert shuffled_instructions([tasks[0], tasks[0], tasks[1]]) is None
    assert shuffled_instructions([]) is None


def test_tables_hold_the_means_of_the_flights_and_fall_back_to_the_wider_mean(tables, tasks):
    by_kind = {task.kind: task for task in tasks}
    assert (tables.flights, tables.num_actions) == (40, 48)
    forward = tables.mean_of_kind(by_kind["forward"])
    assert forward[:, 0].sum() > 300
    assert abs(forward[:, 4].sum()) < 5
    numbers = {key[1] for key in tables.by_kind_and_magnitude if key[0] == "forward"}
    flown = msgspec.structs.replace(by_kind["forward"], magnitude=next(iter(numbers)))
    distance_cm = tables.mean_of_kind_and_magnitude(flown)[:, 0].sum()
    assert distance_cm == pytest.approx(100 * flown.magnitude[0], abs=1.0)
    never = msgspec.structs.replace(by_kind["forward"], magnitude=(99.0,))
    np.testing.assert_array_equal(tables.mean_of_kind_and_magnitude(never), forward)
    unknown = msgspec.structs.replace(by_kind["forward"], kind="loop")
    np.testing.assert_array_equal(tables.mean_of_kind_and_magnitude(unknown), tables.mean)


def test_a_folder_without_flights_or_with_a_broken_shard_is_refused(tmp_path):
    with pytest.raises(FlightDataError, match="holds no flight shards"):
        read_action_tables(tmp_path)
    (tmp_path / "flights-0.npz").write_bytes(b"not a zip")
    with pytest.raises(FlightDataError, match="broken shard"):
        read_action_tables(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((2, 48, 5))}, r"actions \[2, 48, 5\]; expected \[flights, steps, 6\]"),
        ({"actions": np.full((2, 48, 6), np.nan)}, "actions that are not finite; delete it and generate again"),
        ({"kinds": np.array(["forward"])}, "2 actions, 1 kinds and 2 magnitudes; delete it and generate again"),
    ],
)
def test_shards_that_would_spoil_the_means_are_refused(tmp_path, changes, message):
    arrays = {"actions": np.zeros((2, 48, 6)), "kinds": np.array(["forward", "climb"]), "magnitudes": np.ones((2, 2))}
    np.savez(tmp_path / "flights-0.npz", **(arrays | changes))
    with pytest.raises(FlightDataError, match=message):
        read_action_tables(tmp_path)


def test_evaluation_of_the_null_policy_equals_the_zero_baseline(tasks, tables):
    evaluation = evaluate(tasks[:6], open_null, tables=tables, show_progress=False)
    results = {
        name: [(f.task, f.success, f.final_distance_m, f.final_yaw_error_deg) for f in flights]
        for name, flights in evaluation.rows.items()
    }
    assert results[POLICY] == results[ZERO] == results[SHUFFLED]
    assert all(success for _, success, _, _ in results[EXPERT])
    record = evaluation.to_json(split="test")
    assert record["policy_against"][ZERO]["all"].paired.policy_nearer == 0.5
    assert record["rows"][MEAN_KIND]["all"].flights == 6
    assert record["rows"][POLICY]["motion"].flights + record["rows"][POLICY]["landmark"].flights == 6
    text = evaluation_markdown(evaluation, "null")
    assert "| expert " in text
    assert "100.0%" in text


def test_evaluation_is_the_same_with_workers(tasks, tables):
    with BackgroundServer(SteadyPolicy(image_hw=SMALL)) as server:
        source = RemotePilot(server=server.url)
        one = evaluate(tasks[:10], source, tables=tables, show_progress=False)
        two = evaluate(tasks[:10], source, tables=tables, workers=2, show_progress=False)
    without_times = [msgspec.structs.replace(f, latency_ms=()) for flights in one.rows.values() for f in flights]
    assert without_times == [msgspec.structs.replace(f, latency_ms=()) for r in two.rows.values() for f in r]


def test_a_server_that_goes_away_ends_an_evaluation_with_one_sentence(tasks):
    with pytest.raises(FlightError, match="no worldvln-edge server answers"):
        evaluate(tasks[:10], RemotePilot(server="ws://127.0.0.1:9"), workers=2, show_progress=False)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)]
)
def test_wilson_interval_matches_the_textbook(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)
