from collections.abc import Sequence

from geometry_msgs.msg import TransformStamped

class TFMessage:
    transforms: Sequence[TransformStamped]
    def __init__(self, *, transforms: Sequence[TransformStamped] = ...) -> None: ...
