"""Chunks become bounded velocities; whatever is amiss becomes zero."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from setpoint_flights import LIMITS, Flight, forward_chunk

from worldvln_edge.poses import integrate_actions
from worldvln_edge.ros_bridge.conversions import position_from_ros, position_to_ros, yaw_from_ros, yaw_to_ros
from worldvln_edge.ros_bridge.setpoints.limits import AllowedVelocities
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig, SetpointConfigError
from worldvln_edge.ros_bridge.setpoints.setpoint_logic import Setpoint, SetpointLogic

_ZERO = (0.0, 0.0, 0.0)

_action = st.tuples(*[st.floats(-30, 30)] * 3, st.just(0.0), st.floats(-20, 20), st.just(0.0))
_chunks = st.lists(_action, min_size=1, max_size=16).map(np.array)
_events = st.lists(st.tuples(_chunks, st.integers(1, 60), st.floats(0, 0.5)), min_size=1, max_size=6)


@given(events=_events, period_s=st.floats(0.02, 0.05), height=st.floats(1.5, 11), speed=st.floats(0.5, 4))
@settings(max_examples=60, deadline=None)
def test_over_any_sequence_of_chunks_acceleration_and_limits_hold(events, period_s, height, speed):
    limits = msgspec.structs.replace(LIMITS, max_speed_m_s=speed)
    flight = Flight(limits=limits, position=np.array([0.0, 0.0, height]))
    for actions, ticks, age_s in events:
        flight.send(actions, age_s=age_s)
        flight.fly(ticks * period_s, period_s)
    assert flight.accelerations().max(initial=0.0) <= limits.max_acceleration_m_s2 + 1e-6
    for _, setpoint, position in flight.ticks:
        x, y, z = setpoint.velocity_m_s
        assert math.hypot(x, y) <= limits.max_speed_m_s + 1e-9
        assert -limits.max_descent_m_s - 1e-9 <= z <= limits.max_climb_m_s + 1e-9
        assert abs(setpoint.yaw_rate_rad_s) <= limits.max_yaw_rate_rad_s + 1e-9
        assert AllowedVelocities.at(position, limits).contains(np.array(setpoint.velocity_m_s))
        assert position[2] >= limits.min_height_m - 1e-6
        assert np.all(position >= np.array(limits.geofence_min_m) - 1e-6)
        assert np.all(position <= np.array(limits.geofence_max_m) + 1e-6)


@given(chunk=_chunks, period_s=st.floats(0.02, 0.05))
@settings(max_examples=40, deadline=None)
def test_a_chunk_that_is_used_up_ends_in_a_hold_within_100_ms_and_stays_there(chunk, period_s):
    flight = Flight()
    flight.send(chunk)
    setpoints = flight.fly(3.9, period_s)
    first = next((index for index, setpoint in enumerate(setpoints) if setpoint.reason == "the chunk is used up"), None)
    if first is None:  # not done when it became too old: a chunk that the limits slow down
        return
    setpoints += flight.fly(0.3, period_s)
    held_from = next(index for index in range(first, len(setpoints)) if setpoints[index].velocity_m_s == _ZERO)
    assert (held_from - first) * period_s <= 0.1
    assert all(setpoint.velocity_m_s == _ZERO and setpoint.mode == "hold" for setpoint in setpoints[held_from:])


@pytest.mark.parametrize("turn_deg", [0.0, 3.0, -3.0])
def test_a_flown_chunk_ends_where_its_actions_lead(turn_deg):
    flight = Flight(yaw=0.7)
    chunk = forward_chunk(turn_deg=turn_deg)
    start = [*position_from_ros(flight.position), 0.0, yaw_from_ros(flight.yaw), 0.0]
    flight.send(chunk)
    flight.fly(3)
    end = integrate_actions(np.array(start), chunk)[-1]
    assert np.linalg.norm(flight.position - position_to_ros(end[:3])) < 0.05
    assert abs(flight.yaw - yaw_to_ros(end[4])) < 0.05
    assert flight.ticks[-1][1].progress == 16


@pytest.mark.parametrize("limit", [0.2, 2.0, 20.0, 90.0])
@pytest.mark.parametrize(("cm", "count"), [(5.0, 16), (90.0, 2)])
def test_a_chunk_is_used_up_where_it_ends_however_loose_or_tight_the_limits_are(limit, cm, count):
    limits = msgspec.structs.replace(LIMITS, max_acceleration_m_s2=limit, max_yaw_acceleration_rad_s2=limit)
    config = SetpointConfig(stale_after_s=30.0)
    flight = Flight(limits=limits, config=config, effort=0.7)
    flight.send(forward_chunk(cm, count=count))
    end = cm / 100 * count
    while flight.tick().reason != "the chunk is used up":
        assert flight.now_s < 120
    assert flight.position[0] == pytest.approx(end, abs=0.11)
    assert flight.accelerations().max() <= limit + 1e-6


def test_two_chunks_are_flown_as_one_motion_when_the_second_is_there_in_time():
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(0.75)
    flight.send(forward_chunk(), age_s=0.0)
    speeds = [setpoint.velocity_m_s[0] for setpoint in flight.fly(0.5)]
    assert min(speeds) > 0.6
    assert flight.accelerations().max() <= LIMITS.max_acceleration_m_s2 + 1e-6


def test_what_was_flown_since_the_frame_was_taken_is_not_flown_twice():
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(0.75)
    here = flight.position[0]
    flight.fly(0.25)
    flight.send(forward_chunk(), age_s=0.25)  # planned from where the drone was then
    assert flight.tick().progress == pytest.approx((flight.position[0] - here) / 0.05, abs=1)
    flight.fly(3)
    assert flight.position[0] == pytest.approx(here + 0.8, abs=0.05)


@pytest.mark.parametrize("yaw_deg", [0.0, 90.0])
def test_forward_is_where_the_drone_looks(yaw_deg):
    flight = Flight(yaw=math.radians(yaw_deg))
    flight.send(forward_chunk())
    flight.fly(0.5)
    x, y, z = flight.ticks[-1][1].velocity_m_s
    assert math.degrees(math.atan2(y, x)) == pytest.approx(yaw_deg, abs=0.1)
    assert z == pytest.approx(0, abs=1e-9)


def _flying() -> Flight:
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(0.5)
    assert flight.ticks[-1][1].mode == "fly"
    return flight


def test_a_policy_that_falls_silent_means_hold_within_100_ms_and_silence_within_600_ms():
    flight = _flying()
    fell_silent_s = flight.now_s
    setpoints = flight.fly(1.0, alive=False)
    times = [now_s - fell_silent_s for now_s, _, _ in flight.ticks[-len(setpoints) :]]
    held_s = next(time for time, setpoint in zip(times, setpoints, strict=True) if setpoint.mode == "hold")
    silent_s = next(time for time, setpoint in zip(times, setpoints, strict=True) if setpoint.mode == "silent")
    assert held_s <= 0.1
    assert 0.5 < silent_s <= 0.6
    assert all(setpoint.velocity_m_s == _ZERO for time, setpoint in zip(times, setpoints, strict=True) if time > 0.1)
    assert (setpoints[-1].reason, setpoints[-1].mode) == ("the policy is gone", "silent")


def test_a_short_silence_is_flown_on_after_a_long_one_a_new_chunk_is_needed():
    flight = _flying()
    assert flight.fly(0.2, alive=False)[-1].reason == "the policy does not answer"
    assert flight.tick().mode == "fly"
    flight.fly(0.7, alive=False)
    assert flight.tick().reason == "no chunk"
    flight.send(forward_chunk())
    assert flight.tick().mode == "fly"


def test_before_a_policy_has_come_nothing_is_published():
    flight = Flight()
    assert {setpoint.mode for setpoint in flight.fly(1, alive=False)} == {"silent"}
    assert flight.ticks[-1][1].reason == "no policy has connected yet"


def test_a_policy_whose_clock_runs_ahead_is_not_alive_for_ever():
    flight = _flying()
    flight.logic.policy_alive(flight.now_s + 1000, flight.now_s)
    assert flight.fly(1, alive=False)[-1].mode == "silent"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_odometry_that_is_not_finite_means_hold_at_once_until_it_is_finite_again(bad):
    flight = _flying()
    flight.logic.odometry(np.array([0.0, bad, 3.0]), 0.0, flight.now_s)
    setpoint = flight.tick(odometry=False)
    assert (setpoint.mode, setpoint.velocity_m_s, setpoint.reason) == ("hold", _ZERO, "odometry is not finite")
    assert flight.tick().mode == "fly"


def test_odometry_that_stops_means_hold():
    flight = _flying()
    setpoints = flight.fly(0.3, odometry=False)
    assert setpoints[-1].mode == "hold"
    assert "odometry is 0.3" in setpoints[-1].reason
    silent = SetpointLogic(SetpointConfig(), LIMITS)
    silent.policy_alive(1.0, 1.0)
    assert silent.tick(1.0).reason == "no odometry yet"


def test_a_stale_chunk_is_not_flown():
    flight = _flying()
    flight.fly(4)
    assert flight.send(forward_chunk(count=100), age_s=3.9) is None
    assert flight.tick().mode == "fly"
    stale = next(setpoint for setpoint in flight.fly(0.2) if setpoint.mode == "hold")
    assert (stale.reason, stale.velocity_m_s) == ("the chunk is stale", _ZERO)
    assert flight.tick().reason == "no chunk"


def test_stop_holds_at_once():
    flight = _flying()
    flight.logic.stop()
    setpoint = flight.tick()
    assert (setpoint.mode, setpoint.velocity_m_s, setpoint.reason) == ("hold", _ZERO, "no chunk")


def test_the_operators_stop_is_not_undone_by_chunks_until_the_flight_is_over():
    flight = _flying()
    flight.logic.halt()
    assert flight.send(forward_chunk()) == "the flight was stopped by a command"
    assert {setpoint.velocity_m_s for setpoint in flight.fly(0.5)} == {_ZERO}
    assert flight.logic.faults.names == ()
    flight.logic.stop()
    assert flight.send(forward_chunk()) is None
    assert flight.tick().mode == "fly"


def test_another_policy_process_numbers_its_chunks_anew():
    flight = _flying()
    flight.logic.halt()
    flight.logic.policy_restarted()
    assert flight.tick().velocity_m_s == _ZERO
    assert flight.logic.chunk(1, forward_chunk(), fps=16, seen_s=flight.now_s, now_s=flight.now_s) is None
    assert flight.tick().mode == "fly"


def test_an_old_chunk_is_ignored():
    flight = _flying()
    answer = flight.logic.chunk(1, forward_chunk(), fps=16, seen_s=flight.now_s, now_s=flight.now_s)
    assert answer == "chunk 1 is not newer than chunk 1"
    assert flight.tick().mode == "fly"


def test_a_chunk_whose_frame_is_older_than_the_odometry_is_refused_and_is_no_fault():
    flight = _flying()
    assert flight.send(forward_chunk(), age_s=30) == "there is no odometry for the moment at which its frame was taken"
    assert flight.logic.faults.names == ()


@pytest.mark.parametrize(
    ("actions", "changes", "text"),
    [
        (np.full((16, 6), np.nan), {}, "holds numbers that are not finite"),
        (np.zeros((16, 5)), {}, "has the shape (16, 5), not [N, 6]"),
        (np.zeros((0, 6)), {}, "has the shape (0, 6), not [N, 6]"),
        (forward_chunk(150), {}, "moves 1.50 m in one action; 1 m are allowed"),
        (forward_chunk(turn_deg=200), {}, "turns by 200 deg in one action; 180 are allowed"),
        (forward_chunk(turn_deg=1e308), {}, "turns by 1e+308 deg in one action; 180 are allowed"),
        (forward_chunk(), {"fps": 0.0}, "counts 0 actions a second"),
        (forward_chunk(), {"age_s": -1.0}, "rests on a frame from the future"),
    ],
)
def test_actions_that_no_sane_policy_sends_are_latched(actions, changes, text):
    flight = _flying()
    assert flight.send(actions, **changes) == text
    setpoint = flight.tick()
    assert (setpoint.mode, setpoint.velocity_m_s, setpoint.reason) == ("hold", _ZERO, "latched: bad_chunk")
    assert f"bad_chunk: chunk 2 {text}" in flight.logic.faults.diagnostic.message
    assert "then send a reset" in flight.logic.faults.diagnostic.what_to_do


def test_a_jump_of_the_odometry_is_latched():
    flight = _flying()
    flight.position = flight.position + np.array([3.0, 0, 0])
    assert flight.tick().reason == "latched: odometry_jump"


def test_a_heading_that_the_estimator_resets_is_latched_as_a_jump():
    flight = _flying()
    flight.yaw += 0.7
    assert flight.tick().reason == "latched: odometry_jump"
    assert flight.ticks[-1][1].velocity_m_s == _ZERO


def test_a_pilot_who_turns_the_drone_quickly_is_no_jump():
    flight = _flying()
    for _ in range(40):
        flight.yaw += 3.0 * 0.025
        flight.tick()
    assert flight.logic.faults.names == ()


def test_a_drone_outside_of_the_geofence_is_latched_and_a_reset_out_there_latches_again():
    flight = Flight(position=np.array([20.6, 0, 3]))
    flight.send(forward_chunk())
    assert flight.tick().reason == "latched: geofence"
    assert flight.logic.reset() == ("geofence",)
    assert flight.tick().reason == "latched: geofence"


@given(after=st.lists(st.sampled_from(["chunk", "tick", "stop", "restart", "silence"]), max_size=30))
@settings(max_examples=50, deadline=None)
def test_a_latched_fault_stays_whatever_follows_and_reset_ends_it(after):
    flight = _flying()
    flight.send(np.full((16, 6), np.nan))
    steps = {
        "chunk": lambda: flight.send(forward_chunk()),
        "tick": flight.tick,
        "stop": flight.logic.stop,
        "restart": flight.logic.policy_restarted,
        "silence": lambda: flight.fly(0.6, alive=False),
    }
    for name in after:
        steps[name]()
        assert flight.tick().reason == "latched: bad_chunk"
        assert flight.ticks[-1][1].velocity_m_s == _ZERO
    assert flight.logic.reset() == ("bad_chunk",)
    assert flight.logic.faults.diagnostic.message == "no fault"
    assert flight.tick().reason == "no chunk"
    flight.send(forward_chunk())
    assert flight.tick().mode == "fly"


def test_progress_waits_for_a_drone_that_cannot_follow():
    flight = Flight()
    flight.send(forward_chunk(10))
    for _ in range(100):
        flight.now_s += 0.025
        flight.logic.odometry(flight.position, 0.0, flight.now_s)
        flight.logic.policy_alive(flight.now_s, flight.now_s)
        setpoint: Setpoint = flight.logic.tick(flight.now_s)
    assert setpoint.mode == "fly"
    assert setpoint.progress < 11  # a metre ahead is as far as it goes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rate_hz": 60.0}, "setpoint.rate_hz must be 20 to 50, found 60"),
        (
            {"rate_hz": 20.0, "hold_after_s": 0.06},
            "are more than the 0.1 s within which a hold must begin; shorten hold_after_s or raise",
        ),
        ({"silent_after_s": 0.7}, "silent_after_s must be over hold_after_s (0.05) and at most 0.5, found 0.7"),
        ({"realtime_priority": 100}, "setpoint.realtime_priority must be 0 to 99, found 100"),
        ({"stale_after_s": 0.0}, "setpoint.stale_after_s must be over 0 and below 60, found 0"),
        ({"correction_gain": 9.0}, "setpoint.correction_gain must be 0 to 5, found 9"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, text):
    with pytest.raises(SetpointConfigError) as refusal:
        SetpointConfig(**changes)
    assert text in str(refusal.value)
