"""A port without a wire: what comes in is said by the test, what goes out is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worldvln_edge.ros_bridge.diagnostics import Diagnostic
from worldvln_edge.ros_bridge.image_decoding import RawImage
from worldvln_edge.ros_bridge.ports.port import ImageSample, OdometrySample


class MemoryPort:
    def __init__(self) -> None:
        self.receive: dict[str, Callable[[Any], None]] = {}
        self.setpoints: list[tuple[tuple[float, ...], float]] = []
        self.setpoint_poses: list[np.ndarray] = []
        self.paths: list[np.ndarray] = []
        self.chunks: list[tuple[np.ndarray, float]] = []
        self.steps_done: list[int] = []
        self.checks: dict[str, Diagnostic] = {}
        self.is_announced = False

    def now_ns(self) -> int:
        return time.time_ns()

    def subscribe_clock(self, receive: Callable[[int], None]) -> None:
        self.receive["clock"] = receive

    def subscribe_image(self, receive: Callable[[ImageSample], None]) -> None:
        self.receive["image"] = receive

    def subscribe_odometry(self, receive: Callable[[OdometrySample], None]) -> None:
        self.receive["odometry"] = receive

    def subscribe_instruction(self, receive: Callable[[str], None]) -> None:
        self.receive["instruction"] = receive

    def subscribe_command(self, receive: Callable[[str], None]) -> None:
        self.receive["command"] = receive

    def announce_setpoints(self) -> None:
        self.is_announced = True

    def publish_setpoint(self, velocity_m_s: Sequence[float], yaw_rate_rad_s: float) -> None:
        self.setpoints.append((tuple(velocity_m_s), yaw_rate_rad_s))

    def publish_setpoint_pose(self, pose_4: np.ndarray) -> None:
        self.setpoint_poses.append(pose_4)

    def publish_path(self, poses_N4: np.ndarray) -> None:
        self.paths.append(poses_N4)

    def publish_chunk(self, poses_N4: np.ndarray, fps: float) -> None:
        self.chunks.append((poses_N4, fps))

    def publish_diagnostics(self, checks: Sequence[Diagnostic]) -> None:
        self.checks.update({check.name: check for check in checks})

    def publish_step_done(self, stamp_ns: int) -> None:
        self.steps_done.append(stamp_ns)

    def close(self) -> None:
        pass

    def show_image(self, *, age_s: float = 0.0, encoding: str = "rgb8", source: str = "camera") -> None:
        image = RawImage(height=8, width=8, encoding=encoding, is_bigendian=False, step=24, data=bytes(192))
        self.receive["image"](ImageSample(image=image, stamp_ns=self.now_ns() - int(age_s * 1e9), source=source))

    def show_odometry(self, x: float = 0.0, y: float = 0.0, z: float = 3.0) -> None:
        sample = OdometrySample(position_3=np.array([x, y, z]), yaw_rad=0.0, stamp_ns=self.now_ns())
        self.receive["odometry"](sample)
