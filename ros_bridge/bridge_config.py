"""The bridge's configuration file: one file for both processes, checked in full before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from worldvln_edge.ros_bridge.camera_intake import CameraIntakeConfig
from worldvln_edge.ros_bridge.frame_clock import FrameClockConfig
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig
from worldvln_edge.ros_bridge.setpoints.limits import LimitsConfig
from worldvln_edge.ros_bridge.setpoints.odometry_track import OdometryConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig


class BridgeConfigError(ValueError):
    """A configuration file that cannot be used. The message names the file and the field."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = "ws://127.0.0.1:8001"
    """Of `worldvln-edge serve` (see the client SDK)."""
    key_file: str | None = None
    """File with the API key."""
    seed: int = 0
    horizons: int = 1
    """At most so many of the model's horizons (48 actions each) are flown for one instruction; fewer when the server
    says that the drone has arrived."""
    frame_format: Literal["jpeg", "rgb8"] = "jpeg"
    """How frames go to the server. On the same computer rgb8 costs less time, and loses nothing."""
    answer_timeout_s: float = 10.0
    """A segment that takes longer ends the flight."""

    def __post_init__(self) -> None:
        if not 1 <= self.horizons <= 64:
            raise ValueError(f"server.horizons must be 1 to 64, found {self.horizons}")
        if not 0 < self.answer_timeout_s < math.inf:
            raise ValueError(f"server.answer_timeout_s must be more than 0, found {self.answer_timeout_s:g}")


class DdsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    domain_id: int = 0
    """ROS 2's `ROS_DOMAIN_ID`."""
    network_interface: str | None = None
    """`eth0`, `lo`, ...; None: DDS chooses. On `lo` peers are found without multicast."""

    def __post_init__(self) -> None:
        if not 0 <= self.domain_id <= 232:
            raise ValueError(f"dds.domain_id must be 0 to 232, found {self.domain_id}")


class BridgeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Only `limits` has no defaults: where a drone may fly is nobody else's to guess."""

    limits: LimitsConfig
    server: ServerConfig = ServerConfig()
    topics: TopicsConfig = TopicsConfig()
    dds: DdsConfig = DdsConfig()
    camera: CameraIntakeConfig = CameraIntakeConfig()
    frame_clock: FrameClockConfig = FrameClockConfig()
    odometry: OdometryConfig = OdometryConfig()
    setpoint: SetpointConfig = SetpointConfig()

    def __post_init__(self) -> None:
        if self.odometry.memory_s <= self.setpoint.stale_after_s:
            raise ValueError(
                f"odometry.memory_s ({self.odometry.memory_s:g}) must be more than setpoint.stale_after_s "
                f"({self.setpoint.stale_after_s:g}): a chunk starts where the drone was when its frame was taken"
            )


def read_bridge_config(path: Path) -> BridgeConfig:
    """Read and check a configuration file: TOML for people, JSON (by its suffix) for programs that write one.

    Raises:
        BridgeConfigError: not readable, not TOML or JSON, an unknown field, or a value that cannot work.
    """
    decode = msgspec.json.decode if path.suffix == ".json" else msgspec.toml.decode
    try:
        return decode(path.read_bytes(), type=BridgeConfig)
    except OSError as failure:
        raise BridgeConfigError(f"{path}: cannot be read ({failure.strerror})") from failure
    except (msgspec.MsgspecError, ValueError) as refusal:
        raise BridgeConfigError(f"{path}: {refusal}") from refusal
