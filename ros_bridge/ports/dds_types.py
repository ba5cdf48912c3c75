"""ROS 2's messages as DDS types: the names and fields under which ROS 2 nodes know them.

ROS 2 mangles names: the type `sensor_msgs/msg/Image` is `sensor_msgs::msg::dds_::Image_`, the topic `/image` is
`rt/image`. Fields stand in the order of the message definitions, for the order is the wire format.

Images carry their pixels as bytes. The binding would make a list with an object for every byte (7 ms for a 256 x 256
picture), so the two image types serialise all fields in front of `data` with the binding and append `data` as it is.
"""

# No `from __future__ import annotations`: the binding reads the annotations as types.

import struct
from dataclasses import dataclass, fields
from typing import Any

from cyclonedds.idl import IdlStruct, types


@dataclass
class Time(IdlStruct, typename="builtin_interfaces::msg::dds_::Time_"):
    sec: types.int32
    nanosec: types.uint32


@dataclass
class Header(IdlStruct, typename="std_msgs::msg::dds_::Header_"):
    stamp: Time
    frame_id: str


@dataclass
class String(IdlStruct, typename="std_msgs::msg::dds_::String_"):
    data: str


@dataclass
class Vector3(IdlStruct, typename="geometry_msgs::msg::dds_::Vector3_"):
    x: types.float64
    y: types.float64
    z: types.float64


@dataclass
class Point(IdlStruct, typename="geometry_msgs::msg::dds_::Point_"):
    x: types.float64
    y: types.float64
    z: types.float64


@dataclass
class Quaternion(IdlStruct, typename="geometry_msgs::msg::dds_::Quaternion_"):
    x: types.float64
    y: types.float64
    z: types.float64
    w: types.float64


@dataclass
class Pose(IdlStruct, typename="geometry_msgs::msg::dds_::Pose_"):
    position: Point
    orientation: Quaternion


@dataclass
class PoseStamped(IdlStruct, typename="geometry_msgs::msg::dds_::PoseStamped_"):
    header: Header
    pose: Pose


@dataclass
class PoseWithCovariance(IdlStruct, typename="geometry_msgs::msg::dds_::PoseWithCovariance_"):
    pose: Pose
    covariance: types.array[types.float64, 36]


@dataclass
class Twist(IdlStruct, typename="geometry_msgs::msg::dds_::Twist_"):
    linear: Vector3
    angular: Vector3


@dataclass
class TwistStamped(IdlStruct, typename="geometry_msgs::msg::dds_::TwistStamped_"):
    header: Header
    twist: Twist


@dataclass
class TwistWithCovariance(IdlStruct, typename="geometry_msgs::msg::dds_::TwistWithCovariance_"):
    twist: Twist
    covariance: types.array[types.float64, 36]


@dataclass
class Odometry(IdlStruct, typename="nav_msgs::msg::dds_::Odometry_"):
    header: Header
    child_frame_id: str
    pose: PoseWithCovariance
    twist: TwistWithCovariance


@dataclass
class Path(IdlStruct, typename="nav_msgs::msg::dds_::Path_"):
    header: Header
    poses: types.sequence[PoseStamped]


@dataclass
class Transform(IdlStruct, typename="geometry_msgs::msg::dds_::Transform_"):
    translation: Vector3
    rotation: Quaternion


@dataclass
class TransformStamped(IdlStruct, typename="geometry_msgs::msg::dds_::TransformStamped_"):
    header: Header
    child_frame_id: str
    transform: Transform


@dataclass
class TFMessage(IdlStruct, typename="tf2_msgs::msg::dds_::TFMessage_"):
    transforms: types.sequence[TransformStamped]


@dataclass
class Duration(IdlStruct, typename="builtin_interfaces::msg::dds_::Duration_"):
    sec: types.int32
    nanosec: types.uint32


