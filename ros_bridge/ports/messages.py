"""ROS 2's messages, built and read: one place for every port whose messages have the fields of the .msg files.

The classes are those of the port: DDS types, or what rosidl generated. All are made with keywords. Positions and
velocities are ENU (m, m/s, rad) unless a name says otherwise.
Source: docs/ros.md, "Topics" and "Frames and units".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from worldvln_edge.ros_bridge.conversions import (
    attitude_of_px4,
    enu_to_ned,
    quaternion_of_yaw,
    yaw_of_quaternion,
)
from worldvln_edge.ros_bridge.diagnostics import Diagnostic
from worldvln_edge.ros_bridge.image_decoding import CompressedImage, RawImage
from worldvln_edge.ros_bridge.ports.port import ImageSample, OdometrySample
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

_NS = 1_000_000_000
_PX4_FRAMES = (1, 2)  # NED; FRD with an arbitrary heading, which the odometry's world may have as well
_UNSET = [math.nan] * 3
TF = "/tf"


def ns_of_time(time: Any) -> int:
    """builtin_interfaces/Time, or ROS 1's time, whose fields have other names, in ns."""
    if hasattr(time, "nsecs"):
        return int(time.secs) * _NS + int(time.nsecs)
    return int(time.sec) * _NS + int(time.nanosec)


def image_sample(message: Any, source: str) -> ImageSample:
    """sensor_msgs/Image."""
    image = RawImage(
        height=message.height,
        width=message.width,
        encoding=message.encoding,
        is_bigendian=bool(message.is_bigendian),
        step=message.step,
        data=memoryview(message.data),
    )
    return ImageSample(image=image, stamp_ns=ns_of_time(message.header.stamp), source=source)


def compressed_image_sample(message: Any, source: str) -> ImageSample:
    """sensor_msgs/CompressedImage."""
    image = CompressedImage(format=message.format, data=memoryview(message.data))
    return ImageSample(image=image, stamp_ns=ns_of_time(message.header.stamp), source=source)


def odometry_sample(message: Any) -> OdometrySample:
    """nav_msgs/Odometry. A quaternion that is none becomes a yaw of NaN."""
    position, turn = message.pose.pose.position, message.pose.pose.orientation
    try:
        yaw = yaw_of_quaternion(np.array([turn.x, turn.y, turn.z, turn.w]))
    except ValueError:
        yaw = math.nan
    return OdometrySample(
        position_3=np.array([position.x, position.y, position.z]),
        yaw_rad=yaw,
        stamp_ns=ns_of_time(message.header.stamp),
    )


def px4_odometry_sample(message: Any) -> OdometrySample:
    """px4_msgs/VehicleOdometry. An unknown frame, or an attitude that is none, becomes NaN."""
    position = enu_to_ned(np.array(message.position, np.float64))
    if message.pose_frame not in _PX4_FRAMES:
        position = np.full(3, math.nan)
    try:
        yaw = yaw_of_quaternion(attitude_of_px4(np.array(message.q, np.float64)))
    except ValueError:
        yaw = math.nan
    return OdometrySample(position_3=position, yaw_rad=yaw, stamp_ns=int(message.timestamp_sample) * 1000)


