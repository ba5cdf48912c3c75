"""Which topic carries what. The one table of names; types are in docs/ros.md, "Topics"."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

CLOCK = "/clock"
_NAME = re.compile(r"/[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*\Z")
_ODOMETRY = {"odometry": "/odom", "px4": "/fmu/out/vehicle_odometry"}
_SETPOINT = {
    "velocity": "/mavros/setpoint_velocity/cmd_vel",
    "pose": "/mavros/setpoint_position/local",
    "px4": "/fmu/in/trajectory_setpoint",
}


class TopicError(ValueError):
    """A topic that ROS would not accept, or one name for two things."""


class TopicsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    image: str = "/camera/image_raw"
    image_is_compressed: bool = False
    """sensor_msgs/CompressedImage instead of sensor_msgs/Image."""
    odometry: str = ""
    """Empty: the usual name of its kind."""
    odometry_kind: Literal["odometry", "px4"] = "odometry"
    """nav_msgs/Odometry, or px4_msgs/VehicleOdometry."""
    instruction: str = "/worldvln/instruction"
    command: str = "/worldvln/command"
    """`stop` ends the flight, `reset` forgets latched faults."""
    setpoint: str = ""
    """Empty: the usual name of its kind."""
    setpoint_kind: Literal["velocity", "pose", "px4"] = "velocity"
    """geometry_msgs/TwistStamped, geometry_msgs/PoseStamped, or px4_msgs/TrajectorySetpoint with its
    OffboardControlMode."""
    offboard_control_mode: str = "/fmu/in/offboard_control_mode"
    """PX4's heartbeat, with setpoints of the kind `px4` only."""
    path: str = "/worldvln/path"
    chunk: str = "/worldvln/chunk"
    """The action chunk that is flown, with velocities and times."""
    diagnostics: str = "/diagnostics"
    odometry_frame: str = "odom"
    """frame_id of everything that is published."""
    body_frame: str = "base_link"
    publish_tf: bool = False
    """Publish odometry as the transform odometry_frame -> body_frame, where nobody else does."""
    use_sim_time: bool = False
    """Time is what /clock says."""
    lockstep: bool = False
    """A simulator that waits for the bridge at every step (`worldvln-edge ros simulate`): the bridge counts all its
    times on /clock. Needs `use_sim_time` and setpoints of the kind velocity."""
    step_done: str = "/worldvln/step_done"
    """With `lockstep`: steps without a setpoint, after which the simulator may go on."""

    def __post_init__(self) -> None:
        if not self.odometry:
            msgspec.structs.force_setattr(self, "odometry", _ODOMETRY[self.odometry_kind])
        if not self.setpoint:
            msgspec.structs.force_setattr(self, "setpoint", _SETPOINT[self.setpoint_kind])
        if self.lockstep and not (self.use_sim_time and self.setpoint_kind == "velocity"):
            raise TopicError('topics.lockstep needs use_sim_time = true and setpoint_kind = "velocity"')
        seen: dict[str, str] = {}
        for field in (
            "image",
            "odometry",
            "instruction",
            "command",
            "setpoint",
            "offboard_control_mode",
            "path",
            "chunk",
            "diagnostics",
            "step_done",
        ):
            name = getattr(self, field)
            if not _NAME.match(name):
                raise TopicError(
                    f"topics.{field}: {name!r} is no topic; give a full name such as /camera/image_raw, of letters, "
                    "digits and _"
                )
            if name in seen:
                raise TopicError(f"topics.{field} and topics.{seen[name]} are both {name}; give each its own")
            seen[name] = field
        for field in ("odometry_frame", "body_frame"):
            if not getattr(self, field).strip("/"):
                raise TopicError(f"topics.{field} is empty; give the name of a frame such as base_link")
