"""How long a server's health routes take to answer, asked again and again by a thread.

Source: spec/session_protocol.md 2.7, 9 (health answers whatever is in progress).
"""

from __future__ import annotations

import http.client
import threading
import time
from types import TracebackType

HEALTH_ROUTES = ("/health", "/readyz", "/metrics")


class HealthProbe:
    """Asks every route over a connection of its own, in turn, until the block ends.

    Args:
        host, port: of the server.
        pause_s: between two questions.
        timeout_s: a route that takes longer has failed.
    """

    def __init__(self, host: str, port: int, *, pause_s: float = 0.1, timeout_s: float = 10.0):
        self._host, self._port, self._pause_s, self._timeout_s = host, port, pause_s, timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health-probe", daemon=True)
        self.took_ms: dict[str, list[float]] = {route: [] for route in HEALTH_ROUTES}
        """Route -> milliseconds of every answer, the connection included."""
        self.asked_s: dict[str, list[float]] = {route: [] for route in HEALTH_ROUTES}
        """Route -> when each of them was asked for, on the machine's monotonic clock."""
        self.failures: list[str] = []
        """What was not answered with 200 in time, in words."""

    def __enter__(self) -> HealthProbe:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            for route in HEALTH_ROUTES:
                self._ask(route)
                self._stop.wait(self._pause_s)

    def _ask(self, route: str) -> None:
        line = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        start_s = time.monotonic()
        try:
            line.request("GET", route)
            answer = line.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.failures.append(f"{route}: {type(error).__name__} {error}")
            return
        finally:
            line.close()
        if answer.status != 200:
            self.failures.append(f"{route}: status {answer.status}")
        else:
            self.asked_s[route].append(start_s)
            self.took_ms[route].append((time.monotonic() - start_s) * 1e3)
