"""ROS 1's messages under the names that `messages.MessageBuilder` uses; times are made with ROS 2's field names."""

from __future__ import annotations

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from genpy import Duration as _Duration
from genpy import Time as _Time
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

__all__ = [
    "Clock",
    "CompressedImage",
    "DiagnosticArray",
    "DiagnosticStatus",
    "Duration",
    "Header",
    "Image",
    "KeyValue",
    "MultiDOFJointTrajectory",
    "MultiDOFJointTrajectoryPoint",
    "Odometry",
    "Path",
    "Point",
    "Pose",
    "PoseStamped",
    "PoseWithCovariance",
    "Quaternion",
    "String",
    "TFMessage",
    "Time",
    "Transform",
    "TransformStamped",
    "Twist",
    "TwistStamped",
    "TwistWithCovariance",
    "Vector3",
    "level",
]


def Time(*, sec: int, nanosec: int) -> _Time:
    return _Time(secs=sec, nsecs=nanosec)


def Duration(*, sec: int, nanosec: int) -> _Duration:
    return _Duration(secs=sec, nsecs=nanosec)


def level(level: int) -> int:
    """Of a DiagnosticStatus."""
    return level
