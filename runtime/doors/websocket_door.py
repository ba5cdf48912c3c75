"""The native protocol over WebSocket: binary frames are msgpack, text frames JSON, answers use the request's encoding.

Source: spec/session_protocol.md 7 (transports), 7.5 (slow readers), 7.6, 7.8.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from worldvln_edge.protocol import WEBSOCKET_SUBPROTOCOL, Answer, Bye, Encoding
from worldvln_edge.runtime.doors.entrance import Entrance, client_address
from worldvln_edge.runtime.doors.native_connection import NativeConnection
from worldvln_edge.runtime.sessions.meter import Meter
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.wire import encode

_log = logging.getLogger(__name__)
_GOING_AWAY = 1001


class WebSocketDoor:
    """All WebSocket clients of one server."""

    def __init__(self, manager: SessionManager, entrance: Entrance):
        self._manager, self._entrance = manager, entrance
        self._connections: dict[NativeConnection, Outbox] = {}

    async def serve(self, websocket: WebSocket) -> None:
        """One client, from the upgrade request to the close. A refused upgrade is answered with an HTTP status."""
        async with self._entrance.admit(websocket) as peer:
            if peer is not None:
                await self._serve_client(websocket, peer)

    async def _serve_client(self, websocket: WebSocket, peer: str) -> None:
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(subprotocol=WEBSOCKET_SUBPROTOCOL if WEBSOCKET_SUBPROTOCOL in offered else None)
        outbox = Outbox(websocket, self._manager.meter, max_unsent_bytes=self._manager.limits.max_unsent_bytes)
        connection = NativeConnection(
            self._manager, admit=lambda hello: peer, address=peer or client_address(websocket), send=outbox.put
        )
        self._connections[connection] = outbox
        reader = asyncio.create_task(self._read(websocket, connection))
        try:
            await asyncio.wait({reader, outbox.start()}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._connections[connection]
            connection.close()
            outbox.stop()
            reader.cancel()
            await asyncio.wait({reader})
        if not reader.cancelled():
            reader.result()

    @staticmethod
    async def _read(websocket: WebSocket, connection: NativeConnection) -> None:
        while True:
            message = await websocket.receive()
            if message["type"] != "websocket.receive":
                return
            text = message.get("text")
            if text is not None:
                await connection.receive(text.encode(), "json")
            else:
                await connection.receive(message["bytes"], "msgpack")
            await asyncio.sleep(0)  # many small messages come at once, and handling them need not wait for anything

    async def say_bye_to_all(self) -> None:
        """Send what is written so far and `bye` to every client, then close with 1001."""
        connections = dict(self._connections)
        for connection in connections:
            connection.say_bye(Bye(reason="shutdown"))
        await asyncio.gather(*(outbox.finish(_GOING_AWAY) for outbox in connections.values()))


class Outbox:
    """Messages on their way to one client. `put` never blocks; a client that does not read is cut off."""

    def __init__(self, websocket: WebSocket, meter: Meter, *, max_unsent_bytes: int):
        self._websocket, self._meter, self._max_unsent_bytes = websocket, meter, max_unsent_bytes
        self._messages: deque[tuple[bytes, Encoding]] = deque()
        self._unsent_bytes = 0
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._is_closed = False
        self._writer: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin to send. The task ends when the client is gone, or was given up because it does not read."""
        self._writer = asyncio.create_task(self._write())
        return self._writer

    def stop(self) -> None:
        """Send no more; what is queued is dropped."""
        self._is_closed = True
        self._messages.clear()
        self._empty.set()
        if self._writer is not None:
            self._writer.cancel()
            self._writer = None

    def put(self, message: Answer, encoding: Encoding) -> None:
        """Queue a message; after the close it goes nowhere."""
        if self._is_closed:
            return
        data = encode(message, encoding)
        self._messages.append((data, encoding))
        self._unsent_bytes += len(data)
        self._empty.clear()
        self._filled.set()
        if self._unsent_bytes > self._max_unsent_bytes:
            _log.warning("a client lets %d bytes of answers pile up; it is cut off", self._unsent_bytes)
            self._meter.cut_off("websocket")
            self.stop()

    async def _write(self) -> None:
        try:
            while True:
                await self._filled.wait()
                self._filled.clear()
                while self._messages:
                    data, encoding = self._messages.popleft()
                    if encoding == "json":
                        await self._websocket.send_text(data.decode())
                    else:
                        await self._websocket.send_bytes(data)
                    self._unsent_bytes -= len(data)
                self._empty.set()
        except (WebSocketDisconnect, RuntimeError):  # gone, or closed by the other side while we wrote
            self._is_closed = True
            self._empty.set()

    async def finish(self, code: int, timeout_s: float = 2.0) -> None:
        """Let the queued messages go out, then close."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
            if self._websocket.application_state is WebSocketState.CONNECTED:
                await asyncio.wait_for(self._websocket.close(code), timeout_s)
        except (asyncio.TimeoutError, WebSocketDisconnect, RuntimeError):
            pass  # it is gone or does not read; the server closes the socket next
