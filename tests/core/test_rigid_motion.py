"""Labels, paths and endpoint errors: against the golden arrays, and one against the other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.action_windows import average_windows
from worldvln_edge.rigid_motion import (
    angle_between_deg,
    angles_of_rotations,
    deltas_of_poses,
    integrate_deltas,
    rotations_of_angles,
    yaw_error_deg,
)

Golden = Callable[[str], Path]


def _about(axis: int, angle: float) -> np.ndarray:
    """Right-handed rotation about one axis."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


@given(st.lists(st.floats(-7, 7), min_size=3, max_size=3))
def test_a_rotation_is_roll_times_pitch_times_yaw(angles: list[float]):
    roll, yaw, pitch = angles
    expected = _about(0, roll) @ _about(1, pitch) @ _about(2, yaw)
    np.testing.assert_allclose(rotations_of_angles(np.array(angles)), expected, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_angles_of_a_rotation_give_the_rotation_back(seed: int, is_upright: bool):
    angles = np.random.default_rng(seed).uniform(-np.pi, np.pi, (5, 3))
    if is_upright:
        angles[:, 2] = np.pi / 2  # roll and yaw turn about one axis
    rotations = rotations_of_angles(angles)
    np.testing.assert_allclose(rotations_of_angles(angles_of_rotations(rotations)), rotations, atol=1e-7)


def test_half_a_turn_is_an_angle_like_any_other():
    angles = np.array([[0.0, 0.0, 0.0], [0.0, np.pi, 0.0]])
    deltas = deltas_of_poses(np.zeros((2, 3)), angles)
    assert abs(deltas[1, 0]) == pytest.approx(np.pi)


@given(st.integers(0, 2**32 - 1))
def test_integrated_labels_return_the_poses(seed: int):
    rng = np.random.default_rng(seed)
    positions, angles = rng.normal(size=(9, 3)), rng.uniform(-1.4, 1.4, (9, 3))
    rotations = rotations_of_angles(angles)
    path, turned = integrate_deltas(deltas_of_poses(positions, angles)[1:], positions[0], rotations[0])
    np.testing.assert_allclose(path, positions, atol=1e-9)
    np.testing.assert_allclose(turned, rotations, atol=1e-9)


@pytest.mark.golden
def test_labels_are_the_golden_ones(golden: Golden):
    arrays = np.load(golden("training") / "labels.npz")
    poses = arrays["abs_pose_cm_deg"].astype(np.float64)
    deltas = deltas_of_poses(poses[:, :3] / 100, np.radians(poses[:, 3:]))
    np.testing.assert_allclose(deltas, arrays["delta_rad_m"], atol=1e-5)


@pytest.mark.golden
def test_averaged_windows_and_their_path_are_the_golden_ones(golden: Golden):
    arrays = np.load(golden("training") / "se3_endpoint.npz")
    windows = arrays["window_deltas"].astype(np.float64)
    deltas = average_windows(windows, list(range(len(windows))), len(arrays["aggregated_deltas"]))
    np.testing.assert_allclose(deltas, arrays["aggregated_deltas"], rtol=1e-9, atol=1e-12)

    start = rotations_of_angles(arrays["start_rpy_rad"].astype(np.float64))
    positions, rotations = integrate_deltas(deltas[1:], arrays["start_xyz_m"], start)
    np.testing.assert_allclose(positions, arrays["traj64_xyz"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rotations, arrays["traj64_R"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(positions, arrays["traj_rpy_xyz"][:, 3:], atol=1e-5)
    written = rotations_of_angles(arrays["traj_rpy_xyz"][:, :3].astype(np.float64))
    np.testing.assert_allclose(rotations, written, atol=1e-5)

    true_end = rotations_of_angles(arrays["gt_rpy_rad_unwrapped"][-1].astype(np.float64))
    distance = np.linalg.norm(positions[-1] - arrays["gt_xyz_m"][-1])
    assert distance == pytest.approx(float(arrays["endpoint_dist_m"]), abs=1e-5)
    # These two come from float32 matrices; an arc cosine near 1 leaves three digits of them.
    assert angle_between_deg(true_end, rotations[-1]) == pytest.approx(float(arrays["endpoint_geodesic_deg"]), abs=1e-3)
    assert yaw_error_deg(true_end, rotations[-1]) == pytest.approx(float(arrays["endpoint_yaw_err_deg"]), abs=1e-3)


@pytest.mark.golden
def test_a_path_of_true_labels_ends_where_the_flight_did(golden: Golden):
    arrays = np.load(golden("training") / "se3_endpoint.npz")
    angles = arrays["gt_rpy_rad_unwrapped"].astype(np.float64)
    deltas = deltas_of_poses(arrays["gt_xyz_m"], angles)
    positions, _ = integrate_deltas(deltas[1:], arrays["gt_xyz_m"][0], rotations_of_angles(angles[0]))
    np.testing.assert_allclose(positions, arrays["gt_xyz_m"], atol=1e-5)
    np.testing.assert_allclose(positions, arrays["traj_from_gt_delta"][:, 3:], atol=1e-5)


@pytest.mark.golden
def test_yaw_errors_go_the_short_way_round(golden: Golden):
    for predicted, true, expected in np.load(golden("training") / "se3_endpoint.npz")["geo_pairs"]:
        rotations = rotations_of_angles(np.radians([[0, predicted, 0], [0, true, 0]]))
        assert yaw_error_deg(*rotations) == pytest.approx(expected, abs=1e-9)