class MessageBuilder:
    """
    Args:
        types: has the classes as attributes (`types.TwistStamped`), and `level` that makes a DiagnosticStatus' level
            of an int.
        topics: frames.
        now_ns: the clock of the stamps.
    """

    def __init__(self, types: Any, topics: TopicsConfig, now_ns: Callable[[], int]):
        self._types, self._topics, self._now_ns = types, topics, now_ns

    def velocity(self, velocity_m_s: Sequence[float], yaw_rate_rad_s: float) -> Any:
        """geometry_msgs/TwistStamped."""
        return self._types.TwistStamped(header=self.header(), twist=self._twist([*velocity_m_s, yaw_rate_rad_s]))

    def pose(self, pose_4: np.ndarray) -> Any:
        """geometry_msgs/PoseStamped of a level body."""
        types = self._types
        x, y, z, yaw = (float(value) for value in pose_4)
        pose = types.Pose(position=types.Point(x=x, y=y, z=z), orientation=self._quaternion(quaternion_of_yaw(yaw)))
        return types.PoseStamped(header=self.header(), pose=pose)

    def path(self, poses_N4: np.ndarray) -> Any:
        """nav_msgs/Path."""
        return self._types.Path(header=self.header(), poses=[self.pose(pose) for pose in poses_N4])

    def chunk(self, poses_N4: np.ndarray, fps: float) -> Any:
        """trajectory_msgs/MultiDOFJointTrajectory of one joint, the body: its pose every 1/fps s, and the velocity with
        which it leaves that pose at full speed; zero at the last one."""
        types = self._types
        velocities_N4 = np.zeros_like(poses_N4)
        velocities_N4[:-1] = np.diff(poses_N4, axis=0) * fps
        points = []
        for index, (pose, velocity) in enumerate(zip(poses_N4, velocities_N4, strict=True)):
            since_ns = round(index * _NS / fps)
            points.append(
                types.MultiDOFJointTrajectoryPoint(
                    transforms=[self._transform(pose[:3], quaternion_of_yaw(float(pose[3])))],
                    velocities=[self._twist(velocity)],
                    accelerations=[],
                    time_from_start=types.Duration(sec=since_ns // _NS, nanosec=since_ns % _NS),
                )
            )
        return types.MultiDOFJointTrajectory(header=self.header(), joint_names=[self._topics.body_frame], points=points)

    def diagnostics(self, checks: Sequence[Diagnostic]) -> Any:
        """diagnostic_msgs/DiagnosticArray."""
        types = self._types
        status = [
            types.DiagnosticStatus(
                level=types.level(int(check.level)),
                name=f"worldvln/{check.name}",
                message=check.message,
                hardware_id="",
                values=[types.KeyValue(key="what to do", value=check.what_to_do)] if check.what_to_do else [],
            )
            for check in checks
        ]
        return types.DiagnosticArray(header=self.header(), status=status)

    def body_transform(self, odometry: Any) -> Any:
        """tf2_msgs/TFMessage of a nav_msgs/Odometry."""
        position, turn = odometry.pose.pose.position, odometry.pose.pose.orientation
        return self._tf(
            odometry.header.stamp,
            np.array([position.x, position.y, position.z]),
            np.array([turn.x, turn.y, turn.z, turn.w]),
        )

    def px4_body_transform(self, odometry: Any) -> Any | None:
        """tf2_msgs/TFMessage of a px4_msgs/VehicleOdometry; None if it holds no pose."""
        sample = px4_odometry_sample(odometry)
        if not np.isfinite([*sample.position_3, sample.yaw_rad]).all():
            return None
        stamp = self._types.Time(sec=sample.stamp_ns // _NS, nanosec=sample.stamp_ns % _NS)
        return self._tf(stamp, sample.position_3, attitude_of_px4(np.array(odometry.q, np.float64)))

    def px4_setpoint(self, velocity_m_s: Sequence[float], yaw_rate_rad_s: float) -> Any:
        """px4_msgs/TrajectorySetpoint of a velocity: all else is NaN, that is, not controlled."""
        north, east, down = (float(value) for value in enu_to_ned(np.array(velocity_m_s, np.float64)))
        return self._types.TrajectorySetpoint(
            timestamp=self._now_ns() // 1000,
            position=_UNSET,
            velocity=[north, east, down],
            acceleration=_UNSET,
            jerk=_UNSET,
            yaw=math.nan,
            yawspeed=-float(yaw_rate_rad_s),
        )

    def px4_control_mode(self) -> Any:
        """px4_msgs/OffboardControlMode: velocities are sent."""
        return self._types.OffboardControlMode(
            timestamp=self._now_ns() // 1000,
            position=False,
            velocity=True,
            acceleration=False,
            attitude=False,
            body_rate=False,
            thrust_and_torque=False,
            direct_actuator=False,
        )

    def header(self) -> Any:
        """std_msgs/Header of this moment in the odometry's frame."""
        return self._types.Header(stamp=self._time(self._now_ns()), frame_id=self._topics.odometry_frame)

    def clock(self, now_ns: int) -> Any:
        """rosgraph_msgs/Clock."""
        return self._types.Clock(clock=self._time(now_ns))

    def _time(self, at_ns: int) -> Any:
        return self._types.Time(sec=at_ns // _NS, nanosec=at_ns % _NS)

    def _tf(self, stamp: Any, position_3: np.ndarray, orientation_xyzw: np.ndarray) -> Any:
        types = self._types
        transform = types.TransformStamped(
            header=types.Header(stamp=stamp, frame_id=self._topics.odometry_frame),
            child_frame_id=self._topics.body_frame,
            transform=self._transform(position_3, orientation_xyzw),
        )
        return types.TFMessage(transforms=[transform])

    def _transform(self, position_3: np.ndarray, orientation_xyzw: np.ndarray) -> Any:
        return self._types.Transform(translation=self._vector(position_3), rotation=self._quaternion(orientation_xyzw))

    def _twist(self, velocity_4: Sequence[float] | np.ndarray) -> Any:
        return self._types.Twist(linear=self._vector(velocity_4[:3]), angular=self._vector([0.0, 0.0, velocity_4[3]]))

    def _vector(self, values: Sequence[float] | np.ndarray) -> Any:
        x, y, z = (float(value) for value in values)
        return self._types.Vector3(x=x, y=y, z=z)

    def _quaternion(self, orientation_xyzw: np.ndarray) -> Any:
        x, y, z, w = (float(value) for value in orientation_xyzw)
        return self._types.Quaternion(x=x, y=y, z=z, w=w)
