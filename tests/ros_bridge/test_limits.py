"""The set of allowed velocities, and moving inside it."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from setpoint_flights import LIMITS

from worldvln_edge.ros_bridge.setpoints.limits import (
    AllowedVelocities,
    LimitsError,
    approach_rate,
    approach_velocity,
)

_numbers = st.floats(-50, 50)
_vectors = st.tuples(_numbers, _numbers, _numbers).map(np.array)


@given(position=_vectors, now=_vectors, wanted=_vectors, change=st.floats(0, 5))
def test_what_comes_next_is_allowed_from_anywhere(position, now, wanted, change):
    allowed = AllowedVelocities.at(position, LIMITS)
    assert allowed.contains(np.zeros(3))
    result = approach_velocity(now, wanted, allowed, change)
    assert allowed.contains(result)
    if allowed.contains(now, tolerance=0):
        assert np.linalg.norm(result - now) <= change + 1e-9


@given(position=_vectors, now=_vectors, wanted=_vectors)
def test_an_allowed_wish_is_granted_when_the_change_may_be_large(position, now, wanted):
    allowed = AllowedVelocities.at(position, LIMITS)
    np.testing.assert_allclose(approach_velocity(now, wanted, allowed, 1e6), allowed.confine(wanted))
    np.testing.assert_allclose(allowed.confine(allowed.confine(wanted)), allowed.confine(wanted), rtol=1e-12)


@given(start=st.floats(0, 19.9), speed=st.floats(0, 5), period_s=st.floats(0.02, 0.05))
@settings(max_examples=20, deadline=None)
def test_a_drone_that_wants_through_a_wall_stops_in_front_of_it_within_the_acceleration_limit(start, speed, period_s):
    x, velocity = start, np.zeros(3)
    for _ in range(1000):
        allowed = AllowedVelocities.at(np.array([x, 0, 5]), LIMITS)
        after = approach_velocity(velocity, np.array([speed, 0, 0]), allowed, LIMITS.max_acceleration_m_s2 * period_s)
        assert np.linalg.norm(after - velocity) <= LIMITS.max_acceleration_m_s2 * period_s + 1e-9
        velocity = after
        x += velocity[0] * period_s
    assert x <= LIMITS.geofence_max_m[0] + 1e-9


@given(height=st.floats(-5, 1))
def test_below_the_least_height_only_climbing_is_allowed(height):
    allowed = AllowedVelocities.at(np.array([0, 0, height]), LIMITS)
    assert allowed.confine(np.array([0, 0, -1.0]))[2] == 0
    assert allowed.confine(np.array([0, 0, 0.5]))[2] == 0.5


def test_outside_of_the_fence_only_the_way_back_is_allowed():
    allowed = AllowedVelocities.at(np.array([30, -30, 20]), LIMITS)
    np.testing.assert_array_equal(allowed.confine(np.array([1, -1, 1])), [0, 0, 0])
    np.testing.assert_array_equal(allowed.confine(np.array([-1, 1, -0.5])), [-1, 1, -0.5])


@given(now=st.floats(-0.8, 0.8), wanted=st.floats(-10, 10), change=st.floats(0, 1))
def test_a_yaw_rate_keeps_its_limit_and_its_change(now, wanted, change):
    result = approach_rate(now, wanted, 0.8, change)
    assert abs(result) <= 0.8
    assert abs(result - now) <= change + 1e-12


def test_the_fence_with_its_tolerance_says_who_has_left():
    assert not LIMITS.is_beyond_geofence(np.array([20.4, 0, 3]))
    assert LIMITS.is_beyond_geofence(np.array([20.6, 0, 3]))
    assert LIMITS.is_beyond_geofence(np.array([0, 0, -0.6]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_speed_m_s": 0.0}, "limits.max_speed_m_s must be over 0 and below 100, found 0"),
        ({"max_acceleration_m_s2": math.nan}, "limits.max_acceleration_m_s2 must be over 0 and below 100, found nan"),
        ({"min_height_m": math.nan}, "limits: geofence corners and min_height_m must be finite numbers"),
        ({"geofence_max_m": (20, -20, 12)}, "limits: the geofence is empty along y: from -20 to -20 m"),
        ({"min_height_m": 12.0}, "limits.min_height_m 12 must lie below the geofence's top, 12 m"),
    ],
)
def test_limits_under_which_nothing_can_fly_are_refused(changes, text):
    with pytest.raises(LimitsError) as refusal:
        msgspec.structs.replace(LIMITS, **changes)
    assert text in str(refusal.value)
