"""HTTP connections that cannot be held for nothing: headers must arrive in time, and there are only so many places.

uvicorn bounds how long a connection may idle between requests, but not how slowly the first one may trickle in.
Source: spec/session_protocol.md 7.8.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from worldvln_edge.protocol import Limits

if TYPE_CHECKING:
    import h11

SPARE_CONNECTIONS = 64
"""Above `max_connections`, so that health and metrics are answered while clients take all of their places."""
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 70\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\n"
    b'{"detail":"the server has no connection to spare","code":"overloaded"}'
)


class BoundedHttpConnection(H11Protocol):
    """One HTTP connection of uvicorn. Made by `bounded_http`."""

    limits: ClassVar[Limits]

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections + SPARE_CONNECTIONS:
            transport.write(_FULL)
            transport.close()
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()  # the headers are here; how long the body may take is the route's business

    def on_response_complete(self) -> None:
        # Also bounds the rest of a body that was answered before it was read.
        self._arm()
        super().on_response_complete()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._disarm()
        super().handle_websocket_upgrade(event)

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.limits.headers_within_s, self._give_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


def bounded_http(limits: Limits) -> type[BoundedHttpConnection]:
    """The connection class for `uvicorn.Config(http=...)`."""
    return type("BoundedHttpConnection", (BoundedHttpConnection,), {"limits": limits})
