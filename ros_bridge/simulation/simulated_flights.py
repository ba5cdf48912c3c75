"""Tasks flown through the topics: stand at the start, say the instruction, wait for the end, look where that is."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np

from worldvln_edge.poses import wrap_deg
from worldvln_edge.ros_bridge.diagnostics import Level
from worldvln_edge.ros_bridge.flight import FLIGHT, flown, is_flying
from worldvln_edge.ros_bridge.setpoints.fault_latch import CHECK as FAULTS
from worldvln_edge.ros_bridge.simulation.simulated_drone import SimulatedDrone
from worldvln_edge.ros_bridge.simulation.simulator_topics import SimulatorTopics
from worldvln_edge.ros_bridge.simulation.world import World
from worldvln_edge.tasks import Task

_SETTLE_S = 0.5
_AGAIN_S = 1.0
_ANSWER_S = 60.0
_FLIGHT_S = 600.0


class BridgeSilentError(TimeoutError):
    """The bridge did not do what it should. The message says what was waited for."""


class SimulatedFlight(msgspec.Struct, frozen=True, kw_only=True):
    """How one flight ended. Times are of the world unless they are called wall."""

    task_id: str
    instruction: str
    is_flown: bool
    """To its end, as the bridge says."""
    outcome: str
    """The bridge's words."""
    success: bool | None
    """By the task's rule; None where the task has no end."""
    final_distance_m: float | None
    final_yaw_error_deg: float | None
    collided: bool
    final_pose: tuple[float, ...]
    """cm and deg."""
    flown_s: float
    wall_s: float
    real_time_factor: float
    """Of this flight: `flown_s / wall_s`."""


class SimulatedFlights:
    """
    Args:
        drone, topics, world: of one simulator.
    """

    def __init__(self, drone: SimulatedDrone, topics: SimulatorTopics, world: World):
        self._drone, self._topics, self._world = drone, topics, world

    def stand(self, task: Task) -> None:
        """Put the drone at the task's start, and have the bridge forget that it jumped there.

        Raises:
            BridgeSilentError: no bridge answers.
            SimulatorError, WorldStoppedError.
        """
        self._drone.reset(task)
        self._step_for(_SETTLE_S)
        self._wait(self._topics.has_listeners, "a bridge that reads instructions and commands", _ANSWER_S)
        since_ns = self._world.now_ns
        told_s = -_AGAIN_S

        def is_reset() -> bool:
            nonlocal told_s
            if self._world.lived_s - told_s >= _AGAIN_S:
                told_s = self._world.lived_s
                self._topics.command("reset")
            check = self._topics.check_since(FAULTS, since_ns)
            return check is not None and check[0] == Level.OK

        self._wait(is_reset, "a setpoint process without faults", _ANSWER_S)
        self._wait(lambda: self._topics.check_since(FLIGHT, 0) is not None, "a policy process", _ANSWER_S)

    def fly(self, task: Task) -> SimulatedFlight:
        """Fly a task from its start. Raises as `stand`."""
        self.stand(task)
        began_s, lived_s = time.monotonic(), self._world.lived_s
        begun = self._topics.flights_begun
        self._topics.instruct(task.instruction)
        self._wait(lambda: self._topics.flights_begun > begun, f"the flight of {task.instruction!r}", _ANSWER_S)
        self._wait(lambda: not self._is_flying(), f"the end of {task.instruction!r}", _FLIGHT_S)
        wall_s, flown_s = time.monotonic() - began_s, self._world.lived_s - lived_s
        check = self._topics.check_since(FLIGHT, 0)
        assert check is not None, "the flight is over because a check said so"
        pose = self._drone.view.pose
        distance = yaw_error = success = None
        if task.end_pos is not None:
            distance = float(np.linalg.norm(pose[:3] - np.array(task.end_pos[:3]))) / 100
            yaw_error = abs(float(wrap_deg(pose[4] - task.end_pos[4])))
            is_near = distance <= task.success.position_m and yaw_error <= task.success.yaw_deg
            success = is_near and not self._drone.has_collided
        return SimulatedFlight(
            task_id=task.task_id,
            instruction=task.instruction,
            is_flown=check[1] == flown(task.instruction).message,
            outcome=check[1],
            success=success,
            final_distance_m=distance,
            final_yaw_error_deg=yaw_error,
            collided=self._drone.has_collided,
            final_pose=tuple(float(value) for value in pose),
            flown_s=flown_s,
            wall_s=wall_s,
            real_time_factor=flown_s / wall_s,
        )

    def _is_flying(self) -> bool:
        check = self._topics.check_since(FLIGHT, 0)
        return check is not None and is_flying(check[1])

    def _step_for(self, seconds: float) -> None:
        until_s = self._world.lived_s + seconds
        while self._world.lived_s < until_s:
            self._world.step()

    def _wait(self, is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > give_up_s:
                raise BridgeSilentError(f"waited {timeout_s:g} s for {what}; see the log of `worldvln-edge ros run`")
            self._world.step()


def flight_line(flight: SimulatedFlight) -> str:
    """One line for people."""
    words = {True: "success", False: "miss", None: "flown"}
    where = (
        ""
        if flight.final_distance_m is None
        else f", {flight.final_distance_m:.2f} m and {flight.final_yaw_error_deg:.0f} deg from the end"
    )
    hit = ", collided" if flight.collided else ""
    how = words[flight.success] if flight.is_flown else f"broken off ({flight.outcome})"
    return (
        f"{flight.task_id}  {how}{where}{hit}; {flight.flown_s:.1f} s in {flight.wall_s:.1f} s, real-time factor "
        f"{flight.real_time_factor:.2f}"
    )
