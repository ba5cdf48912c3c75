from collections.abc import Callable
from enum import Enum
from typing import Any

from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node

class GoalResponse(Enum):
    REJECT = ...
    ACCEPT = ...

class CancelResponse(Enum):
    REJECT = ...
    ACCEPT = ...

class ActionServer:
    def __init__(
        self,
        node: Node,
        action_type: Any,
        action_name: str,
        execute_callback: Callable[[ServerGoalHandle], Any],
        *,
        callback_group: CallbackGroup | None = ...,
        goal_callback: Callable[[Any], GoalResponse] = ...,
        cancel_callback: Callable[[ServerGoalHandle], CancelResponse] = ...,
    ) -> None: ...
    def destroy(self) -> None: ...