@dataclass
class MultiDOFJointTrajectoryPoint(IdlStruct, typename="trajectory_msgs::msg::dds_::MultiDOFJointTrajectoryPoint_"):
    transforms: types.sequence[Transform]
    velocities: types.sequence[Twist]
    accelerations: types.sequence[Twist]
    time_from_start: Duration


@dataclass
class MultiDOFJointTrajectory(IdlStruct, typename="trajectory_msgs::msg::dds_::MultiDOFJointTrajectory_"):
    header: Header
    joint_names: types.sequence[str]
    points: types.sequence[MultiDOFJointTrajectoryPoint]


@dataclass
class KeyValue(IdlStruct, typename="diagnostic_msgs::msg::dds_::KeyValue_"):
    key: str
    value: str


@dataclass
class DiagnosticStatus(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticStatus_"):
    level: types.uint8
    name: str
    message: str
    hardware_id: str
    values: types.sequence[KeyValue]


@dataclass
class DiagnosticArray(IdlStruct, typename="diagnostic_msgs::msg::dds_::DiagnosticArray_"):
    header: Header
    status: types.sequence[DiagnosticStatus]


@dataclass
class Clock(IdlStruct, typename="rosgraph_msgs::msg::dds_::Clock_"):
    clock: Time


@dataclass
class _ImageHead(IdlStruct):
    header: Header
    height: types.uint32
    width: types.uint32
    encoding: str
    is_bigendian: types.uint8
    step: types.uint32


@dataclass
class _CompressedImageHead(IdlStruct):
    header: Header
    format: str


def _serialize(sample: Any, buffer: Any = None, endianness: Any = None, use_version_2: bool | None = None) -> bytes:
    """For a type whose last field, `data`, is a sequence of bytes; `HEAD` is a type of all fields in front of it."""
    head = sample.HEAD(*(getattr(sample, field.name) for field in fields(sample.HEAD)))
    encoded = head.serialize(endianness=endianness, use_version_2=use_version_2)
    order = "<" if encoded[1] & 1 else ">"
    return b"".join([encoded, bytes(-len(encoded) % 4), struct.pack(order + "I", len(sample.data)), sample.data])


def _deserialize(kind: Any, data: bytes, has_header: bool = True, use_version_2: bool | None = None) -> Any:
    """Inverse. Raises ValueError: the sample ends before its bytes do."""
    head = kind.HEAD.deserialize(data, has_header=has_header, use_version_2=use_version_2)
    encoded = len(head.serialize(use_version_2=data[1] > 3))  # no other way to learn where it ends
    begin = encoded + (-encoded % 4)
    (length,) = struct.unpack_from(("<" if data[1] & 1 else ">") + "I", data, begin)
    payload = memoryview(data)[begin + 4 : begin + 4 + length]
    if len(payload) != length:
        raise ValueError(f"sample of {kind.__name__} has {len(payload)} of {length} bytes")
    return kind(*(getattr(head, field.name) for field in fields(kind.HEAD)), payload)


# Not a common base class: the binding takes the first base of a type for the struct that it extends.
@dataclass
class Image(IdlStruct, typename="sensor_msgs::msg::dds_::Image_"):
    HEAD = _ImageHead
    serialize = _serialize
    deserialize = classmethod(_deserialize)

    header: Header
    height: types.uint32
    width: types.uint32
    encoding: str
    is_bigendian: types.uint8
    step: types.uint32
    data: types.sequence[types.uint8]


@dataclass
class CompressedImage(IdlStruct, typename="sensor_msgs::msg::dds_::CompressedImage_"):
    HEAD = _CompressedImageHead
    serialize = _serialize
    deserialize = classmethod(_deserialize)

    header: Header
    format: str
    data: types.sequence[types.uint8]


def topic_name(ros_name: str) -> str:
    """DDS name of a ROS 2 topic (`/camera/image_raw`)."""
    return f"rt/{ros_name.lstrip('/')}"
