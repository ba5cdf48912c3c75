"""Topics within a process: every message goes to all who subscribed its topic, in the publisher's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class _Types:
    """Message classes of any name, with any fields."""

    level = int

    def __getattr__(self, name: str) -> Any:
        return type(name, (SimpleNamespace,), {})


class MemoryTopics:
    """What several wires share. `loses(topic, number)` says which messages (from 1 on) are lost on the way."""

    def __init__(self) -> None:
        self.receivers: dict[str, list[Callable[[Any, str], None]]] = {}
        self.published: dict[str, list[Any]] = {}
        self.loses: Callable[[str, int], bool] = lambda topic, number: False
        self.lock = threading.RLock()


class MemoryWire:
    """See `wire.Wire`."""

    types = _Types()

    def __init__(self, topics: MemoryTopics, source: str = "memory"):
        self._topics, self._source = topics, source

    def publish(self, topic: str, message: Any) -> None:
        with self._topics.lock:
            messages = self._topics.published.setdefault(topic, [])
            messages.append(message)
            receivers = list(self._topics.receivers.get(topic, []))
            is_lost = self._topics.loses(topic, len(messages))
        if not is_lost:
            for receive in receivers:
                receive(message, self._source)

    def subscribe(
        self, topic: str, kind: Any, receive: Callable[[Any, str], None], *, must_arrive: bool = False
    ) -> None:
        with self._topics.lock:
            self._topics.receivers.setdefault(topic, []).append(receive)

    def readers(self, topic: str, kind: Any) -> int:
        return len(self._topics.receivers.get(topic, []))

    def close(self) -> None:
        pass
