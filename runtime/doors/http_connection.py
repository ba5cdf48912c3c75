"""One HTTP connection that cannot be held for nothing: its requests must come in time, and others may need its place.

uvicorn bounds how long a connection may idle between requests, but not how slowly the first one may trickle in, how
many are sent ahead of their answers, or whether the answers are read.
Source: spec/session_protocol.md 7.8.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from worldvln_edge.runtime.doors.connection_room import ConnectionRoom

if TYPE_CHECKING:
    import h11

_MOST_AHEAD_BYTES = 2**20
"""Of requests that were sent before those in front of them were answered."""
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 70\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\n"
    b'{"detail":"the server has no connection to spare","code":"overloaded"}'
)


class BoundedHttpConnection(H11Protocol):
    """One HTTP connection of uvicorn, until it becomes a WebSocket.

    Args:
        room: where it waits.
        options: those of H11Protocol.
    """

    def __init__(self, room: ConnectionRoom, **options: Any):
        super().__init__(**options)
        self._room = room

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._room.make_place():
            self._room.wait(self)
        else:
            transport.write(_FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.stop_waiting(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn reads on whenever the application asks for a body, and keeps what is behind it: without a bound,
        # 256 kB for every small request of a client that does not wait for answers.
        if not self.transport.is_closing() and len(self.conn.trailing_data[0]) > _MOST_AHEAD_BYTES:
            self.give_up()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is None or self.cycle.response_complete:
            return
        if self.cycle.more_body:
            self._room.wait_for_body(self)
        elif not self.flow.write_paused:
            self._room.stop_waiting(self)

    def on_response_complete(self) -> None:
        # Also bounds the rest of a body that was answered before it was read.
        self._room.wait(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read its answers: it keeps its place no longer than one that sends nothing."""
        super().pause_writing()
        self._room.wait(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._room.stop_waiting(self)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._room.stop_waiting(self)
        super().handle_websocket_upgrade(event)

    def give_up(self) -> None:
        """See `connection_room.Guest`."""
        self.transport.abort()  # closing would wait until the client has read what was written
