"""Run a session server: in this process until a signal comes, or in a thread of it.

Source: spec/session_protocol.md 2.8.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from worldvln_edge.runtime.doors.listen_address import AddressInUseError
from worldvln_edge.runtime.doors.memory_upkeep import collect_only_what_is_new, give_back_free_memory
from worldvln_edge.runtime.doors.session_server import DEFAULT_HOST, DEFAULT_PORT, SessionServer
from worldvln_edge.runtime.doors.systemd_watchdog import SystemdNotifier
from worldvln_edge.runtime.doors.zmq_endpoint import ZmqEndpointError
from worldvln_edge.runtime.sessions.policy import Policy
from worldvln_edge.runtime.sessions.warm_up import WarmUpError


def serve(
    policy: Policy,
    host: str | None = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    *,
    on_ready: Callable[[str], None] | None = None,
    systemd: SystemdNotifier | None = None,
    **options: Any,
) -> None:
    """Serve until SIGTERM or SIGINT. Options are those of SessionServer.

    Args:
        on_ready: called with `SessionServer.addresses`, separated by blanks, once sessions can be started.
        systemd: told when the server is ready, alive, and stopping.

    Raises:
        UnsafeAddressError, ZmqEndpointError: see SessionServer.
        AddressInUseError: somebody else listens there, or the address is not this machine's.
        WarmUpError: the policy cannot fly here.
    """
    server = SessionServer(policy, host, port, **options)

    async def run() -> None:
        serving = asyncio.create_task(_serve(server))
        while not (server.is_listening and server.manager.is_ready) and not serving.done():
            await asyncio.sleep(0.01)
        if serving.done():
            return await serving
        collect_only_what_is_new()
        beside = [asyncio.create_task(give_back_free_memory(lambda: server.manager.queue == 0))]
        if systemd is not None:
            systemd.tell(f"READY=1\nSTATUS=ready at {' '.join(server.addresses)}")
            beside.append(asyncio.create_task(systemd.keep_alive(lambda: server.manager.device_work_s)))
        if on_ready is not None:
            on_ready(" ".join(server.addresses))
        try:
            await serving
        finally:
            for task in beside:
                task.cancel()
            if systemd is not None:
                systemd.tell("STOPPING=1")

    asyncio.run(run())


async def _serve(server: SessionServer) -> None:
    await server.serve()
    if server.failure is not None:
        raise server.failure


class BackgroundServer:
    """A server in a thread of this process, as a context manager: for flights, tests and measurements on one machine.

    Takes the arguments of SessionServer; the port defaults to a free one, and it warms up only when told to.
    """

    def __init__(self, policy: Policy, host: str | None = DEFAULT_HOST, port: int = 0, **options: Any):
        self.server = SessionServer(policy, host, port, **{"warm_up": False, **options})
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="session-server", daemon=True)

    @property
    def url(self) -> str:
        return self.server.url

    def _run(self) -> None:
        try:
            asyncio.run(_serve(self.server))
        except (AddressInUseError, WarmUpError, ZmqEndpointError, OSError) as error:
            self._failure = error

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        while not (self.server.is_listening and self.server.manager.is_ready):
            self._thread.join(0.005)
            if not self._thread.is_alive():
                raise self._failure or RuntimeError("the server's thread ended before it was ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.should_exit = True
        self._thread.join()
