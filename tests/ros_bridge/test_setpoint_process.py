"""The loop around the setpoint logic, with a real line to a policy."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_port import MemoryPort
from setpoint_flights import LIMITS, forward_chunk

from worldvln_edge.ros_bridge.diagnostics import Level
from worldvln_edge.ros_bridge.setpoints import punctuality
from worldvln_edge.ros_bridge.setpoints.loop_timing import LoopTiming
from worldvln_edge.ros_bridge.setpoints.policy_link import Alive, Chunk, LinkListener, PolicyLink, Progress, Stop
from worldvln_edge.ros_bridge.setpoints.punctuality import RealtimePriorityError, become_punctual
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_logic import SetpointLogic
from worldvln_edge.ros_bridge.setpoints.setpoint_process import SetpointProcess

_STILL = ((0.0, 0.0, 0.0), 0.0)


class Desk:
    """A setpoint process in a thread, a policy that beats, and odometry that stands still."""

    def __init__(self, folder: Path):
        self.port = MemoryPort()
        self.listener = LinkListener(folder / "line.sock")
        self.process = SetpointProcess(SetpointLogic(SetpointConfig(), LIMITS), self.port, self.listener)
        self.is_alive, self.position = True, (0.0, 0.0, 3.0)
        self.reports: list[Progress] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=target) for target in (self.process.run, self._live)]

    def __enter__(self) -> "Desk":
        self._threads[0].start()
        self.link = PolicyLink(self.listener.path)
        self._threads[1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._threads[1].join()
        self.process.stop()
        self._threads[0].join()
        self.link.close()
        self.listener.close()

    def send_chunk(self, number: int, cm: float = 5.0, age_s: float = 0.0) -> None:
        actions = [tuple(action) for action in forward_chunk(cm).tolist()]
        seen_ns = time.monotonic_ns() - int(age_s * 1e9)
        self.link.send(Chunk(number=number, actions=actions, fps=16.0, seen_ns=seen_ns))

    def wait(self, is_so: Callable[[], object]) -> None:
        give_up_s = time.monotonic() + 10
        while not is_so():
            assert time.monotonic() < give_up_s, (self.reports[-3:], self.port.checks)
            time.sleep(0.005)

    def _live(self) -> None:
        while not self._stopping.wait(0.005):
            self.port.show_odometry(*self.position)
            if self.is_alive:
                self.link.send(Alive(seen_ns=time.monotonic_ns()))
            while (report := self.link.receive(0.0)) is not None:
                self.reports.append(report)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Desk(tmp_path) as desk:
        desk.wait(lambda: desk.reports and desk.reports[-1].reason == "no chunk")  # policy and odometry are there
        yield desk


def test_a_chunk_is_flown_reported_and_its_path_published(desk):
    desk.send_chunk(1)
    desk.wait(lambda: desk.reports[-1].progress > 2)  # holds between, where this machine is late with a heartbeat
    assert desk.reports[-1].chunk == 1
    assert "fly" in {report.mode for report in desk.reports}
    assert desk.port.paths[0].shape == (17, 4)
    assert max(velocity[0] for velocity, _ in desk.port.setpoints) > 0
    desk.link.send(Stop())
    desk.wait(lambda: desk.reports[-1].reason == "no chunk")
    desk.wait(lambda: desk.port.setpoints[-1] == _STILL)  # the report goes first


def test_setpoints_path_and_chunk_are_announced_before_anything_is_published(tmp_path):
    port, listener = MemoryPort(), LinkListener(tmp_path / "line.sock")
    SetpointProcess(SetpointLogic(SetpointConfig(), LIMITS), port, listener)
    listener.close()
    assert port.is_announced
    assert (port.setpoints, port.paths) == ([], [])


def test_after_a_stop_by_command_no_chunk_of_that_flight_is_flown(desk):
    desk.send_chunk(1)
    desk.wait(lambda: desk.reports[-1].progress > 1)
    desk.port.receive["command"]("stop")
    desk.wait(lambda: desk.reports[-1].reason == "no chunk")
    before = len(desk.port.setpoints)
    desk.send_chunk(2)  # of a policy that has not heard the stop
    desk.wait(lambda: "chunk 2 is not flown: the flight was stopped" in desk.port.checks["setpoint/chunk"].message)
    assert not any(any(velocity) for velocity, _ in desk.port.setpoints[before:])
    desk.link.send(Stop())
    desk.send_chunk(3)
    desk.wait(lambda: desk.reports[-1].progress > 1)
    assert desk.reports[-1].chunk == 3


def test_without_heartbeats_nothing_is_published_and_the_diagnostic_says_so(desk):
    desk.is_alive = False
    desk.wait(lambda: desk.reports[-1].mode == "silent")
    published = len(desk.port.setpoints)
    expected = "no setpoints: the policy is gone; start the policy, or look into its log"
    desk.wait(lambda: desk.port.checks["setpoint/mode"].text == expected)
    assert desk.port.checks["setpoint/mode"].level == Level.ERROR
    assert len(desk.port.setpoints) == published


def test_a_latched_fault_is_reported_until_the_operator_resets_it(desk, caplog):
    desk.send_chunk(1, cm=500)
    desk.wait(lambda: desk.reports[-1].faults == ("bad_chunk",))
    desk.wait(lambda: desk.port.checks["setpoint/faults"].level == Level.ERROR)
    assert "chunk 1 is not flown: moves 5.00 m in one action" in desk.port.checks["setpoint/chunk"].message
    desk.port.receive["command"]("rest")
    desk.port.receive["command"]("reset")
    desk.wait(lambda: desk.reports[-1].faults == ())
    assert "command 'rest' is not known; send stop or reset" in caplog.text
    assert "reset by command: bad_chunk" in caplog.text


def test_a_chunk_of_a_moment_without_odometry_is_refused_with_a_diagnostic(desk):
    desk.send_chunk(1, age_s=3.0)
    desk.wait(lambda: desk.port.checks["setpoint/chunk"].level == Level.ERROR)
    assert "there is no odometry for the moment" in desk.port.checks["setpoint/chunk"].message
    assert desk.reports[-1].faults == ()


def test_odometry_that_is_not_finite_holds(desk):
    desk.send_chunk(1)
    desk.wait(lambda: "fly" in {report.mode for report in desk.reports})
    desk.position = (float("nan"), 0.0, 3.0)
    desk.wait(lambda: desk.reports[-1].reason == "odometry is not finite")
    desk.wait(lambda: desk.port.setpoints[-1] == _STILL)
    desk.wait(lambda: desk.port.checks["setpoint/mode"].message == "hold: odometry is not finite")
    assert desk.port.checks["setpoint/mode"].level == Level.WARN


def test_lateness_and_rate_are_those_of_the_ticks():
    timing = LoopTiming(20.0)
    assert timing.diagnostic.message.startswith("0.0 of 20 setpoints a second")
    for tick in range(100):
        timing.add(tick * 50_000_000, tick * 50_000_000 + 2_000_000)
    assert timing.rate_hz == pytest.approx(20)
    assert timing.late_ms(99) == pytest.approx(2)
    assert timing.diagnostic.level == Level.OK
    for tick in range(100, 120):
        timing.add(tick * 50_000_000, tick * 50_000_000 + 30_000_000)
    assert "99 of 100 at most 30.0 ms late; give the setpoint process a core of its own" in timing.diagnostic.text


def test_a_real_time_priority_that_is_not_allowed_says_how_it_may_be(monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(punctuality.gc, "freeze", lambda: None)
    become_punctual(0)
    with pytest.raises(
        RealtimePriorityError, match=r"priority 50 is not allowed here \(Operation not permitted\); start"
    ):
        become_punctual(50)
