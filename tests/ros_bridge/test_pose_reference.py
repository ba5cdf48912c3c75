"""Setpoints as poses: the same motion, without jumps, near the drone and inside the box."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from setpoint_flights import LIMITS, Flight, forward_chunk

from worldvln_edge.ros_bridge.setpoints.pose_reference import PoseReference

_action = st.tuples(*[st.floats(-30, 30)] * 3, st.just(0.0), st.floats(-20, 20), st.just(0.0))
_events = st.lists(
    st.tuples(st.lists(_action, min_size=1, max_size=16).map(np.array), st.integers(1, 60)), min_size=1, max_size=6
)


def _poses(flight: Flight) -> np.ndarray:
    return np.array([setpoint.pose_4 for _, setpoint, _ in flight.ticks])


@given(events=_events, period_s=st.floats(0.02, 0.05))
@settings(max_examples=25, deadline=None)
def test_over_any_chunks_the_pose_moves_as_the_velocity_says_and_stays_in_the_box(events, period_s):
    flight = Flight()
    for actions, ticks in events:
        flight.send(actions)
        flight.fly(ticks * period_s, period_s)
    poses = _poses(flight)
    velocities = np.array([setpoint.velocity_m_s for _, setpoint, _ in flight.ticks])
    assert np.abs(np.diff(poses[:, :3], axis=0) - velocities[1:] * period_s).max(initial=0) < 1e-6
    assert np.all(poses[:, :3] >= [*LIMITS.geofence_min_m[:2], LIMITS.min_height_m])
    assert np.all(poses[:, :3] <= LIMITS.geofence_max_m)


def test_a_drone_that_holds_at_once_is_told_to_stay_where_it_is():
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(0.6)
    flight.fly(0.2, alive=False)
    here = flight.position
    held = flight.tick(alive=False)
    assert held.mode == "hold"
    assert np.allclose(held.pose_4[:3], here)
    flight.position = here + np.array([0.3, 0.0, 0.0])  # it drifts on, and is called back
    assert np.allclose(flight.tick(alive=False).pose_4[:3], here)


def test_a_pilot_who_takes_off_takes_the_pose_along():
    flight = Flight(position=np.array([0.0, 0.0, 0.1]))
    assert np.allclose(flight.tick().pose_4[:3], [0, 0, 0.1])
    for _ in range(150):
        flight.position = flight.position + np.array([0.0, 0.0, 0.02])
        pose = flight.tick().pose_4
    assert flight.position[2] - pose[2] == pytest.approx(2 * flight.config.max_lag_m)


def test_after_silence_the_pose_is_where_the_drone_is_then():
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(0.5)
    flight.fly(0.7, alive=False)
    assert flight.ticks[-1][1].pose_4 is None
    flight.position = np.array([1.0, 1.0, 4.0])
    assert np.allclose(flight.tick().pose_4[:3], [1.0, 1.0, 4.0])


def test_a_pose_does_not_run_away_from_a_drone_that_cannot_follow():
    reference = PoseReference(LIMITS, 1.0, 0.6)
    here = np.array([0.0, 0.0, 3.0, 0.0])
    for _ in range(200):
        reference.advance(np.array([1.0, 0.0, 0.0, 0.5]), 0.025, here)
    assert reference.pose_4 == pytest.approx([1.0, 0.0, 3.0, 0.6])


def test_a_drone_on_the_ground_is_not_told_to_take_off():
    reference = PoseReference(LIMITS, 1.0, 0.6)
    reference.advance(np.zeros(4), 0.025, np.array([0.0, 0.0, 0.2, 0.0]))
    assert reference.pose_4[2] == pytest.approx(0.2)
    reference.advance(np.array([0.0, 0.0, -5.0, 0.0]), 0.1, np.array([0.0, 0.0, 0.2, 0.0]))
    assert reference.pose_4[2] == pytest.approx(0.2)
