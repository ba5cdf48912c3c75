"""`worldvln-edge ros simulate`: the simulator's HTTP service on one side, the topics on the other, time in between."""

from __future__ import annotations

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig
from worldvln_edge.ros_bridge.ports.wire import Wire
from worldvln_edge.ros_bridge.simulation.simulated_drone import SimulatedDrone
from worldvln_edge.ros_bridge.simulation.simulated_flights import SimulatedFlight, SimulatedFlights
from worldvln_edge.ros_bridge.simulation.simulator_client import SimulatorClient
from worldvln_edge.ros_bridge.simulation.simulator_topics import SimulatorTopics
from worldvln_edge.ros_bridge.simulation.world import LockstepWorld, RealTimeWorld, World
from worldvln_edge.tasks import Task


class SimulatorConfigError(ValueError):
    """A configuration that a simulator cannot serve. The message says what to set."""


class SimulatorNode:
    """
    Args:
        config: of the bridge that flies here: topics, clock, and the rate of setpoints, which is that of the world.
        wire: to the topics; stays open.
        simulator_url: of the HTTP service.
        image_hw: rows and columns of the camera.

    Raises:
        SimulatorConfigError, SimulatorError.
    """

    def __init__(self, config: BridgeConfig, wire: Wire, simulator_url: str, image_hw: tuple[int, int]):
        topics = config.topics
        if topics.use_sim_time != topics.lockstep:
            raise SimulatorConfigError(
                "topics.use_sim_time without topics.lockstep: this simulator either waits for the bridge (set both) or "
                "runs on the computer's clock (set neither)"
            )
        if topics.setpoint_kind != "velocity" or topics.odometry_kind != "odometry" or topics.image_is_compressed:
            raise SimulatorConfigError(
                "this simulator speaks sensor_msgs/Image, nav_msgs/Odometry and geometry_msgs/TwistStamped; set "
                'setpoint_kind = "velocity", odometry_kind = "odometry" and image_is_compressed = false'
            )
        if config.setpoint.period_s > config.frame_clock.max_skew_s:
            raise SimulatorConfigError(
                f"setpoint.rate_hz {config.setpoint.rate_hz:g} is also the camera's here, and its images may not lie "
                f"further apart than frame_clock.max_skew_s ({config.frame_clock.max_skew_s:g} s); set 40"
            )
        self._client = SimulatorClient(simulator_url, image_hw)
        self._drone = SimulatedDrone(self._client)
        self._topics = SimulatorTopics(wire, topics)
        make_world = LockstepWorld if topics.lockstep else RealTimeWorld
        self._world: World = make_world(self._drone, self._topics, config.setpoint.period_s)
        self._flights = SimulatedFlights(self._drone, self._topics, self._world)

    def fly(self, task: Task) -> SimulatedFlight:
        """Raises BridgeSilentError, SimulatorError, WorldStoppedError."""
        return self._flights.fly(task)

    def wait(self, task: Task) -> None:
        """Stand at a task's start and fly what comes, until WorldStoppedError. Raises as `fly`."""
        self._flights.stand(task)
        while True:
            self._world.step()

    def stop(self) -> None:
        """From any thread or signal: the next step raises WorldStoppedError."""
        self._world.stop()

    def close(self) -> None:
        self._client.close()
