import numpy as np
import pytest

from worldvln_edge.poses import actions_between, wrap_deg
from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.camera import CameraConfig
from worldvln_edge.training.sim.expert import APPROACH_STANDOFF_M, EXPERT_STEPS, Goal, expert_path, motion_profile
from worldvln_edge.training.sim.instructions import TASK_KINDS, instruction_vocabulary, task_kind
from worldvln_edge.training.sim.scene_model import load_scene_model
from worldvln_edge.training.sim.tasks import SPLITS, generate_task, score_flight, start_local

START = np.array([100.0, -200.0, 300.0, 0.0, 30.0, 0.0])


@pytest.fixture(scope="module")
def tasks():
    return [generate_task("validation", index) for index in range(2 * len(TASK_KINDS))]


def path_of(task):
    return np.array(task.reference_path_raw)


def test_kinds_take_turns_so_that_every_kind_appears(tasks):
    assert [task.kind for task in tasks[: len(TASK_KINDS)]] == [kind.name for kind in TASK_KINDS]
    assert len({task.scene for task in tasks[:8]}) == 1
    assert {task.scene.family for task in tasks} == {"city", "rooms"}


def test_a_task_is_the_same_for_the_same_split_and_index(tasks):
    assert generate_task("validation", 11) == tasks[11]
    assert generate_task("test", 11) != tasks[11]


def test_splits_share_neither_scenes_nor_seeds():
    made = {split: [generate_task(split, index) for index in (0, 17, 40)] for split in SPLITS}
    for key in ("scene", "seed", "initial_pos"):
        values = [getattr(task, key) for tasks in made.values() for task in tasks]
        assert len(set(values)) == len(values)


def test_an_unknown_split_or_index_is_refused():
    with pytest.raises(ValueError, match="train, validation, test"):
        generate_task("dev", 0)
    with pytest.raises(ValueError, match="index must be"):
        generate_task("test", -1)


def test_instructions_use_the_vocabulary_only_and_hold_the_magnitude(tasks):
    words = set(instruction_vocabulary())
    assert len(words) < 200
    assert all(word == word.lower() for word in words)
    for task in tasks:
        spoken = task.instruction.split()
        assert set(spoken) <= words
        numbers = sorted(float(word) for word in spoken if word[0].isdigit())
        assert numbers == sorted(task.magnitude)
        assert task_kind(task.kind).has_landmark == (task.landmark is not None)
        assert task.landmark is None or task.landmark in task.instruction


def test_expert_paths_are_free_smooth_and_use_all_steps(tasks):
    for task in tasks:
        path = path_of(task)
        assert path.shape == (EXPERT_STEPS + 1, 6)
        model = load_scene_model(task.scene.family, task.scene.seed)
        assert model.path_clearance_m(path) > 0.5
        moved = np.abs(actions_between(path))
        assert (moved.max(1) > 1e-3).all()  # no step stands still
        middle = moved[10:38]
        assert ((np.linalg.norm(middle[:, :3], axis=1) > 3.0) | (middle[:, 4] > 0.35)).all()
        assert np.abs(np.diff(actions_between(path)[:, :3], axis=0)).max() < 12.0  # cm a step and step


def test_landmarks_are_visible_in_the_first_frame(tasks):
    seen = [task for task in tasks if task.landmark]
    assert len(seen) == 2 * sum(kind.has_landmark for kind in TASK_KINDS)
    for task in seen:
        model = load_scene_model(task.scene.family, task.scene.seed)
        centre = model.scene.landmark_centre_m(task.landmark)
        place = CameraConfig().project(np.array(task.initial_pos), centre)
        assert place is not None
        assert max(map(abs, place)) < 0.9
        hit = model.first_hit(np.array(task.initial_pos[:3]) / 100, centre)
        assert hit == model.scene.landmark(task.landmark).solid


def test_the_expert_succeeds_and_standing_still_fails(tasks):
    for task in tasks:
        assert score_flight(task, path_of(task), False).success
        assert not score_flight(task, [task.initial_pos], False).success


def test_a_collision_a_wrong_place_and_a_wrong_heading_each_fail(tasks):
    end = np.array(tasks[0].end_pos)
    assert not score_flight(tasks[0], [end], True).success
    aside = score_flight(tasks[0], [np.add(end, [0, 151.0, 0, 0, 0, 0])], False)
    assert (aside.success, aside.final_distance_m) == (False, pytest.approx(1.51))
    turned = score_flight(tasks[0], [np.add(end, [0, 0, 0, 0, 360 - 16.0, 0])], False)
    assert (turned.success, turned.final_yaw_error_deg) == (False, pytest.approx(16.0))
    assert score_flight(tasks[0], [np.add(end, [0, 140.0, 0, 0, 374.0, 0])], False).success


