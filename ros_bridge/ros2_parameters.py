"""The bridge's configuration as ROS 2 parameters: names, defaults, ranges and descriptions, and the way back.

A parameter's name is the table and field of the configuration file with a dot between (`limits.max_speed_m_s`), so both
say the same. Defaults are those of the configuration; only the geofence has none, and has to be set.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, BridgeConfigError

Value = bool | int | float | str | list[float]
_LIMIT = (0.001, 99.0)
_SECONDS = (0.001, 59.0)


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter. `range` holds both ends, which are allowed themselves."""

    name: str
    default: Value
    description: str
    range: tuple[float, float] | None = None


# Field -> description, and the range of a number.
_TABLE: dict[str, tuple[str, tuple[float, float] | None]] = {
    "limits.geofence_min_m": ("Lower corner of the box that the drone stays in: x, y, z of the odometry, m.", None),
    "limits.geofence_max_m": ("Upper corner of that box, m.", None),
    "limits.min_height_m": ("Nothing descends below this z of the odometry, m.", (-1000.0, 10000.0)),
    "limits.max_speed_m_s": ("Largest horizontal speed, m/s.", _LIMIT),
    "limits.max_climb_m_s": ("Largest climb, m/s.", _LIMIT),
    "limits.max_descent_m_s": ("Largest descent, m/s.", _LIMIT),
    "limits.max_yaw_rate_rad_s": ("Largest yaw rate, rad/s.", _LIMIT),
    "limits.max_acceleration_m_s2": ("Largest change of the velocity setpoint, m/s2.", _LIMIT),
    "limits.max_yaw_acceleration_rad_s2": ("Largest change of the yaw rate, rad/s2.", _LIMIT),
    "limits.geofence_tolerance_m": ("A drone outside of the box by more is a latched fault, m.", _LIMIT),
    "server.url": ("Of worldvln-edge serve: ws://, wss:// or tcp://.", None),
    "server.key_file": ("File with the API key; empty: none.", None),
    "server.seed": ("Of the policy's draws.", (0, 2**31 - 1)),
    "server.horizons": ("At most so many horizons of the model, 48 actions each, for one instruction.", (1, 64)),
    "server.frame_format": ("How frames go to the server: jpeg or rgb8.", None),
    "server.answer_timeout_s": ("A segment that takes longer ends the flight, s.", (0.1, 600.0)),
    "topics.image": ("Camera: sensor_msgs/Image or CompressedImage.", None),
    "topics.image_is_compressed": ("The camera's topic carries sensor_msgs/CompressedImage.", None),
    "topics.odometry": ("Odometry; empty: the usual name of its kind.", None),
    "topics.odometry_kind": ("odometry: nav_msgs/Odometry; px4: px4_msgs/VehicleOdometry.", None),
    "topics.instruction": ("std_msgs/String with what to do.", None),
    "topics.command": ("std_msgs/String: stop or reset.", None),
    "topics.setpoint": ("Setpoints; empty: the usual name of their kind.", None),
    "topics.setpoint_kind": (
        "velocity: geometry_msgs/TwistStamped; pose: geometry_msgs/PoseStamped; px4: px4_msgs/TrajectorySetpoint.",
        None,
    ),
    "topics.offboard_control_mode": ("px4_msgs/OffboardControlMode, with setpoints of the kind px4.", None),
    "topics.path": ("nav_msgs/Path of the chunk that is flown.", None),
    "topics.chunk": ("trajectory_msgs/MultiDOFJointTrajectory of that chunk.", None),
    "topics.diagnostics": ("diagnostic_msgs/DiagnosticArray.", None),
    "topics.odometry_frame": ("frame_id of everything that is published.", None),
    "topics.body_frame": ("Frame of the drone's body.", None),
    "topics.publish_tf": ("Publish odometry as the transform odometry_frame -> body_frame.", None),
    "topics.lockstep": ("A simulator waits for the bridge at every step (worldvln-edge ros simulate).", None),
    "topics.step_done": ("rosgraph_msgs/Clock: steps without a setpoint, with lockstep.", None),
    "camera.missing_after_s": ("Without an image for so long the camera counts as missing, s.", _SECONDS),
    "camera.finding_s": ("How long a wrong image, stamp or second publisher is reported, s.", _SECONDS),
    "frame_clock.max_skew_s": ("How far an image may lie from the moment at which a frame is due, s.", _SECONDS),
    "frame_clock.jump_back_s": ("A stamp that lies further back is another clock, s.", _SECONDS),
    "frame_clock.memory_s": ("How long images are kept, s.", _SECONDS),
    "odometry.stale_after_s": ("Without odometry for so long the drone holds, s.", _SECONDS),
    "odometry.max_jump_m": ("A pose further off than the drone can have flown, by this much, is a fault, m.", _SECONDS),
    "odometry.memory_s": ("How long poses are kept, s.", _SECONDS),
    "setpoint.rate_hz": ("Setpoints a second.", (20.0, 50.0)),
    "setpoint.realtime_priority": ("SCHED_FIFO priority of the setpoint process; 0: none.", (0, 99)),
    "setpoint.hold_after_s": ("Silence of the policy after which the drone holds, s.", (0.001, 0.08)),
    "setpoint.silent_after_s": ("Silence after which setpoints stop, s.", (0.01, 0.5)),
    "setpoint.stale_after_s": ("A chunk whose frame is older is not flown, s.", _SECONDS),
    "setpoint.max_step_m": ("One action that moves further is a fault of the policy, m.", _SECONDS),
    "setpoint.correction_gain": ("Velocity towards the path for each metre beside it, 1/s.", (0.0, 5.0)),
    "setpoint.max_correction_m_s": ("Largest such velocity, m/s.", _SECONDS),
    "setpoint.max_turn_correction_rad_s": ("Largest such yaw rate, rad/s.", _SECONDS),
    "setpoint.max_lag_m": ("Progress slows down when the drone is further from the path, m.", _SECONDS),
    "setpoint.max_lag_rad": ("The same for its heading, rad.", _SECONDS),
}
NOT_PARAMETERS = ("dds", "topics.use_sim_time")
"""`dds` is for bare DDS, ROS 2 has its own settings; `use_sim_time` is a parameter of every ROS 2 node."""


