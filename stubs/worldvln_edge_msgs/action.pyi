class FlyInstruction:
    class Goal:
        instruction: str

    class Feedback:
        def __init__(self, *, state: str = ..., chunk: int = ..., actions_flown: float = ...) -> None: ...

    class Result:
        def __init__(
            self, *, was_flown: bool = ..., message: str = ..., what_to_do: str = ..., chunks: int = ...
        ) -> None: ...
