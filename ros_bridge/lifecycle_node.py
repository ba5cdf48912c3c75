"""ROS 2's lifecycle node of the bridge: `configure` checks the parameters, `activate` starts both processes.

The node itself moves nothing and subscribes nothing; setpoint process and policy process are nodes of their own
(`ros run --via ros2`). `deactivate` ends them, so setpoints stop and the autopilot's fail-safe acts.
"""

from __future__ import annotations

from typing import Any

import rclpy
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, BridgeConfigError
from worldvln_edge.ros_bridge.ros2_parameters import PARAMETERS, Parameter, Value, config_of_parameters
from worldvln_edge.ros_bridge.running_bridge import RunningBridge

_LOOK_S = 0.2


class BridgeNode(LifecycleNode):
    def __init__(self) -> None:
        super().__init__("worldvln_bridge")
        for parameter in PARAMETERS:
            self.declare_parameter(parameter.name, parameter.default, _descriptor(parameter))
        self._config: BridgeConfig | None = None
        self._bridge: RunningBridge | None = None
        self.create_timer(_LOOK_S, self._look)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        values = {parameter.name: _plain(self.get_parameter(parameter.name).value) for parameter in PARAMETERS}
        try:
            self._config = config_of_parameters(values, use_sim_time=self.get_parameter("use_sim_time").value)
        except BridgeConfigError as refusal:
            self.get_logger().error(str(refusal))
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self._config is not None, "ROS activates configured nodes only"
        self._bridge = RunningBridge("ros2", self._config)
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._config = None
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop()
        return super().on_error(state)

    def destroy_node(self) -> None:
        self._stop()
        super().destroy_node()

    def _look(self) -> None:
        if self._bridge is not None and self._bridge.why_ended is not None:
            self.get_logger().error(f"the bridge ended: {self._bridge.why_ended}")
            self.trigger_deactivate()

    def _stop(self) -> None:
        if self._bridge is not None:
            self._bridge.stop()
            self._bridge = None


def _plain(value: Any) -> Value:
    """Arrays of doubles come as `array.array`."""
    return value if isinstance(value, bool | int | float | str) else [float(part) for part in value]


def _descriptor(parameter: Parameter) -> ParameterDescriptor:
    if parameter.range is None:
        return ParameterDescriptor(description=parameter.description)
    low, high = parameter.range
    if isinstance(parameter.default, int):
        whole = IntegerRange(from_value=int(low), to_value=int(high), step=1)
        return ParameterDescriptor(description=parameter.description, integer_range=[whole])
    bounds = FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)
    return ParameterDescriptor(description=parameter.description, floating_point_range=[bounds])


def main() -> None:
    """Entry point of the ROS package worldvln_edge_ros."""
    rclpy.init()
    node = BridgeNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass  # asked to end
    finally:
        node.destroy_node()
