from collections.abc import Sequence

class FloatingPointRange:
    def __init__(self, *, from_value: float = ..., to_value: float = ..., step: float = ...) -> None: ...

class IntegerRange:
    def __init__(self, *, from_value: int = ..., to_value: int = ..., step: int = ...) -> None: ...

class ParameterDescriptor:
    def __init__(
        self,
        *,
        description: str = ...,
        additional_constraints: str = ...,
        read_only: bool = ...,
        floating_point_range: Sequence[FloatingPointRange] = ...,
        integer_range: Sequence[IntegerRange] = ...,
    ) -> None: ...
