from collections.abc import Sequence

from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Transform, Twist
from std_msgs.msg import Header

class MultiDOFJointTrajectory:
    header: Header
    joint_names: Sequence[str]
    points: Sequence[MultiDOFJointTrajectoryPoint]
    def __init__(
        self,
        *,
        header: Header = ...,
        joint_names: Sequence[str] = ...,
        points: Sequence[MultiDOFJointTrajectoryPoint] = ...,
    ) -> None: ...

class MultiDOFJointTrajectoryPoint:
    transforms: Sequence[Transform]
    velocities: Sequence[Twist]
    accelerations: Sequence[Twist]
    time_from_start: Duration
    def __init__(
        self,
        *,
        transforms: Sequence[Transform] = ...,
        velocities: Sequence[Twist] = ...,
        accelerations: Sequence[Twist] = ...,
        time_from_start: Duration = ...,
    ) -> None: ...
