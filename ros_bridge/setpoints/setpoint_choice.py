"""The setpoint process that a configuration asks for: in flight, or in step with a simulator that waits."""

from __future__ import annotations

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig
from worldvln_edge.ros_bridge.ports.port import Port
from worldvln_edge.ros_bridge.setpoints.lockstep_process import LockstepSetpointProcess
from worldvln_edge.ros_bridge.setpoints.policy_link import LinkListener
from worldvln_edge.ros_bridge.setpoints.setpoint_logic import SetpointLogic
from worldvln_edge.ros_bridge.setpoints.setpoint_process import SetpointProcess


def setpoint_process(config: BridgeConfig, port: Port, listener: LinkListener) -> SetpointProcess:
    """See `SetpointProcess`."""

    def new_logic() -> SetpointLogic:
        return SetpointLogic(config.setpoint, config.limits, config.odometry)

    if config.topics.lockstep:
        return LockstepSetpointProcess(new_logic, port, listener)
    publishes_poses = config.topics.setpoint_kind == "pose"
    return SetpointProcess(new_logic(), port, listener, publishes_poses=publishes_poses)
