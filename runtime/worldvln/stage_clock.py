"""How long every stage of a segment took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Adds up the time of named stages. Not thread-safe; stages do not nest."""

    def __init__(self) -> None:
        self._spent_ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block; one that fails counts too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent_ms[stage] = self._spent_ms.get(stage, 0.0) + (time.perf_counter() - start) * 1e3

    def take(self) -> dict[str, float]:
        """Stage -> milliseconds since the last call, in the order in which stages were first met."""
        spent, self._spent_ms = self._spent_ms, {}
        return spent
