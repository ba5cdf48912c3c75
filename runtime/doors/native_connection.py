"""One client of the native protocol, whatever carries its messages: hello first, then requests, one answer each.

A transport feeds `receive` with messages in order and gives a `send` that never blocks.
Source: spec/session_protocol.md 7.1, 7.2, 7.5.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from worldvln_edge import __version__
from worldvln_edge.poses import ACTION_ORDER, ACTION_UNITS
from worldvln_edge.protocol import (
    PROTOCOL_VERSION,
    ActionInfo,
    Answer,
    Bye,
    Cancel,
    Encoding,
    End,
    Hello,
    ImageInfo,
    ModelInfo,
    Observe,
    Ping,
    Pong,
    ProtocolError,
    Request,
    ServerInfo,
    Start,
    Welcome,
)
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.session_manager import SessionManager, new_session_name
from worldvln_edge.wire import decode_request

_LARGE_BYTES = 256 * 1024  # messages above this are parsed on a thread: the event loop must go on answering
_REMEMBERED_REQUESTS = 64  # that were answered


def _nowhere(message: Answer, encoding: Encoding) -> None:
    """Where the answers of a client that is gone are sent."""


class NativeConnection:
    """State of one connection: has it said hello, and what is unanswered.

    Args:
        manager: the sessions.
        admit: the name space of this client's sessions (one per key), from its hello; raises ProtocolError
            `unauthorized`.
        address: where the client comes from.
        send: puts a message into the transport's outbox; called on the event loop, also after the transport is gone.
    """

    def __init__(
        self,
        manager: SessionManager,
        *,
        admit: Callable[[Hello], str],
        address: str,
        send: Callable[[Answer, Encoding], None],
    ):
        self._manager, self._admit, self._address, self._send = manager, admit, address, send
        self._encoding: Encoding = "msgpack"
        self._peer: str | None = None  # until it said hello
        self._in_flight: dict[int, Ticket] = {}
        self._session_of: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def receive(self, data: bytes, encoding: Encoding) -> None:
        """Take one message. Long work goes on in the background; its answer is sent when it is there."""
        arrived_s = asyncio.get_running_loop().time()
        self._encoding = encoding
        limits, request_id = self._manager.limits, None
        answer: Answer | None
        try:
            try:
                if len(data) > _LARGE_BYTES:
                    request = await asyncio.to_thread(decode_request, data, encoding, limits)
                else:
                    request = decode_request(data, encoding, limits)
                request_id = request.id
            finally:  # one that cannot be read counts, too
                self._manager.request_rate.take(self._peer or self._address)
            answer = await self._handle(request, arrived_s, encoding)
        except ProtocolError as error:
            self._manager.meter.refused(error.code)
            answer = error.to_message(request_id)
        if answer is not None:
            self._send(answer, encoding)

    @property
    def said_hello(self) -> bool:
        return self._peer is not None

    @property
    def unanswered(self) -> int:
        """Requests whose answer is still to come."""
        return len(self._in_flight)

    def close(self) -> None:
        """The client is gone: what still waits is dropped, its frames and sessions stay."""
        for ticket in self._in_flight.values():
            ticket.cancel()
        # A transport knows its connection; if each knew the other, both would stay until the collector comes.
        self._send = _nowhere

    def say_bye(self, bye: Bye) -> None:
        """Send `bye` in the encoding that this client used last."""
        self._send(bye, self._encoding)

    async def _handle(self, request: Request, arrived_s: float, encoding: Encoding) -> Answer | None:
        """The answer, or None when it will follow."""
        if isinstance(request, Hello):
            return self._welcome(request)
        if self._peer is None:
            raise ProtocolError("hello_required", "say hello first; the server may have been restarted")
        if isinstance(request, Ping):
            return Pong(
                re=request.id,
                t_ns=request.t_ns,
                server_ns=time.time_ns(),
                sessions=self._manager.sessions,
                queue=self._manager.queue,
                ready=self._manager.is_ready,
            )
        if isinstance(request, Cancel):
            return await self._cancel(request, self._peer)
        self._begin(request, self._peer, arrived_s, encoding)
        return None

    def _welcome(self, request: Hello) -> Welcome:
        if PROTOCOL_VERSION not in request.v:
            raise ProtocolError("unsupported_version", f"this server speaks version {PROTOCOL_VERSION}")
        self._peer = self._admit(request)
        info, limits = self._manager.policy.info, self._manager.limits
        return Welcome(
            re=request.id,
            v=PROTOCOL_VERSION,
            server=ServerInfo(name="worldvln-edge", version=__version__),
            model=ModelInfo(name=info.name, precision=info.precision, backend=info.backend, device=info.device),
            num_frames=info.horizon.num_frames,
            step=info.horizon.step,
            points=info.horizon.points,
            fps=info.horizon.fps,
            action=ActionInfo(order=ACTION_ORDER, units=ACTION_UNITS),
            image=ImageInfo(hw=info.image_hw, max_bytes=limits.max_image_bytes, max_pixels=limits.max_pixels),
            limits=limits,
            ready=self._manager.is_ready,
        )

    async def _cancel(self, request: Cancel, peer: str) -> Answer:
        name = self._session_of.get(request.target)
        if name is None:
            raise ProtocolError("bad_request", f"no request {request.target} of this connection names a session")
        ticket = self._in_flight.get(request.target)
        if ticket is not None:  # else it was answered in the meantime, which is no error
            ticket.cancel()
        return await self._manager.state(peer, name, request.id)

    def _begin(self, request: Start | Observe | End, peer: str, arrived_s: float, encoding: Encoding) -> None:
        if request.id in self._in_flight:
            raise ProtocolError("bad_request", f"id {request.id} is still unanswered; count ids up")
        allowed = self._manager.limits.max_in_flight
        if len(self._in_flight) >= allowed:
            raise ProtocolError("busy", f"{allowed} requests of this connection are unanswered; wait for one")
        ticket = Ticket()
        work: Coroutine[Any, Any, Answer]
        # Named here and not when its turn comes, so that `cancel` can say which session it was.
        session = new_session_name() if request.session is None else request.session
        if isinstance(request, Start):
            request = msgspec.structs.replace(request, session=session)
            work = self._manager.start(peer, request, ticket=ticket, notify=self.say_bye)
        elif isinstance(request, Observe):
            work = self._manager.observe(peer, request, ticket=ticket, notify=self.say_bye, arrived_s=arrived_s)
        else:
            work = self._manager.end(peer, session, request.id)
        self._in_flight[request.id] = ticket
        self._session_of[request.id] = session
        while len(self._session_of) > _REMEMBERED_REQUESTS + len(self._in_flight):
            del self._session_of[next(each for each in self._session_of if each not in self._in_flight)]
        # Tasks begin in the order of their creation, so a session's requests take their turns in order of arrival.
        task = asyncio.get_running_loop().create_task(self._finish(request.id, work, encoding))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, request_id: int, work: Coroutine[Any, Any, Answer], encoding: Encoding) -> None:
        answer: Answer
        try:
            answer = await work
        except ProtocolError as error:
            answer = error.to_message(request_id)
        finally:
            self._in_flight.pop(request_id, None)
        self._send(answer, encoding)
