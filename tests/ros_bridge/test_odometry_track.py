"""Where the drone was during the last seconds."""

import math

import numpy as np
import pytest

from worldvln_edge.ros_bridge.setpoints.odometry_track import OdometryConfig, OdometryTrack


def _track(**config: float) -> OdometryTrack:
    track = OdometryTrack(OdometryConfig(**config), max_speed_m_s=2.0)
    for index in range(11):
        assert track.push(np.array([index / 10, 0, 2]), math.pi - 0.05 + index / 100, 10 + index / 10)
    return track


def test_a_pose_between_two_is_interpolated_and_yaw_turns_the_short_way_round():
    np.testing.assert_allclose(_track().at(10.55), [0.55, 0, 2, math.pi + 0.005])
    track = _track()
    track.push(np.array([1.1, 0, 2]), -math.pi + 0.06, 11.1)  # wrapped by whoever published it
    np.testing.assert_allclose(track.at(11.1), [1.1, 0, 2, math.pi + 0.06])


def test_times_that_are_not_covered_have_no_pose():
    track = _track(memory_s=0.5)
    assert track.at(10.2) is None
    assert track.at(11.5) is None
    np.testing.assert_allclose(track.at(11.1), track.newest)
    np.testing.assert_allclose(track.at(10.45)[0], 0.5)


def test_a_jump_is_told_and_nothing_is_interpolated_across_it():
    track = _track()
    assert track.push(np.array([5.0, 0, 2]), 0.0, 11.1) is False
    assert track.at(10.5) is None
    assert track.push(np.array([5.1, 0, 2]), 0.0, 11.2) is True


def test_odometry_that_cannot_be_used_says_why():
    assert OdometryTrack(OdometryConfig(), 2.0).why_unusable(0.0) == "no odometry yet"
    track = _track()
    assert track.why_unusable(11.1) is None
    assert track.why_unusable(11.25) == "odometry is 0.25 s old"
    track.push(np.array([1.0, 0, math.nan]), 0.0, 11.1)
    assert track.why_unusable(11.1) == "odometry is not finite"
    track.push(np.array([1.0, 0, 2]), 0.0, 11.15)
    assert track.why_unusable(11.15) is None


@pytest.mark.parametrize("name", ["stale_after_s", "max_jump_m", "memory_s"])
def test_a_config_that_cannot_work_is_refused(name):
    with pytest.raises(ValueError, match=rf"odometry\.{name} must be over 0 and below 60, found 0"):
        OdometryConfig(**{name: 0.0})
