"""Tells systemd when the server is ready, and that it is alive, so that a stuck one is killed and started again.

Alive means that the event loop turns and that no piece of device work runs for longer than `stuck_s`: an engine call
that never returns leaves health and metrics working, and the drone without a policy.

Source: sd_notify(3), systemd.service(5) `Type=notify`, `WatchdogSec=`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

_log = logging.getLogger(__name__)


class SystemdNotifier:
    """The socket that systemd listens on.

    Args:
        address: path of a datagram socket; a leading `@` is the abstract name space.
        watchdog_s: systemd kills the service when it hears nothing for so long; None: it does not watch.
        stuck_s: device work that runs for longer counts as stuck.
    """

    def __init__(self, address: str, *, watchdog_s: float | None = None, stuck_s: float = 60.0):
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_s, self._stuck_s = watchdog_s, stuck_s

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, *, stuck_s: float = 60.0
    ) -> SystemdNotifier | None:
        """As systemd passes it to a service; None for a process that is no service, or not its main process."""
        address = environment.get("NOTIFY_SOCKET")
        if not address:
            return None
        period = environment.get("WATCHDOG_USEC", "")
        is_watched = (
            period.isdecimal()
            and int(period) > 0
            and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        )
        return cls(address, watchdog_s=int(period) / 1e6 if is_watched else None, stuck_s=stuck_s)

    def tell(self, state: str) -> None:
        """Send `READY=1`, `STOPPING=1`, `WATCHDOG=1` or the like; a systemd that is gone is logged, nothing else."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to_systemd:
                to_systemd.setblocking(False)  # the event loop waits for nobody
                to_systemd.sendto(state.encode(), self._address)
        except OSError as error:
            _log.warning("systemd was not told %s: %s", state.partition("\n")[0], error)

    async def keep_alive(self, running_s: Callable[[], float]) -> None:
        """Tell systemd three times in every period that the server is alive, as long as it is.

        Args:
            running_s: how long the longest piece of device work runs now, 0 without any.
        """
        if self.watchdog_s is None:
            return
        was_stuck = False
        while True:
            is_stuck = running_s() > self._stuck_s
            if not is_stuck:
                self.tell("WATCHDOG=1")
            elif not was_stuck:
                _log.error("device work runs for more than %.0f s; the watchdog is not fed any more", self._stuck_s)
            was_stuck = is_stuck
            await asyncio.sleep(self.watchdog_s / 3)
