from launch.substitutions import LaunchConfiguration

class IfCondition:
    def __init__(self, predicate_expression: LaunchConfiguration | str) -> None: ...
