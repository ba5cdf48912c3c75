"""The policy's heartbeat: tells the setpoint process, many times a second, that policy and server are alive.

A beat carries the time at which the server last answered a ping, so a server that was killed or stopped is as silent
as a policy that was. Two threads of their own: asking the server may take long, beating must not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from worldvln_edge.client import AnswerTimeoutError, ServerError, ServerUnreachableError, SessionClient
from worldvln_edge.ros_bridge.setpoints.policy_link import Alive, LinkError, PolicyLink

_log = logging.getLogger(__name__)
_BEAT_S = 0.01
_PAUSE_S = 0.1
"""Before a server that does not answer is asked again."""


class PolicyHeartbeat:
    """Beats from `start` to `stop`, or until the setpoint process has gone.

    Args:
        link: to the setpoint process.
        new_client: opens a connection to the server, for pings alone.
    """

    def __init__(self, link: PolicyLink, new_client: Callable[[], SessionClient]):
        self._link, self._new_client = link, new_client
        self._stopping = threading.Event()
        self._server_seen_ns: int | None = None
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._ping, "server pings"), (self._beat, "heartbeat"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Also where it was not started."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _beat(self) -> None:
        while not self._stopping.wait(_BEAT_S):
            if self._server_seen_ns is None:
                continue  # no server yet, so there is nothing alive
            try:
                self._link.send(Alive(seen_ns=self._server_seen_ns))
            except LinkError:
                # A setpoint process that stood still for long has lost words of ours: whoever flies has to begin anew,
                # and must not go on without a heartbeat.
                self._link.close()
                return

    def _ping(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._new_client() as client:
                    while not self._stopping.wait(_BEAT_S):
                        client.ping()
                        self._server_seen_ns = time.monotonic_ns()
            except (ServerUnreachableError, AnswerTimeoutError, ServerError) as failure:
                _log.warning("the server does not answer pings: %s", failure)
                self._stopping.wait(_PAUSE_S)
