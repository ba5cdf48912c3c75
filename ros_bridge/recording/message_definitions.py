"""Definitions of the messages that are recorded, as a recording carries them: it can be read without ROS.

Fields stand in the order of the .msg files, without comments, constants and defaults: none of them is on the wire. A
test compares them with those of ROS 2.
Source: common_interfaces (ROS 2); px4_msgs of PX4 1.14 and later.
"""

from __future__ import annotations

_FIELDS: dict[str, str] = {
    "builtin_interfaces/msg/Time": "int32 sec\nuint32 nanosec",
    "builtin_interfaces/msg/Duration": "int32 sec\nuint32 nanosec",
    "std_msgs/msg/Header": "builtin_interfaces/Time stamp\nstring frame_id",
    "std_msgs/msg/String": "string data",
    "rosgraph_msgs/msg/Clock": "builtin_interfaces/Time clock",
    "geometry_msgs/msg/Vector3": "float64 x\nfloat64 y\nfloat64 z",
    "geometry_msgs/msg/Point": "float64 x\nfloat64 y\nfloat64 z",
    "geometry_msgs/msg/Quaternion": "float64 x\nfloat64 y\nfloat64 z\nfloat64 w",
    "geometry_msgs/msg/Pose": "geometry_msgs/Point position\ngeometry_msgs/Quaternion orientation",
    "geometry_msgs/msg/PoseStamped": "std_msgs/Header header\ngeometry_msgs/Pose pose",
    "geometry_msgs/msg/PoseWithCovariance": "geometry_msgs/Pose pose\nfloat64[36] covariance",
    "geometry_msgs/msg/Twist": "geometry_msgs/Vector3 linear\ngeometry_msgs/Vector3 angular",
    "geometry_msgs/msg/TwistStamped": "std_msgs/Header header\ngeometry_msgs/Twist twist",
    "geometry_msgs/msg/TwistWithCovariance": "geometry_msgs/Twist twist\nfloat64[36] covariance",
    "geometry_msgs/msg/Transform": "geometry_msgs/Vector3 translation\ngeometry_msgs/Quaternion rotation",
    "geometry_msgs/msg/TransformStamped": (
        "std_msgs/Header header\nstring child_frame_id\ngeometry_msgs/Transform transform"
    ),
    "tf2_msgs/msg/TFMessage": "geometry_msgs/TransformStamped[] transforms",
    "nav_msgs/msg/Odometry": (
        "std_msgs/Header header\nstring child_frame_id\ngeometry_msgs/PoseWithCovariance pose\n"
        "geometry_msgs/TwistWithCovariance twist"
    ),
    "nav_msgs/msg/Path": "std_msgs/Header header\ngeometry_msgs/PoseStamped[] poses",
    "sensor_msgs/msg/Image": (
        "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\n"
        "uint8[] data"
    ),
    "sensor_msgs/msg/CompressedImage": "std_msgs/Header header\nstring format\nuint8[] data",
    "diagnostic_msgs/msg/KeyValue": "string key\nstring value",
    "diagnostic_msgs/msg/DiagnosticStatus": (
        "byte level\nstring name\nstring message\nstring hardware_id\ndiagnostic_msgs/KeyValue[] values"
    ),
    "diagnostic_msgs/msg/DiagnosticArray": "std_msgs/Header header\ndiagnostic_msgs/DiagnosticStatus[] status",
    "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint": (
        "geometry_msgs/Transform[] transforms\ngeometry_msgs/Twist[] velocities\n"
        "geometry_msgs/Twist[] accelerations\nbuiltin_interfaces/Duration time_from_start"
    ),
    "trajectory_msgs/msg/MultiDOFJointTrajectory": (
        "std_msgs/Header header\nstring[] joint_names\ntrajectory_msgs/MultiDOFJointTrajectoryPoint[] points"
    ),
    "px4_msgs/msg/TrajectorySetpoint": (
        "uint64 timestamp\nfloat32[3] position\nfloat32[3] velocity\nfloat32[3] acceleration\nfloat32[3] jerk\n"
        "float32 yaw\nfloat32 yawspeed"
    ),
    "px4_msgs/msg/OffboardControlMode": (
        "uint64 timestamp\nbool position\nbool velocity\nbool acceleration\nbool attitude\nbool body_rate\n"
        "bool thrust_and_torque\nbool direct_actuator"
    ),
    "px4_msgs/msg/VehicleOdometry": (
        "uint64 timestamp\nuint64 timestamp_sample\nuint8 pose_frame\nfloat32[3] position\nfloat32[4] q\n"
        "uint8 velocity_frame\nfloat32[3] velocity\nfloat32[3] angular_velocity\nfloat32[3] position_variance\n"
        "float32[3] orientation_variance\nfloat32[3] velocity_variance\nuint8 reset_counter\nint8 quality"
    ),
}
MESSAGES = tuple(_FIELDS)
_BORDER = "=" * 80


def message_definition(name: str) -> str:
    """Definition of a message and of all that it is made of, in MCAP's encoding `ros2msg`.

    Args:
        name: one of MESSAGES.
    """
    needed: list[str] = []
    _collect(name, needed)
    parts = [_FIELDS[name], *(f"{_BORDER}\nMSG: {part.replace('/msg/', '/')}\n{_FIELDS[part]}" for part in needed[1:])]
    return "\n".join(parts) + "\n"


def _collect(name: str, needed: list[str]) -> None:
    if name in needed:
        return
    needed.append(name)
    for line in _FIELDS[name].splitlines():
        kind = line.split(" ")[0].split("[")[0]
        if "/" in kind:
            _collect(kind.replace("/", "/msg/"), needed)
