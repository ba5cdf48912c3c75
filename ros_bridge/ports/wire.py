"""A way to topics: publishes and subscribes ROS messages by the names of their topics. What they hold is `messages`'s.

Every way brings classes of the same messages, with the same fields and keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Wire(Protocol):
    """Callbacks run in threads of the wire, one at a time."""

    @property
    def types(self) -> Any:
        """The message classes as attributes, as `messages.MessageBuilder` wants them."""
        ...

    def publish(self, topic: str, message: Any) -> None:
        """Write a message. A reader that does not keep up loses messages; nobody waits for it longer than some ms."""
        ...

    def subscribe(self, topic: str, kind: Any, receive: Callable[[Any, str], None]) -> None:
        """Call `receive(message, source)` for every message of class `kind`; `source` differs between publishers."""
        ...

    def readers(self, topic: str, kind: Any) -> int:
        """How many read a topic. The first call announces it, so that readers find it."""
        ...

    def close(self) -> None: ...
