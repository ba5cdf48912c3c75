"""What the bridge needs of a robot's topics: four things in, five things out, and the clock of the stamps.

Every way to the wire is one implementation. Callbacks run in the port's own thread, must return soon and must not
raise. Positions and velocities are of the odometry's world (ENU; m, m/s, rad).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from worldvln_edge.ros_bridge.camera_intake import ImageMessage
from worldvln_edge.ros_bridge.diagnostics import Diagnostic


@dataclass(frozen=True, kw_only=True)
class ImageSample:
    image: ImageMessage
    stamp_ns: int
    source: str
    """Who published it."""


@dataclass(frozen=True, kw_only=True)
class OdometrySample:
    """`position_3` and `yaw_rad` are NaN where the message holds no pose."""

    position_3: np.ndarray
    yaw_rad: float
    stamp_ns: int


class Port(Protocol):
    def now_ns(self) -> int:
        """The clock that stamps images, as it stands now."""
        ...

    def subscribe_clock(self, receive: Callable[[int], None]) -> None:
        """Every /clock, in ns; only with `topics.use_sim_time`."""
        ...

    def subscribe_image(self, receive: Callable[[ImageSample], None]) -> None: ...

    def subscribe_odometry(self, receive: Callable[[OdometrySample], None]) -> None: ...

    def subscribe_instruction(self, receive: Callable[[str], None]) -> None: ...

    def subscribe_command(self, receive: Callable[[str], None]) -> None:
        """Words of the operator: `stop`, `reset`."""
        ...

    def announce_setpoints(self) -> None:
        """Announce setpoints, path and chunk, so that readers have found them when the first one is published."""
        ...

    def publish_setpoint(self, velocity_m_s: Sequence[float], yaw_rate_rad_s: float) -> None:
        """With `topics.setpoint_kind` velocity and px4."""
        ...

    def publish_setpoint_pose(self, pose_4: np.ndarray) -> None:
        """x, y, z, yaw, with `topics.setpoint_kind` pose."""
        ...

    def publish_path(self, poses_N4: np.ndarray) -> None:
        """x, y, z, yaw of every pose."""
        ...

    def publish_chunk(self, poses_N4: np.ndarray, fps: float) -> None:
        """The same poses as a trajectory: one every 1/fps s, from now on."""
        ...

    def publish_diagnostics(self, checks: Sequence[Diagnostic]) -> None: ...

    def publish_step_done(self, stamp_ns: int) -> None:
        """With `topics.lockstep`: the simulator may go on from this /clock, though there is no setpoint for it."""
        ...

    def close(self) -> None: ...
