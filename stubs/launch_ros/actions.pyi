from collections.abc import Sequence
from typing import Any

from launch import Action
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration

class Node(Action):
    def __init__(
        self,
        *,
        package: str,
        executable: str,
        name: str | None = ...,
        namespace: str | None = ...,
        output: str | None = ...,
        parameters: Sequence[Any] | None = ...,
        arguments: Sequence[str | LaunchConfiguration] | None = ...,
        condition: IfCondition | None = ...,
    ) -> None: ...

class LifecycleNode(Node): ...
