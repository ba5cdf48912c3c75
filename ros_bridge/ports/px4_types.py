"""The three of PX4's messages that the bridge speaks, as DDS types (see `dds_types`): those of PX4 1.14 and later.

PX4's uXRCE-DDS client puts them below /fmu. Times are microseconds; frames are NED and forward-right-down.
"""

# No `from __future__ import annotations`: the binding reads the annotations as types.

from dataclasses import dataclass

from cyclonedds.idl import IdlStruct, types


@dataclass
class TrajectorySetpoint(IdlStruct, typename="px4_msgs::msg::dds_::TrajectorySetpoint_"):
    timestamp: types.uint64
    position: types.array[types.float32, 3]
    velocity: types.array[types.float32, 3]
    acceleration: types.array[types.float32, 3]
    jerk: types.array[types.float32, 3]
    yaw: types.float32
    yawspeed: types.float32


@dataclass
class OffboardControlMode(IdlStruct, typename="px4_msgs::msg::dds_::OffboardControlMode_"):
    timestamp: types.uint64
    position: bool
    velocity: bool
    acceleration: bool
    attitude: bool
    body_rate: bool
    thrust_and_torque: bool
    direct_actuator: bool


@dataclass
class VehicleOdometry(IdlStruct, typename="px4_msgs::msg::dds_::VehicleOdometry_"):
    timestamp: types.uint64
    timestamp_sample: types.uint64
    pose_frame: types.uint8
    position: types.array[types.float32, 3]
    q: types.array[types.float32, 4]
    velocity_frame: types.uint8
    velocity: types.array[types.float32, 3]
    angular_velocity: types.array[types.float32, 3]
    position_variance: types.array[types.float32, 3]
    orientation_variance: types.array[types.float32, 3]
    velocity_variance: types.array[types.float32, 3]
    reset_counter: types.uint8
    quality: types.int8
