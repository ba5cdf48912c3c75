"""How punctually the setpoint loop runs: lateness of its ticks over the last seconds."""

from __future__ import annotations

from collections import deque

import numpy as np

from worldvln_edge.ros_bridge.diagnostics import Diagnostic, ok, warning

CHECK = "setpoint/rate"
_LATE_MS = 10.0


class LoopTiming:
    """Keeps the last `window` ticks."""

    def __init__(self, rate_hz: float, window: int = 400):
        self._rate_hz = rate_hz
        self._late_ns: deque[int] = deque(maxlen=window)
        self._ticked_ns: deque[int] = deque(maxlen=window)

    def add(self, due_ns: int, at_ns: int) -> None:
        """A tick that was due at `due_ns` began at `at_ns`."""
        self._late_ns.append(at_ns - due_ns)
        self._ticked_ns.append(at_ns)

    @property
    def rate_hz(self) -> float:
        """Ticks a second; 0 before there are two."""
        if len(self._ticked_ns) < 2:
            return 0.0
        return (len(self._ticked_ns) - 1) * 1e9 / (self._ticked_ns[-1] - self._ticked_ns[0])

    def late_ms(self, percentile: float) -> float:
        """Lateness in ms; 0 before the first tick."""
        return float(np.percentile(np.array(self._late_ns), percentile)) / 1e6 if self._late_ns else 0.0

    @property
    def diagnostic(self) -> Diagnostic:
        late = self.late_ms(99)
        text = f"{self.rate_hz:.1f} of {self._rate_hz:g} setpoints a second, 99 of 100 at most {late:.1f} ms late"
        if late <= _LATE_MS:
            return ok(CHECK, text)
        return warning(CHECK, text, "give the setpoint process a core of its own, or a real-time priority (chrt)")
