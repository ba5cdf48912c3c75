"""ROS 2's messages as rclpy has them, under the names that `messages.MessageBuilder` uses."""

from __future__ import annotations

from types import SimpleNamespace

from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import (
    Point,
    Pose,
    PoseStamped,
    PoseWithCovariance,
    Quaternion,
    Transform,
    TransformStamped,
    Twist,
    TwistStamped,
    TwistWithCovariance,
    Vector3,
)
from nav_msgs.msg import Odometry, Path
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header, String
from tf2_msgs.msg import TFMessage
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint


def rclpy_types(with_px4: bool) -> SimpleNamespace:
    """Raises ModuleNotFoundError: PX4's messages are asked for and not installed."""
    types = SimpleNamespace(
        Clock=Clock,
        CompressedImage=CompressedImage,
        DiagnosticArray=DiagnosticArray,
        DiagnosticStatus=DiagnosticStatus,
        Duration=Duration,
        Header=Header,
        Image=Image,
        KeyValue=KeyValue,
        MultiDOFJointTrajectory=MultiDOFJointTrajectory,
        MultiDOFJointTrajectoryPoint=MultiDOFJointTrajectoryPoint,
        Odometry=Odometry,
        Path=Path,
        Point=Point,
        Pose=Pose,
        PoseStamped=PoseStamped,
        PoseWithCovariance=PoseWithCovariance,
        Quaternion=Quaternion,
        String=String,
        TFMessage=TFMessage,
        Time=Time,
        Transform=Transform,
        TransformStamped=TransformStamped,
        Twist=Twist,
        TwistStamped=TwistStamped,
        TwistWithCovariance=TwistWithCovariance,
        Vector3=Vector3,
        level=_level,
    )
    if with_px4:
        from px4_msgs.msg import OffboardControlMode, TrajectorySetpoint, VehicleOdometry

        types.OffboardControlMode = OffboardControlMode
        types.TrajectorySetpoint = TrajectorySetpoint
        types.VehicleOdometry = VehicleOdometry
    return types


def _level(level: int) -> bytes:
    """Of a DiagnosticStatus: a `byte`, which rclpy holds as bytes."""
    return bytes([level])
