"""One ZeroMQ client of the server: its messages in order, and its answers on their way out.

Source: spec/session_protocol.md 7 (transports), 7.5 (slow readers).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from worldvln_edge.protocol import Answer, Encoding, Limits
from worldvln_edge.runtime.doors.native_connection import NativeConnection
from worldvln_edge.runtime.sessions.meter import Meter
from worldvln_edge.wire import encode

_log = logging.getLogger(__name__)
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.005, 0.25


class PipeFullError(RuntimeError):
    """The client's high-water mark is reached: it does not read."""


class PeerGoneError(RuntimeError):
    """There is no such client any more."""


class ZmqClient:
    """What the door keeps of one routing identity.

    Args:
        envelope: frames in front of each answer: ZeroMQ's name of the client, and an empty one if it is a REQ socket.
        link: number of its connection; another one under the same identity is another client.
        limits: how much may pile up.
        meter: is told when the client is cut off.
        stalled_after_s: how long a client may take nothing at all while answers wait for it.
        send: gives one message for this client to the socket, or raises PipeFullError or PeerGoneError; never blocks.
        on_end: called once the client is to be forgotten: gone, or cut off.
    """

    connection: NativeConnection

    def __init__(
        self,
        envelope: tuple[bytes, ...],
        link: int,
        *,
        limits: Limits,
        meter: Meter,
        stalled_after_s: float,
        send: Callable[[ZmqClient, bytes], None],
        on_end: Callable[[ZmqClient], None],
    ):
        self.envelope, self.link = envelope, link
        self.has_left = False
        """Its connection ended: what it sent before is handled, answers go nowhere."""
        self.is_closed = False
        self._inbox: asyncio.Queue[tuple[bytes, Encoding] | None] = asyncio.Queue()
        self.last_heard_s = asyncio.get_running_loop().time()
        self._limits, self._meter, self._stalled_after_s = limits, meter, stalled_after_s
        self._send, self._on_end = send, on_end
        self._answers: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._stalled_since_s: float | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = _FIRST_RETRY_S
        self._reader: asyncio.Task[None] | None = None

    @property
    def identity(self) -> bytes:
        return self.envelope[0]

    @property
    def has_unsent(self) -> bool:
        return bool(self._answers)

    @property
    def is_busy(self) -> bool:
        """Whether something is unread, unanswered or unsent."""
        return bool(self._answers) or not self._inbox.empty() or self.connection.unanswered > 0

    def start(self, on_read: Callable[[int], None]) -> None:
        """Begin to handle the inbox; `on_read` is told the size of each message that was parsed."""
        self._reader = asyncio.create_task(self._read(on_read))
        self._reader.add_done_callback(self._read_ended)

    def take(self, data: bytes, encoding: Encoding) -> None:
        """Put a message behind those that came before it."""
        self._inbox.put_nowait((data, encoding))

    def finish(self) -> None:
        """The client left: end once the messages that it sent before were handled."""
        self._inbox.put_nowait(None)

    async def _read(self, on_read: Callable[[int], None]) -> None:
        while (message := await self._inbox.get()) is not None:
            try:
                await self.connection.receive(*message)
            finally:
                on_read(len(message[0]))
                del message  # not kept until the next one comes, nor in the traceback of a client that is cut off
            await asyncio.sleep(0)  # nor need handling it have waited for anything
        self._end()

    def _read_ended(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled() and (error := reader.exception()) is not None:
            _log.error("a client's messages could not be handled; it is cut off", exc_info=error)
            self._end()

    def put(self, message: Answer, encoding: Encoding) -> None:
        """Send a message, or keep it until the client reads; after the end it goes nowhere."""
        if self.is_closed or self.has_left:
            return
        data = encode(message, encoding)
        self._answers.append(data)
        self._unsent_bytes += len(data)
        if self._retry is None:
            self._flush()
        if self._unsent_bytes > self._limits.max_unsent_bytes:
            _log.warning("a client lets %d bytes of answers pile up; it is cut off", self._unsent_bytes)
            self._cut_off()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        self._retry = None
        while self._answers and not self.is_closed:
            try:
                self._send(self, self._answers[0])
            except PeerGoneError:
                self._end()
                return
            except PipeFullError:
                since_s = self._stalled_since_s = self._stalled_since_s or loop.time()
                if loop.time() - since_s > self._stalled_after_s:
                    _log.warning("a client reads nothing for %g s; it is cut off", self._stalled_after_s)
                    self._cut_off()
                    return
                # ZeroMQ tells when any client reads again, not when this one does, so we ask.
                self._retry = loop.call_later(self._retry_s, self._flush)
                self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
                return
            self._unsent_bytes -= len(self._answers.popleft())
            self._stalled_since_s, self._retry_s = None, _FIRST_RETRY_S

    def close(self) -> int:
        """Drop what waits in both directions; sessions stay. Returns the bytes that were never parsed."""
        self.is_closed = True
        self.connection.close()
        if self._retry is not None:
            self._retry.cancel()
        self._answers.clear()
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None  # a task knows its client, and what knows each other stays until the collector comes
        unread = 0
        while not self._inbox.empty():
            message = self._inbox.get_nowait()
            unread += 0 if message is None else len(message[0])
        return unread

    def _cut_off(self) -> None:
        if not self.is_closed:
            self._meter.cut_off("zmq")
            self._end()

    def _end(self) -> None:
        if not self.is_closed:
            self._on_end(self)
