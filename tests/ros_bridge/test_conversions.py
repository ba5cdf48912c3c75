"""Conversions between WorldVLN's conventions and those of ROS and PX4. The oracle is worldvln_edge.poses."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.poses import integrate_actions
from worldvln_edge.rigid_motion import angle_between_deg, rotations_of_angles
from worldvln_edge.ros_bridge import conversions as cv

_length = st.floats(-1e4, 1e4)
_angle_deg = st.floats(-720, 720)
_poses = st.tuples(_length, _length, _length, _angle_deg, _angle_deg, _angle_deg).map(np.array)
_action = st.tuples(*[st.floats(-200, 200)] * 3, *[st.floats(-90, 90)] * 3)
_chunks = st.lists(_action, min_size=1, max_size=16).map(np.array)


@given(pose=_poses)
def test_a_pose_comes_back_as_the_same_place_and_attitude(pose):
    back = cv.pose_from_ros(*cv.pose_to_ros(pose))
    np.testing.assert_allclose(back[:3], pose[:3], atol=1e-9)
    turns = rotations_of_angles(np.radians(np.stack([pose[3:], back[3:]])))
    assert angle_between_deg(turns[0], turns[1]) < 1e-4


@given(pose=_poses)
def test_orientations_are_unit_quaternions_with_positive_w(pose):
    _, quaternion = cv.pose_to_ros(pose)
    assert np.linalg.norm(quaternion) == pytest.approx(1)
    assert quaternion[3] >= 0


@given(chunk=_chunks)
def test_actions_come_back_without_roll_and_pitch(chunk):
    expected = chunk * np.array([1, 1, 1, 0, 1, 0])
    np.testing.assert_allclose(cv.steps_to_actions(cv.actions_to_steps(chunk)), expected, atol=1e-9)


@given(pose=_poses, chunk=_chunks)
def test_a_chunk_ends_at_the_same_place_in_both_conventions(pose, chunk):
    ends = integrate_actions(pose, chunk)
    start = [*cv.position_to_ros(pose[:3]), cv.yaw_to_ros(pose[4])]
    path = cv.integrate_steps(np.array(start), cv.actions_to_steps(chunk))
    assert path.shape == (len(chunk) + 1, 4)
    np.testing.assert_allclose(cv.position_from_ros(path[1:, :3]), ends[:, :3], atol=1e-6)
    np.testing.assert_allclose(cv.yaw_from_ros(path[1:, 3]), ends[:, 4], atol=1e-9)


@given(yaw_deg=_angle_deg)
def test_the_yaw_of_a_level_pose_is_that_of_its_quaternion(yaw_deg):
    _, quaternion = cv.pose_to_ros(np.array([0, 0, 0, 0, yaw_deg, 0]))
    difference = cv.wrap_rad(cv.yaw_of_quaternion(quaternion) - cv.yaw_to_ros(yaw_deg))
    assert abs(difference) < 1e-9
    level = cv.quaternion_of_yaw(float(cv.wrap_rad(cv.yaw_to_ros(yaw_deg))))
    assert abs(abs(level @ quaternion) - 1) < 1e-9


def test_right_is_minus_y_and_a_turn_to_the_right_is_negative_in_ros():
    np.testing.assert_allclose(
        cv.actions_to_steps(np.array([[100, 50, 25, 9, 90, 9]])), [[1, -0.5, 0.25, -math.pi / 2]]
    )


def test_a_raised_right_wing_is_a_negative_roll_in_ros():
    # In WorldVLN a positive roll turns y (right) towards z (up); in ROS a positive roll turns y (left) towards z.
    _, (x, y, z, w) = cv.pose_to_ros(np.array([0, 0, 0, 30, 0, 0]))
    assert (x, y, z, w) == pytest.approx((-math.sin(math.pi / 12), 0, 0, math.cos(math.pi / 12)))


def test_px4_looks_north_where_ros_has_a_quarter_turn():
    assert cv.yaw_enu_to_ned(math.pi / 2) == pytest.approx(0)
    assert cv.yaw_enu_to_ned(0.0) == pytest.approx(math.pi / 2)  # east
    np.testing.assert_allclose(cv.enu_to_ned(np.array([1, 2, 3])), [2, 1, -3])
    np.testing.assert_allclose(cv.flu_to_frd(np.array([1, 2, 3])), [1, -2, -3])


@given(vector=st.tuples(_length, _length, _length).map(np.array), yaw=st.floats(-3.1, 3.1))
def test_px4_and_optical_axes_come_back(vector, yaw):
    np.testing.assert_array_equal(cv.enu_to_ned(cv.enu_to_ned(vector)), vector)
    np.testing.assert_array_equal(cv.flu_to_frd(cv.flu_to_frd(vector)), vector)
    np.testing.assert_allclose(cv.optical_to_flu(cv.flu_to_optical(vector)), vector)
    assert cv.yaw_enu_to_ned(cv.yaw_enu_to_ned(yaw)) == pytest.approx(yaw, abs=1e-9)


def test_an_optical_frame_looks_along_z_with_y_down():
    np.testing.assert_array_equal(cv.flu_to_optical(np.eye(3)), [[0, 0, 1], [-1, 0, 0], [0, -1, 0]])


@pytest.mark.parametrize("quaternion", [(0, 0, 0, 0), (math.nan, 0, 0, 1), (0, math.inf, 0, 1)])
def test_a_quaternion_that_turns_nothing_is_refused(quaternion):
    with pytest.raises(ValueError, match="is no quaternion of a rotation; publish one of length 1"):
        cv.pose_from_ros(np.zeros(3), np.array(quaternion))