def _default(name: str) -> Value:
    table, _, field = name.partition(".")
    if table == "limits" and field.startswith("geofence_m"):
        return [math.nan] * 3
    sections = {info.name: info.type for info in msgspec.structs.fields(BridgeConfig)}
    info = next(info for info in msgspec.structs.fields(sections[table]) if info.name == field)
    return "" if info.default is None else info.default


PARAMETERS = tuple(
    Parameter(name=name, default=_default(name), description=description, range=bounds)
    for name, (description, bounds) in _TABLE.items()
)


def config_of_parameters(values: dict[str, Value], *, use_sim_time: bool) -> BridgeConfig:
    """
    Args:
        values: parameter name -> value; those that are missing keep their defaults.
        use_sim_time: the node's own parameter.

    Raises:
        BridgeConfigError: a value that cannot work. The message names the parameter.
    """
    known = {parameter.name: parameter for parameter in PARAMETERS}
    sections: dict[str, dict[str, Any]] = {"topics": {"use_sim_time": use_sim_time}}
    for name, value in values.items():
        if name not in known:
            raise BridgeConfigError(f"parameter {name} is not known; see config/worldvln.yaml")
        table, _, field = name.partition(".")
        if isinstance(value, list) and not all(math.isfinite(part) for part in value):
            raise BridgeConfigError(f"parameter {name} is not set; give the corner of the box: [x, y, z] in m")
        sections.setdefault(table, {})[field] = None if name == "server.key_file" and value == "" else value
    try:
        return msgspec.convert(sections, BridgeConfig)
    except (msgspec.MsgspecError, ValueError) as refusal:
        raise BridgeConfigError(f"parameters: {refusal}") from refusal
