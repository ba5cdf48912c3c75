"""A way to a server that can go silent: nothing is forwarded any more, and nobody is told (no FIN, no RST)."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Line:
    """One connection through the path."""

    to_client: asyncio.StreamWriter
    to_server: asyncio.StreamWriter
    is_silent: bool = False
    server_closed: threading.Event = field(default_factory=threading.Event)


class NetworkPath:
    """A TCP proxy in a thread: `with NetworkPath(port) as path: ... 127.0.0.1:path.port ...`.

    Args:
        server_port: of 127.0.0.1.
    """

    def __init__(self, server_port: int):
        self._server_port = server_port
        self._lines: list[Line] = []
        self._is_down = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    @property
    def lines(self) -> tuple[Line, ...]:
        """Connections so far, the oldest first."""
        return tuple(self._lines)

    def go_silent(self, *, for_all: bool = False) -> None:
        """Forward nothing over the connections of now; with `for_all`, nor over new ones until `come_back`."""

        def act() -> None:
            self._is_down = for_all
            for line in self._lines:
                self._silence(line)

        self._do(act)

    def come_back(self) -> None:
        """New connections are forwarded again. Old ones stay silent: what was lost on them is lost."""

        def act() -> None:
            self._is_down = False

        self._do(act)

    def __enter__(self) -> "NetworkPath":
        self._thread.start()
        listening = asyncio.start_server(self._carry, "127.0.0.1", 0)
        self._listener = asyncio.run_coroutine_threadsafe(listening, self._loop).result(10)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, act: Callable[[], None]) -> None:
        async def run() -> None:
            act()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    @staticmethod
    def _silence(line: Line) -> None:
        line.is_silent = True
        if not line.to_client.transport.is_closing():
            # Not read, so that a client with much to send finds its buffers full, as behind a dead radio link.
            line.to_client.transport.pause_reading()

    async def _carry(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        line = Line(to_client, to_server)
        self._lines.append(line)
        if self._is_down:
            self._silence(line)
        await asyncio.gather(self._forward(line, from_client, to_server), self._hear(line, from_server))

    @staticmethod
    async def _forward(line: Line, from_client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        try:
            while data := await from_client.read(65536):
                if line.is_silent:
                    return
                to_server.write(data)
                await to_server.drain()
        except OSError:
            pass  # reset: the end comes all the same
        if not line.is_silent:
            to_server.close()

    @staticmethod
    async def _hear(line: Line, from_server: asyncio.StreamReader) -> None:
        try:
            while data := await from_server.read(65536):  # read on in silence, to notice when the server gives up
                if not line.is_silent:
                    line.to_client.write(data)
        except OSError:
            pass
        line.server_closed.set()
        if not line.is_silent:
            line.to_client.close()

    async def _end(self) -> None:
        self._listener.close()
        for line in self._lines:
            line.to_client.transport.abort()
            line.to_server.transport.abort()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
