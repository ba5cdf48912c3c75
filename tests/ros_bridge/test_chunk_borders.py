"""From one chunk to the next: bounded changes whatever comes when, no stop when the next one is there in time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from setpoint_flights import LIMITS, Flight, forward_chunk

_ZERO = (0.0, 0.0, 0.0)
_action = st.tuples(*[st.floats(-30, 30)] * 3, st.just(0.0), st.floats(-25, 25), st.just(0.0))
_chunk = st.lists(_action, min_size=1, max_size=16).map(np.array)
_border = st.tuples(_chunk, st.floats(0.02, 1.6), st.floats(0, 0.4), st.sampled_from([8.0, 16.0, 30.0]))


@given(
    borders=st.lists(_border, min_size=2, max_size=5),
    jitter=st.lists(st.floats(0.5, 1.6), min_size=1, max_size=7),
    period_s=st.floats(0.02, 0.05),
)
@settings(max_examples=40, deadline=None)
def test_velocity_and_yaw_rate_change_within_bounds_whatever_chunk_follows_when(borders, jitter, period_s):
    flight = Flight()
    for chunk, seconds, age_s, fps in borders:
        flight.send(chunk, age_s=age_s, fps=fps)
        end_s, tick = flight.now_s + seconds, 0
        while flight.now_s < end_s:
            flight.tick(period_s * jitter[tick % len(jitter)])
            tick += 1
    assert flight.accelerations().max(initial=0.0) <= LIMITS.max_acceleration_m_s2 + 1e-6
    for (before_s, before, _), (now_s, now, _) in zip(flight.ticks, flight.ticks[1:], strict=False):
        if now.mode == "fly":
            change = abs(now.yaw_rate_rad_s - before.yaw_rate_rad_s) / min(now_s - before_s, 0.1)
            assert change <= LIMITS.max_yaw_acceleration_rad_s2 + 1e-6


@given(
    borders=st.lists(st.tuples(_chunk, st.floats(0.02, 1.0)), min_size=1, max_size=4),
    lost=st.sampled_from(["policy", "odometry", "fault", "stop"]),
    period_s=st.floats(0.02, 0.05),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_lost_wherever_in_a_chunk_the_drone_holds_within_100_ms(borders, lost, period_s):
    flight = Flight()
    for chunk, seconds in borders:
        flight.send(chunk)
        flight.fly(seconds, period_s)
    lost_s = flight.now_s
    if lost == "fault":
        flight.send(np.full((16, 6), np.nan))
    elif lost == "stop":
        flight.logic.stop()
    elif lost == "odometry":
        flight.logic.odometry(np.full(3, np.nan), 0.0, flight.now_s)
    flight.fly(0.4, period_s, alive=lost != "policy", odometry=lost != "odometry")
    late = [setpoint for now_s, setpoint, _ in flight.ticks if now_s > lost_s + 0.1]
    assert all(setpoint.velocity_m_s == _ZERO and setpoint.mode != "fly" for setpoint in late)


@pytest.mark.parametrize("rate_hz", [20, 40])
@pytest.mark.parametrize("flown_s", [0.5, 0.8, 1.0, 1.2])
@pytest.mark.parametrize("turn_deg", [0.0, 2.5, -2.5])
def test_the_next_chunk_takes_over_at_the_speed_of_its_arrival(rate_hz, flown_s, turn_deg):
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(flown_s, 1 / rate_hz)
    assert flight.ticks[-1][1].mode == "fly", "the first chunk is not used up yet"
    speed = min(np.linalg.norm(flight.ticks[-1][1].velocity_m_s), 0.8)  # beyond, it catches up with its path
    flight.send(forward_chunk(turn_deg=turn_deg))
    after = flight.fly(0.6, 1 / rate_hz)
    assert {setpoint.mode for setpoint in after} == {"fly"}
    assert min(np.linalg.norm(setpoint.velocity_m_s) for setpoint in after) >= speed - 0.05
    assert flight.accelerations().max() <= LIMITS.max_acceleration_m_s2 + 1e-6


def test_a_bend_that_is_sharper_than_the_yaw_limit_is_flown_as_fast_as_that_limit_lets_it():
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(0.8)
    flight.send(forward_chunk(turn_deg=5.0))
    after = flight.fly(0.8)
    fastest = 0.05 * LIMITS.max_yaw_rate_rad_s / np.radians(5.0)  # 5 cm for every 5 degrees
    assert min(np.linalg.norm(setpoint.velocity_m_s) for setpoint in after) >= fastest - 0.05
    assert after[-1].yaw_rate_rad_s == pytest.approx(-LIMITS.max_yaw_rate_rad_s)


def test_a_chunk_that_goes_back_is_entered_by_way_of_rest_within_bounds():
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(0.8)
    flight.send(forward_chunk(-5.0))
    after = flight.fly(1.2)
    assert after[-1].velocity_m_s[0] == pytest.approx(-0.8, abs=0.1)
    assert flight.accelerations().max() <= LIMITS.max_acceleration_m_s2 + 1e-6


def test_chunk_after_chunk_in_time_is_flown_at_full_speed_throughout():
    flight = Flight()
    for _ in range(8):
        flight.send(forward_chunk())
        flight.fly(0.5)
    speeds = [np.linalg.norm(setpoint.velocity_m_s) for now_s, setpoint, _ in flight.ticks if now_s > 101]
    assert min(speeds) == pytest.approx(0.8, abs=0.02)
    assert max(speeds) <= 0.82


def test_a_chunk_that_comes_late_finds_the_drone_at_rest_and_starts_within_bounds():
    flight = Flight()
    flight.send(forward_chunk())
    flight.fly(2.5)
    assert flight.ticks[-1][1].velocity_m_s == _ZERO
    flight.send(forward_chunk())
    assert max(np.linalg.norm(setpoint.velocity_m_s) for setpoint in flight.fly(0.8)) == pytest.approx(0.8, abs=0.03)
    assert flight.accelerations().max() <= LIMITS.max_acceleration_m_s2 + 1e-6
