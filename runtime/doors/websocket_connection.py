"""One WebSocket connection of uvicorn that cannot hold up the others, whatever its client sends.

uvicorn handles whatever one read brought in one go: 40,000 empty messages or pings in 256 kB kept health and all other
clients waiting for two to five seconds.
Source: spec/session_protocol.md 7.6, 7.8, 9 (item 5).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

MOST_FRAGMENTS = 16_384
"""Of one message: 4 kB each in the largest one that is accepted by default."""
_AT_ONCE_BYTES = 4096
"""Taken before others have their turn: up to 682 frames, some 10 ms."""
_GOODBYE_S = 10.0
"""For the last messages, and the client's close frame."""


class BoundedWebSocketConnection(WebSocketsSansIOProtocol):
    """From the upgrade request to the close.

    Args:
        options: those of WebSocketsSansIOProtocol.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._unread = bytearray()
        """Came, and has still to be taken; nothing more is read meanwhile."""
        self._next: asyncio.Handle | None = None
        self._end: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Take the first bytes now, and the others in turn with the other connections."""
        self._unread += data
        if self._next is None and not self.read_paused:
            self._take()
        elif not self.transport.is_closing():
            self.transport.pause_reading()

    def _take(self) -> None:
        self._next = None
        data = bytes(self._unread[:_AT_ONCE_BYTES])
        del self._unread[:_AT_ONCE_BYTES]
        super().data_received(data)
        if self.transport.is_closing():
            self._unread.clear()
        elif self._unread:
            self._go_on()
        elif not self.read_paused:
            self.transport.resume_reading()

    def _go_on(self) -> None:
        """Take what came before anything else is read, unless a message waits for the application."""
        if self._unread and not self.transport.is_closing():
            self.transport.pause_reading()
            if self._next is None and not self.read_paused:
                self._next = self.loop.call_soon(self._take)

    async def receive(self) -> ASGIReceiveEvent:
        """The next message; uvicorn reads on when there is no other."""
        message = await super().receive()
        self._go_on()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        self._unread.clear()
        for handle in (self._next, self._end):
            if handle is not None:
                handle.cancel()
        super().connection_lost(exc)

    def keepalive_timeout(self) -> None:
        """The client does not answer; see `_end_in_time`."""
        super().keepalive_timeout()
        self._end_in_time()

    async def run_asgi(self) -> None:
        """Serve; see `_end_in_time`."""
        await super().run_asgi()
        self._end_in_time()

    def _end_in_time(self) -> None:
        """uvicorn has closed; that waits until the client has read what was written, which some clients never do."""
        if not self.disconnected and self._end is None:
            self._end = self.loop.call_later(_GOODBYE_S, self.transport.abort)

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment. They are kept until the last one; empty ones count for nothing in a message's size."""
        if self.close_sent:
            return
        if len(self.frames) < MOST_FRAGMENTS:
            super().handle_cont(event)
            return
        self.frames = []
        self.conn.fail(CloseCode.MESSAGE_TOO_BIG, f"more than {MOST_FRAGMENTS} fragments")
        self.handle_parser_exception()

    async def send(self, message: ASGISendEvent) -> None:
        """Take a message of the application. A refused upgrade is complete once its answer is written.

        uvicorn would take it for a fault of the application, and log an error for every stranger that is refused.
        """
        await super().send(message)
        self._go_on()  # a close makes uvicorn read on
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True
