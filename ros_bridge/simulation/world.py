"""How time goes on in the simulated world: when the bridge has answered, or with the clock on the wall.

A step: show clock, odometry and image; then fly the setpoint for the length of a step.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from worldvln_edge.ros_bridge.simulation.simulated_drone import STILL, SimulatedDrone
from worldvln_edge.ros_bridge.simulation.simulator_topics import SimulatorTopics

_log = logging.getLogger(__name__)
_NS = 1_000_000_000
_AGAIN_S = 0.5
_SETPOINT_LOST_NS = 500_000_000


class WorldStoppedError(RuntimeError):
    """Somebody has stopped the simulator."""


class World(Protocol):
    """
    Attributes:
        now_ns: its clock, which stamps images.
        lived_s: time that has passed in it.
    """

    now_ns: int
    lived_s: float

    def step(self) -> None:
        """Raises WorldStoppedError; SimulatorError."""
        ...

    def stop(self) -> None:
        """From any thread or signal: the next step is refused."""
        ...


class LockstepWorld:
    """The world waits at every step for a setpoint of this very moment, or for word that there is none.

    Args:
        step_s: the bridge's period, 1 / `setpoint.rate_hz`.
    """

    def __init__(self, drone: SimulatedDrone, topics: SimulatorTopics, step_s: float):
        self._drone, self._topics, self._step_ns = drone, topics, round(step_s * _NS)
        self._stopping = threading.Event()
        self.now_ns, self.lived_s = _NS, 0.0  # a stamp of 0 would be none

    def stop(self) -> None:
        self._stopping.set()

    def step(self) -> None:
        self._topics.show(self._drone, self.now_ns)
        asked_s, told_s = time.monotonic(), 0.0
        while not self._topics.wait_for_answer(self.now_ns, _AGAIN_S):
            if self._stopping.is_set():
                raise WorldStoppedError
            self._topics.show(self._drone, self.now_ns)  # it, or its answer, may have been lost
            if time.monotonic() - asked_s >= told_s + 10.0:
                told_s = time.monotonic() - asked_s
                _log.info("waiting for the bridge for %.0f s; it must run with topics.lockstep", told_s)
        if self._stopping.is_set():
            raise WorldStoppedError
        self._drone.fly(self._topics.velocity_4, self._step_ns / _NS)
        self.now_ns += self._step_ns
        self.lived_s += self._step_ns / _NS


class RealTimeWorld:
    """The world goes on with the clock on the wall, by equal steps; where this machine is too slow, it falls behind.

    Without setpoints for half a second the drone stands, as an autopilot's fail-safe would have it.
    """

    def __init__(self, drone: SimulatedDrone, topics: SimulatorTopics, step_s: float):
        self._drone, self._topics, self._step_s = drone, topics, step_s
        self._stopping = threading.Event()
        self._due_s = time.monotonic()
        self.now_ns, self.lived_s = time.time_ns(), 0.0

    def stop(self) -> None:
        self._stopping.set()

    def step(self) -> None:
        self._due_s = max(self._due_s + self._step_s, time.monotonic())
        if self._stopping.wait(self._due_s - time.monotonic()):
            raise WorldStoppedError
        self.now_ns = time.time_ns()
        is_led = self.now_ns - self._topics.answered_ns <= _SETPOINT_LOST_NS
        self._drone.fly(self._topics.velocity_4 if is_led else STILL, self._step_s)
        self.lived_s += self._step_s
        self._topics.show(self._drone, self.now_ns)
