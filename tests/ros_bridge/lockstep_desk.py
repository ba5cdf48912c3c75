"""Bridge and simulated world in one process, in lockstep over topics in memory; the drone is where actions lead."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from memory_wire import MemoryTopics, MemoryWire

from worldvln_edge.poses import apply_action
from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, ServerConfig
from worldvln_edge.ros_bridge.policy_node import PolicyNode
from worldvln_edge.ros_bridge.ports.message_port import MessagePort
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig
from worldvln_edge.ros_bridge.server_connection import server_client
from worldvln_edge.ros_bridge.setpoints.limits import LimitsConfig
from worldvln_edge.ros_bridge.setpoints.policy_link import LinkListener, PolicyLink
from worldvln_edge.ros_bridge.setpoints.setpoint_choice import setpoint_process
from worldvln_edge.ros_bridge.simulation.simulated_drone import SimulatedDrone
from worldvln_edge.ros_bridge.simulation.simulated_flights import SimulatedFlights
from worldvln_edge.ros_bridge.simulation.simulator_client import SimulatedView
from worldvln_edge.ros_bridge.simulation.simulator_topics import SimulatorTopics
from worldvln_edge.ros_bridge.simulation.world import LockstepWorld
from worldvln_edge.tasks import Task

TOPICS = TopicsConfig(use_sim_time=True, lockstep=True)
LIMITS = LimitsConfig(geofence_min_m=(-50, -50, 0), geofence_max_m=(50, 50, 20))


class GreySimulator:
    """In the place of the client of the simulator's service: exact motion, grey frames."""

    def __init__(self) -> None:
        self._pose = np.zeros(6)

    def reset(self, task: Task) -> SimulatedView:
        self._pose = np.array(task.initial_pos)
        return self._view()

    def step(self, action: np.ndarray) -> SimulatedView:
        self._pose = apply_action(self._pose, action)
        return self._view()

    def _view(self) -> SimulatedView:
        return SimulatedView(frame_HW3=np.full((16, 16, 3), 127, np.uint8), pose=self._pose, has_collided=False)


class LockstepDesk:
    """A setpoint process and, from `start_policy` on, a policy process, both as threads; the test steps the world."""

    def __init__(self, folder: Path, url: str):
        self.config = BridgeConfig(limits=LIMITS, server=ServerConfig(url=url), topics=TOPICS)
        self.topics = MemoryTopics()
        self.listener = LinkListener(folder / "line.sock")
        self.setpoints = setpoint_process(self.config, self._port(), self.listener)
        self._threads = [threading.Thread(target=self.setpoints.run)]
        self._threads[0].start()
        self.policy: PolicyNode | None = None
        self._link: PolicyLink | None = None
        self.start_simulator()

    def start_simulator(self) -> None:
        """Another one: its clock starts anew."""
        self.drone = SimulatedDrone(GreySimulator())  # type: ignore[arg-type]
        self.simulated = SimulatorTopics(MemoryWire(self.topics), TOPICS)
        self.world = LockstepWorld(self.drone, self.simulated, self.config.setpoint.period_s)
        self.flights = SimulatedFlights(self.drone, self.simulated, self.world)

    def start_policy(self) -> None:
        self._link = PolicyLink(self.listener.path)
        self.policy = PolicyNode(self.config, self._port(), self._link, server_client(self.config.server))
        self._threads.append(threading.Thread(target=self.policy.run))
        self._threads[-1].start()

    def end_policy(self) -> None:
        if self.policy is not None and self._link is not None:
            self.policy.stop()
            self._threads.pop().join()
            self._link.close()
            self.policy = None

    def close(self) -> None:
        self.end_policy()
        self.setpoints.stop()
        self._threads.pop().join()
        self.listener.close()

    def _port(self) -> MessagePort:
        return MessagePort(MemoryWire(self.topics), TOPICS)
