"""Which topic carries what. The one table of names; types are in docs/ros.md, "Topics"."""

from __future__ import annotations

import re

import msgspec

_NAME = re.compile(r"/[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*\Z")


class TopicError(ValueError):
    """A topic that ROS would not accept, or one name for two things."""


class TopicsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    image: str = "/camera/image_raw"
    image_is_compressed: bool = False
    """sensor_msgs/CompressedImage instead of sensor_msgs/Image."""
    odometry: str = "/odom"
    instruction: str = "/worldvln/instruction"
    command: str = "/worldvln/command"
    """`stop` ends the flight, `reset` forgets latched faults."""
    setpoint: str = "/mavros/setpoint_velocity/cmd_vel"
    path: str = "/worldvln/path"
    diagnostics: str = "/diagnostics"
    odometry_frame: str = "odom"
    """frame_id of everything that is published."""
    use_sim_time: bool = False
    """Time is what /clock says."""

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for field in ("image", "odometry", "instruction", "command", "setpoint", "path", "diagnostics"):
            name = getattr(self, field)
            if not _NAME.match(name):
                raise TopicError(
                    f"topics.{field}: {name!r} is no topic; give a full name such as /camera/image_raw, of letters, "
                    "digits and _"
                )
            if name in seen:
                raise TopicError(f"topics.{field} and topics.{seen[name]} are both {name}; give each its own")
            seen[name] = field