def test_a_flight_that_cannot_be_scored_says_why():
    with pytest.raises(ValueError, match='no "end_pos"'):
        score_flight(Task(instruction="go", initial_pos=(0.0,) * 6), [START], False)
    with pytest.raises(ValueError, match="without poses"):
        score_flight(Task(instruction="go", initial_pos=(0.0,) * 6, end_pos=(0.0,) * 6), [], False)


def test_the_start_local_path_begins_at_zero_and_goes_forward_along_x(tasks):
    local = np.array(tasks[0].reference_path_preprocessed)
    np.testing.assert_allclose(local[0], 0.0)
    np.testing.assert_allclose(local[-1], [100 * tasks[0].magnitude[0], 0, 0, 0, 0, 0], atol=1e-3)
    np.testing.assert_allclose(start_local(path_of(tasks[5]))[0], 0.0)


@pytest.mark.parametrize(
    ("kind", "magnitude", "total"),
    [
        ("forward", (6.0,), (600, 0, 0, 0)),
        ("backward", (4.0,), (-400, 0, 0, 0)),
        ("strafe_left", (5.0,), (0, -500, 0, 0)),
        ("strafe_right", (5.0,), (0, 500, 0, 0)),
        ("climb", (2.5,), (0, 0, 250, 0)),
        ("descend", (2.0,), (0, 0, -200, 0)),
        ("turn_left", (45.0,), (0, 0, 0, -45)),
        ("turn_right", (120.0,), (0, 0, 0, 120)),
        ("forward_turn_right", (5.0, 45.0), (500, 0, 0, 45)),
        ("climb_turn_left", (2.0, 60.0), (0, 0, 200, -60)),
    ],
)
def test_a_motion_amounts_to_what_its_text_says(kind, magnitude, total):
    actions = actions_between(expert_path(START, Goal(kind, magnitude)))
    np.testing.assert_allclose(actions.sum(0)[[0, 1, 2, 4]], total, atol=1e-6)


def test_the_expert_ends_where_landmark_tasks_want_it():
    landmark = np.array([8.0, 1.0, 1.0])

    def ground(pose):
        return np.linalg.norm(pose[:2] / 100 - landmark[:2])

    def bearing(pose):  # positive: the landmark lies to the right
        x, y = 100 * landmark[:2] - pose[:2]
        return float(wrap_deg(np.degrees(np.arctan2(y, x)) - pose[4]))

    approach = expert_path(START, Goal("approach", (), landmark))
    assert ground(approach[-1]) == pytest.approx(APPROACH_STANDOFF_M)
    assert bearing(approach[-1]) == pytest.approx(0.0, abs=1e-6)
    assert bearing(expert_path(START, Goal("face", (), landmark))[-1]) == pytest.approx(0.0, abs=1e-6)

    for kind, side in (("pass_left", 1), ("pass_right", -1)):
        path = expert_path(START, Goal(kind, (), landmark))
        nearest = path[np.argmin([ground(pose) for pose in path])]
        assert 2.0 < ground(nearest) < 3.0
        assert np.sign(bearing(nearest)) == side  # passing on its left side keeps it on the right

    facing = START.copy()
    facing[4] += bearing(START)
    for kind, sense in (("circle_clockwise", 1), ("circle_counterclockwise", -1)):
        path = expert_path(facing, Goal(kind, (90.0,), landmark))
        np.testing.assert_allclose([ground(pose) for pose in path], ground(facing), rtol=1e-9)
        np.testing.assert_allclose([bearing(pose) for pose in path], 0.0, atol=1e-6)
        assert path[-1, 4] - path[0, 4] == pytest.approx(90.0 * sense)


def test_the_profile_eases_in_and_out():
    share = motion_profile()
    speed = np.diff(share)
    assert (share[0], share[-1]) == (0.0, pytest.approx(1.0))
    assert (speed > 0).all()
    assert speed[0] < 0.5 * speed[20] > speed[-1]


def test_an_impossible_goal_is_refused():
    with pytest.raises(ValueError, match="position of its landmark"):
        expert_path(START, Goal("approach"))
    with pytest.raises(ValueError, match="cannot have the magnitude"):
        expert_path(START, Goal("forward", (1.0, 2.0)))
    with pytest.raises(ValueError, match="cannot fly"):
        expert_path(START, Goal("loop", (), np.zeros(3)))
    with pytest.raises(ValueError, match="unknown kind of task"):
        task_kind("loop")
