from collections.abc import Callable
from typing import Any

class ChangeState:
    def __init__(self, *, lifecycle_node_matcher: Callable[[Any], bool], transition_id: int) -> None: ...
