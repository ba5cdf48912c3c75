from collections.abc import Sequence

from std_msgs.msg import Header

class Point:
    x: float
    y: float
    z: float
    def __init__(self, *, x: float = ..., y: float = ..., z: float = ...) -> None: ...

class Pose:
    position: Point
    orientation: Quaternion
    def __init__(self, *, position: Point = ..., orientation: Quaternion = ...) -> None: ...

class PoseStamped:
    header: Header
    pose: Pose
    def __init__(self, *, header: Header = ..., pose: Pose = ...) -> None: ...

class PoseWithCovariance:
    pose: Pose
    covariance: Sequence[float]
    def __init__(self, *, pose: Pose = ..., covariance: Sequence[float] = ...) -> None: ...

class Quaternion:
    x: float
    y: float
    z: float
    w: float
    def __init__(self, *, x: float = ..., y: float = ..., z: float = ..., w: float = ...) -> None: ...

class Transform:
    translation: Vector3
    rotation: Quaternion
    def __init__(self, *, translation: Vector3 = ..., rotation: Quaternion = ...) -> None: ...

class TransformStamped:
    header: Header
    child_frame_id: str
    transform: Transform
    def __init__(self, *, header: Header = ..., child_frame_id: str = ..., transform: Transform = ...) -> None: ...

class Twist:
    linear: Vector3
    angular: Vector3
    def __init__(self, *, linear: Vector3 = ..., angular: Vector3 = ...) -> None: ...

class TwistStamped:
    header: Header
    twist: Twist
    def __init__(self, *, header: Header = ..., twist: Twist = ...) -> None: ...

class TwistWithCovariance:
    twist: Twist
    covariance: Sequence[float]
    def __init__(self, *, twist: Twist = ..., covariance: Sequence[float] = ...) -> None: ...

class Vector3:
    x: float
    y: float
    z: float
    def __init__(self, *, x: float = ..., y: float = ..., z: float = ...) -> None: ...
