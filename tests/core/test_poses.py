"""Poses and actions: one moves the other, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.poses import (
    actions_between,
    actions_to_deltas,
    apply_action,
    deltas_to_actions,
    integrate_actions,
    wrap_deg,
)

numbers = st.floats(-500, 500, allow_nan=False)


@given(st.lists(numbers, min_size=6, max_size=6), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_actions_between_poses_lead_back_along_them(start: list[float], count: int, seed: int):
    actions = np.random.default_rng(seed).uniform(-90, 90, (count, 6))
    actions[:, [3, 5]] = 0
    path = np.concatenate([[start], integrate_actions(np.array(start), actions)])
    np.testing.assert_allclose(actions_between(path), actions, atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_deltas_and_actions_are_two_spellings_of_one_motion(seed: int):
    actions = np.random.default_rng(seed).uniform(-200, 200, (7, 6)).astype(np.float32)
    np.testing.assert_allclose(deltas_to_actions(actions_to_deltas(actions)), actions, rtol=1e-5, atol=1e-4)


def test_delta_order_is_yaw_pitch_roll_and_action_order_roll_yaw_pitch():
    delta = np.array([[np.pi / 2, np.pi / 4, np.pi, 0.01, 0.02, 0.03]], np.float32)
    np.testing.assert_allclose(deltas_to_actions(delta), [[1, 2, 3, 180, 90, 45]], rtol=1e-5)


@pytest.mark.parametrize(
    ("order", "end"),
    [("trans_first", (100, 0)), ("yaw_first", (0, 100)), ("midpoint", (50 * 2**0.5, 50 * 2**0.5))],
)
def test_order_says_which_heading_a_step_takes(order, end):
    pose = apply_action(np.zeros(6), np.array([100, 0, 5, 0, 90, 0]), order=order)
    np.testing.assert_allclose(pose, [*end, 5, 0, 90, 0], atol=1e-9)


def test_left_is_left_at_every_heading():
    pose = np.array([0, 0, 0, 0, 180.0, 0])
    np.testing.assert_allclose(apply_action(pose, np.array([10, 20, 0, 0, 0, 0]))[:2], [-10, -20], atol=1e-9)


def test_yaw_is_not_wrapped_but_differences_are():
    pose = apply_action(np.array([0, 0, 0, 0, 170.0, 0]), np.array([0, 0, 0, 0, 30, 0]))
    assert pose[4] == 200
    path = np.array([[0, 0, 0, 0, 170.0, 0], [0, 0, 0, 0, -160.0, 0]])
    assert actions_between(path)[0, 4] == pytest.approx(30)


@given(st.floats(-1e4, 1e4))
def test_wrapped_angles_lie_in_their_range_and_are_the_same_angle(angle: float):
    wrapped = wrap_deg(angle)
    assert -180 <= wrapped < 180
    assert np.cos(np.radians(wrapped)) == pytest.approx(np.cos(np.radians(angle)), abs=1e-6)


def test_no_actions_give_no_poses():
    assert integrate_actions(np.zeros(6), np.zeros((0, 6))).shape == (0, 6)
