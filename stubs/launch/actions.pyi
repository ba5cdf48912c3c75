from typing import Any

from launch import Action
from launch.conditions import IfCondition

class DeclareLaunchArgument(Action):
    def __init__(self, name: str, *, default_value: str | None = ..., description: str | None = ...) -> None: ...

class EmitEvent(Action):
    def __init__(self, *, event: Any, condition: IfCondition | None = ...) -> None: ...

class RegisterEventHandler(Action):
    def __init__(self, event_handler: Any, *, condition: IfCondition | None = ...) -> None: ...
