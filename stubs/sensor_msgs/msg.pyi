from collections.abc import Sequence

from std_msgs.msg import Header

class CompressedImage:
    header: Header
    format: str
    data: Sequence[int] | bytes
    def __init__(self, *, header: Header = ..., format: str = ..., data: Sequence[int] | bytes = ...) -> None: ...

class Image:
    header: Header
    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: Sequence[int] | bytes
    def __init__(
        self,
        *,
        header: Header = ...,
        height: int = ...,
        width: int = ...,
        encoding: str = ...,
        is_bigendian: int = ...,
        step: int = ...,
        data: Sequence[int] | bytes = ...,
    ) -> None: ...
