from collections.abc import Sequence

from geometry_msgs.msg import PoseStamped, PoseWithCovariance, TwistWithCovariance
from std_msgs.msg import Header

class Odometry:
    header: Header
    child_frame_id: str
    pose: PoseWithCovariance
    twist: TwistWithCovariance
    def __init__(
        self,
        *,
        header: Header = ...,
        child_frame_id: str = ...,
        pose: PoseWithCovariance = ...,
        twist: TwistWithCovariance = ...,
    ) -> None: ...

class Path:
    header: Header
    poses: Sequence[PoseStamped]
    def __init__(self, *, header: Header = ..., poses: Sequence[PoseStamped] = ...) -> None: ...
