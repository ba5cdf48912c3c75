from collections.abc import Sequence

from launch import Action

class OnStateTransition:
    def __init__(
        self,
        *,
        entities: Sequence[Action],
        target_lifecycle_node: Action | None = ...,
        start_state: str | None = ...,
        goal_state: str | None = ...,
    ) -> None: ...
