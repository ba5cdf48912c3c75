from collections.abc import Sequence

from std_msgs.msg import Header

class DiagnosticArray:
    header: Header
    status: Sequence[DiagnosticStatus]
    def __init__(self, *, header: Header = ..., status: Sequence[DiagnosticStatus] = ...) -> None: ...

class DiagnosticStatus:
    level: bytes
    name: str
    message: str
    hardware_id: str
    values: Sequence[KeyValue]
    def __init__(
        self,
        *,
        level: bytes = ...,
        name: str = ...,
        message: str = ...,
        hardware_id: str = ...,
        values: Sequence[KeyValue] = ...,
    ) -> None: ...

class KeyValue:
    key: str
    value: str
    def __init__(self, *, key: str = ..., value: str = ...) -> None: ...
