"""SIGTERM and SIGINT as a wish that is granted after the running step; a second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """Listens while it is entered; outside the main thread, where Python delivers no signals, it never asks to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
