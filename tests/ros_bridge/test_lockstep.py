"""With a simulator that waits: the same flight on any machine, however long the server plans and whatever is lost."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="flies against a server, which needs the extra serve")

from forward_server import ForwardPolicy
from lockstep_desk import TOPICS, LockstepDesk

from worldvln_edge.ros_bridge import policy_node
from worldvln_edge.ros_bridge.ports.messages import ns_of_time
from worldvln_edge.ros_bridge.simulation.simulated_flights import SimulatedFlight, flight_line
from worldvln_edge.ros_bridge.simulation.world import WorldStoppedError
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.tasks import Task

TASK = Task(task_id="ahead", instruction="Fly ahead.", initial_pos=(0, 0, 300, 0, 0, 0), end_pos=(240, 0, 300, 0, 0, 0))
ASIDE = Task(task_id="aside", instruction="Fly on.", initial_pos=(900, 500, 400, 0, 90, 0), end_pos=(0, 0, 0, 0, 0, 0))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with BackgroundServer(ForwardPolicy()) as server:
        yield server.url


@pytest.fixture
def desk(tmp_path: Path, url: str) -> Iterator[LockstepDesk]:
    desk = LockstepDesk(tmp_path, url)
    yield desk
    desk.close()


def _fly(folder: Path, infer_s: float) -> SimulatedFlight:
    with BackgroundServer(ForwardPolicy(infer_s=infer_s)) as server:
        desk = LockstepDesk(folder, server.url)
        desk.start_policy()
        try:
            return desk.flights.fly(TASK)
        finally:
            desk.close()


def test_a_task_is_flown_to_where_the_actions_lead(desk):
    desk.start_policy()
    flight = desk.flights.fly(TASK)
    assert flight.is_flown
    assert flight.success
    assert flight.outcome == "flown: Fly ahead."
    assert flight.final_distance_m < 0.05  # 48 actions of 5 cm
    assert 3.0 < flight.flown_s < 5.0
    assert flight_line(flight).startswith("ahead  success, 0.0")


def test_the_world_waits_however_long_the_server_plans(tmp_path):
    (tmp_path / "quick").mkdir()
    (tmp_path / "slow").mkdir()
    quick, slow = _fly(tmp_path / "quick", 0.0), _fly(tmp_path / "slow", 0.5)
    assert slow.wall_s > 1.5
    assert slow.flown_s == pytest.approx(
        quick.flown_s, abs=0.06
    )  # how it ends is said at the next step or the one after
    assert slow.final_pose == pytest.approx(quick.final_pose, abs=1e-6)


def test_after_a_jump_to_the_next_start_the_next_task_is_flown(desk):
    desk.start_policy()
    assert desk.flights.fly(TASK).success
    flight = desk.flights.fly(ASIDE)
    assert flight.is_flown
    assert not flight.success
    assert flight.final_pose == pytest.approx((900, 740, 400, 0, 90, 0), abs=5)
    assert "miss" in flight_line(flight)


def test_flights_that_cannot_begin_are_told_apart(tmp_path):
    desk = LockstepDesk(tmp_path, "ws://127.0.0.1:9")
    desk.start_policy()
    try:
        flights = [desk.flights.fly(TASK) for _ in range(2)]
    finally:
        desk.close()
    assert not any(flight.is_flown for flight in flights)
    assert "broken off (the server ended the flight: no worldvln-edge server answers" in flight_line(flights[1])


def test_what_is_lost_on_the_way_is_shown_and_answered_again(desk):
    lost = {TOPICS.image: 60, TOPICS.odometry: 70, "/clock": 80, TOPICS.setpoint: 90}
    desk.topics.loses = lambda topic, number: lost.get(topic) == number
    desk.start_policy()
    assert desk.flights.fly(TASK).success


def test_without_a_policy_the_world_goes_on_and_setpoints_are_silent(desk):
    desk.drone.reset(TASK)
    for _ in range(40):
        desk.world.step()
    assert desk.world.lived_s == pytest.approx(1.0)
    assert TOPICS.setpoint not in desk.topics.published
    stamps = [ns_of_time(message.clock) for message in desk.topics.published[TOPICS.step_done]]
    assert stamps == sorted(stamps)
    assert len(set(stamps)) == 40


def test_when_the_policy_ends_setpoints_hold_and_then_fall_silent(desk):
    desk.start_policy()
    assert desk.flights.fly(TASK).success
    desk.end_policy()
    before = len(desk.topics.published[TOPICS.setpoint])
    for _ in range(40):
        desk.world.step()
    held = desk.topics.published[TOPICS.setpoint][before:]
    assert 0 < len(held) < 25  # 0.5 s
    assert all(message.twist.linear.x == 0 for message in held)


def test_a_simulator_that_starts_anew_is_followed(desk):
    desk.start_policy()
    assert desk.flights.fly(TASK).success
    desk.start_simulator()
    assert desk.flights.fly(ASIDE).is_flown


def test_setpoint_process_that_sees_the_clock_go_back_after_the_policy_was_ready_is_told_again(desk, monkeypatch):
    """The policy may be quicker than the setpoint process, which then forgets that it is ready."""
    desk.start_policy()
    assert desk.flights.fly(TASK).success
    take_clocks = desk.setpoints._take_clocks

    def take_clocks_late() -> None:
        if desk.setpoints._clocks and desk.setpoints._clocks[0] < desk.setpoints._done_ns:
            give_up_s = time.monotonic() + 20
            while desk.setpoints._ready_ns != desk.setpoints._clocks[0] and time.monotonic() < give_up_s:
                desk.setpoints._listen()
                time.sleep(0.01)
        take_clocks()

    monkeypatch.setattr(desk.setpoints, "_take_clocks", take_clocks_late)
    desk.start_simulator()
    assert desk.flights.fly(ASIDE).is_flown


def test_a_simulator_that_stands_still_ends_the_flight_and_is_named(desk, monkeypatch):
    desk.start_policy()
    desk.flights.stand(TASK)
    desk.simulated.instruct(TASK.instruction)
    began_s = desk.world.lived_s
    while not desk.simulated.velocity_4.any():
        assert desk.world.lived_s < began_s + 5, desk.policy.diagnostics(0.0)[0].text
        desk.world.step()
    monkeypatch.setattr(policy_node, "_STUCK_S", 0.3)  # not before: a busy machine stands still for as long
    give_up_s = time.monotonic() + 60
    while "the simulator has not gone on for 0.3 s; see its log" not in desk.policy.diagnostics(0.0)[0].text:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_a_world_that_nobody_answers_can_be_stopped(desk):
    desk.topics.loses = lambda topic, number: topic == "/clock"
    desk.drone.reset(TASK)
    threading.Timer(0.2, desk.world.stop).start()
    with pytest.raises(WorldStoppedError):
        desk.world.step()
