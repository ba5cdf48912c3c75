import sys

import numpy as np
import pytest

from worldvln_edge.poses import integrate_actions
from worldvln_edge.tasks import Task
from worldvln_edge.training.sim.camera import CameraConfig, RenderingUnavailableError, make_gl_context
from worldvln_edge.training.sim.scene import build_scene
from worldvln_edge.training.sim.scene_model import load_scene_model
from worldvln_edge.training.sim.simulator import STEP_S, Simulator, TrackingConfig, WindConfig

ACTIONS = np.tile([12.0, 3.0, 1.0, 0.0, 2.0, 0.0], (6, 1))


@pytest.fixture(scope="module")
def free_pose():
    model, rng = load_scene_model("rooms", 0), np.random.default_rng(1)
    while True:
        pose = np.array([*rng.uniform(-800, 800, 2), 300.0, 0.0, rng.uniform(-180, 180), 0.0])
        if model.clearance_m(pose, limit_m=2.5) > 2.0:
            return pose


@pytest.fixture
def make_simulator():
    made = []

    def make(**options):
        made.append(Simulator(load_scene_model("rooms", 0), **options))
        return made[-1]

    yield make
    for simulator in made:
        simulator.close()


def fly(simulator, pose, seed=0):
    frames = [simulator.reset(pose, seed)]
    frames += [simulator.step(action).frame for action in ACTIONS]
    return np.stack(frames)


def test_the_same_seed_gives_bit_equal_frames_also_from_a_scene_built_again(make_simulator, free_pose):
    first = fly(make_simulator(), free_pose)
    with Simulator(build_scene("rooms", 0)) as again:
        np.testing.assert_array_equal(first, fly(again, free_pose))
    assert first.shape == (7, 64, 64, 3)
    assert first.dtype == np.uint8
    assert first.std() > 15


def test_two_simulators_in_one_process_do_not_disturb_each_other(make_simulator, free_pose):
    alone = fly(make_simulator(), free_pose)
    small, large = make_simulator(), make_simulator(image_hw=(96, 128), camera=CameraConfig(fovy_deg=60))
    frames = [small.reset(free_pose)]
    assert large.reset(free_pose).shape == (96, 128, 3)
    for action in ACTIONS:
        large.step(action)
        frames.append(small.step(action).frame)
    np.testing.assert_array_equal(alone, np.stack(frames))


def test_a_kinematic_drone_stands_on_its_setpoint_and_its_labels_are_the_actions(make_simulator, free_pose):
    simulator = make_simulator()
    fly(simulator, free_pose)
    np.testing.assert_allclose(simulator.poses[1:], integrate_actions(free_pose, ACTIONS), atol=1e-9)
    np.testing.assert_allclose(simulator.labels, ACTIONS, atol=1e-9)


def test_yaw_first_moves_along_the_new_heading(make_simulator, free_pose):
    simulator = make_simulator(order="yaw_first")
    fly(simulator, free_pose)
    np.testing.assert_allclose(simulator.poses[1:], integrate_actions(free_pose, ACTIONS, order="yaw_first"))


def test_a_tracked_drone_lags_behind_and_then_arrives(make_simulator, free_pose):
    simulator = make_simulator(dynamics="tracked", tracking=TrackingConfig(horizontal_s=0.2))
    simulator.reset(free_pose)
    first = simulator.step([20.0, 0, 0, 0, 0, 0])
    assert np.linalg.norm(first.pose[:2] - free_pose[:2]) == pytest.approx(20.0 * (1 - np.exp(-STEP_S / 0.2)))
    for _ in range(60):
        last = simulator.step(np.zeros(6))
    assert np.linalg.norm(last.pose[:2] - free_pose[:2]) == pytest.approx(20.0, abs=1e-3)
    np.testing.assert_allclose(integrate_actions(free_pose, simulator.labels), simulator.poses[1:], atol=1e-6)


def test_wind_is_the_same_for_the_same_seed_and_another_for_another(make_simulator, free_pose):
    simulator = make_simulator(dynamics="tracked", wind=WindConfig(horizontal_m_s=0.5, vertical_m_s=0.2))
    paths = []
    for seed in (1, 1, 2):
        fly(simulator, free_pose, seed)
        paths.append(simulator.poses)
    np.testing.assert_array_equal(paths[0], paths[1])
    assert np.abs(paths[0] - paths[2]).max() > 0.5


def test_flying_into_a_wall_is_a_collision_and_a_long_step_does_not_jump_through_it(make_simulator, free_pose):
    simulator = make_simulator()
    simulator.reset(free_pose)
    assert not simulator.step(np.zeros(6)).collided
    assert simulator.step([4000.0, 0, 0, 0, 0, 0]).collided
    simulator.reset(free_pose)
    assert simulator.step([0, 0, -290.0, 0, 0, 0]).collided  # the floor


def test_unusable_input_says_what_is_wanted(make_simulator, free_pose):
    simulator = make_simulator()
    with pytest.raises(RuntimeError, match="call reset"):
        simulator.step(np.zeros(6))
    with pytest.raises(ValueError, match="a pose must be 6 finite numbers"):
        simulator.reset([0.0] * 5)
    simulator.reset(free_pose)
    with pytest.raises(ValueError, match="an action must be 6 finite numbers"):
        simulator.step([0, 0, np.nan, 0, 0, 0])
    with pytest.raises(ValueError, match="known: kinematic, tracked"):
        make_simulator(dynamics="teleport")
    with pytest.raises(ValueError, match="wind moves only a tracked drone"):
        make_simulator(wind=WindConfig(horizontal_m_s=1.0))
    with pytest.raises(ValueError, match="image_hw"):
        make_simulator(image_hw=(0, 64))
    with pytest.raises(ValueError, match="names no scene"):
        Simulator.for_task(Task(instruction="go", initial_pos=(0.0,) * 6))


def test_without_egl_the_error_names_the_packages(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(sys.modules, "mujoco.egl", None)  # import fails as it does without the library
    with pytest.raises(RenderingUnavailableError, match="libegl1 libgl1-mesa-dri"):
        make_gl_context(8, 8)


def test_a_point_behind_the_camera_is_not_in_the_frame():
    config = CameraConfig(pitch_down_deg=0)
    pose = np.array([0.0, 0, 300, 0, 90, 0])  # looks along +y
    assert config.project(pose, np.array([0.0, -5, 3])) is None
    assert config.project(pose, np.array([0.0, 5, 3])) == pytest.approx((0.0, 0.0))
    right, up = config.project(pose, np.array([-1.0, 5, 4]))  # -x is to the right when looking along +y
    assert right > 0
    assert up > 0
