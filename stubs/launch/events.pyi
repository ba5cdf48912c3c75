from collections.abc import Callable
from typing import Any

from launch import Action

def matches_action(action: Action) -> Callable[[Any], bool]: ...
