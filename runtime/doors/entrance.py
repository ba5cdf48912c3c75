"""What every WebSocket upgrade has to pass: key and Origin, a server that is ready, a free place.

Source: spec/session_protocol.md 6.2 (Errors), 7.6, 7.8.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.http_errors import error_response
from worldvln_edge.runtime.sessions.session_manager import SessionManager


def client_address(connection: HTTPConnection) -> str:
    """Address that a request or an upgrade came from, without the port."""
    return connection.client.host if connection.client is not None else ""


class Entrance:
    """Shared by the WebSocket doors of one server, so that their clients are counted together."""

    def __init__(self, manager: SessionManager, access: AccessRule):
        self._manager, self._access = manager, access
        self._places_taken = 0

    @asynccontextmanager
    async def admit(self, websocket: WebSocket) -> AsyncIterator[str | None]:
        """Hold a place for one client as long as the context lasts.

        Yields:
            The name space of its sessions; None if the upgrade was refused, which was answered with an HTTP status.
        """
        try:
            peer = self._access.peer(websocket.headers)
            self._manager.request_rate.take(peer or client_address(websocket))
            if not self._manager.is_ready:
                raise ProtocolError("not_ready", "the server is warming up or shutting down")
            if self._places_taken >= self._manager.limits.max_connections:
                raise ProtocolError("overloaded", "the server has as many connections as it accepts")
        except ProtocolError as error:
            self._manager.meter.refused(error.code)
            await websocket.send_denial_response(error_response(error))
            yield None
            return
        self._places_taken += 1  # before anything is awaited: who connects in the meantime must find the place taken
        try:
            yield peer
        finally:
            self._places_taken -= 1
