"""A way to topics: publishes and subscribes ROS messages by the names of their topics. What they hold is `messages`'s.

Every way brings classes of the same messages, with the same fields and keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class DeafWireError(RuntimeError):
    """Handling a message failed, so no more are received; the process has to be started again."""

    def __init__(self) -> None:
        super().__init__("handling a message failed, see the log; no more are received: start this process again")


class Wire(Protocol):
    """Callbacks run in threads of the wire, one at a time. What one raises ends the process: see `publish`."""

    @property
    def types(self) -> Any:
        """The message classes as attributes, as `messages.MessageBuilder` wants them."""
        ...

    def publish(self, topic: str, message: Any) -> None:
        """Write a message. A reader that does not keep up loses messages; nobody waits for it longer than some ms.

        Raises:
            DeafWireError: a callback raised. A process that publishes does not go on without hearing anything.
        """
        ...

    def subscribe(
        self, topic: str, kind: Any, receive: Callable[[Any, str], None], *, must_arrive: bool = False
    ) -> None:
        """Call `receive(message, source)` for every message of class `kind`; `source` differs between publishers.

        Args:
            must_arrive: a message that the network loses is sent again. Publishers that offer no such thing (best
                effort) are then not heard.
        """
        ...

    def readers(self, topic: str, kind: Any) -> int:
        """How many read a topic. The first call announces it, so that readers find it."""
        ...

    def close(self) -> None:
        """Leave; nothing is published afterwards."""
        ...
