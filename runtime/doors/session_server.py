"""HTTP, the native WebSocket, openpi's protocol and the health routes of one policy: one application, one or two ports.

Loopback without a key is the default; any other address needs a key or an explicit flag. Compression is off: images
are compressed already. SIGTERM drains: work in progress is answered, clients get `bye`, then the port closes.
Source: spec/session_protocol.md 2.7, 2.8, 7, 7.6.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.routing import BaseRoute, Route, WebSocketRoute

from worldvln_edge.protocol import WEBSOCKET_PATH, Limits
from worldvln_edge.runtime.dashboard.dashboard_door import DashboardDoor
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.application import create_app, split_by_port
from worldvln_edge.runtime.doors.connection_room import ConnectionRoom
from worldvln_edge.runtime.doors.entrance import Entrance
from worldvln_edge.runtime.doors.http_connection import BoundedHttpConnection
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH, HttpDoor
from worldvln_edge.runtime.doors.listen_address import check_address
from worldvln_edge.runtime.doors.listener import Listener
from worldvln_edge.runtime.doors.openpi_door import OPENPI_PATHS, OpenPIDoor
from worldvln_edge.runtime.doors.websocket_connection import BoundedWebSocketConnection
from worldvln_edge.runtime.doors.websocket_door import WebSocketDoor
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.doors.zmq_door import ZmqDoor
from worldvln_edge.runtime.recording.prediction_teller import PredictionTeller
from worldvln_edge.runtime.sessions.chained_session import SettledRule
from worldvln_edge.runtime.sessions.envelope import EnvelopeConfig
from worldvln_edge.runtime.sessions.event_log import EventLog, Meters
from worldvln_edge.runtime.sessions.meter import Meter
from worldvln_edge.runtime.sessions.metrics import ServerMetrics
from worldvln_edge.runtime.sessions.policy import Policy
from worldvln_edge.runtime.sessions.session_events import SessionWatcher
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.runtime.sessions.warm_up import WarmUpError, fly_until_steady

if TYPE_CHECKING:  # mcap is needed by servers that record, and by no others
    from worldvln_edge.runtime.recording.recorder import Recorder

_log = logging.getLogger(__name__)
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8001


class SessionServer(uvicorn.Server):
    """uvicorn, with the drain that the protocol asks for before connections are closed.

    Args:
        policy: what answers.
        host, port: address of every door, or with `http_address` of the WebSocket doors; port 0 takes a free one,
            `bound_port` tells which.
            Host None opens no port at all, which makes sense with `zmq` only.
        http_address: (host, port) of the HTTP API where it has a port of its own; `http_port` tells which it got.
        tls: certificate and key of the ports, as `tls.server_context` reads them; None: no TLS.
        keys: API keys; every client must show one of them. Sessions belong to the key that made them.
        allow_remote: listen beyond loopback without a key.
        origins: browser origins that may connect, such as "https://ground.example"; none by default.
        limits: spec/session_protocol.md 7.8.
        zmq: where ZeroMQ clients are served, if anywhere.
        warm_up: fly once before being ready.
        resets_on_one_frame: HTTP API: a prompt together with exactly one image starts its session afresh.
        session_memory_bytes: that all sessions together may hold; None: half of what is available.
        envelope: what may be flown; the rest is answered as a hold. None: no limits.
        settled: when a chained session says that the drone has arrived; None: UAV-Flow's rule.
        journal: where sessions outlive this process; closed with the server. None: nowhere.
        meters: are told what happens, besides the metrics and the log.
        recorder: is told of every session; who made it closes it once the server has ended.
        watchers: are told of every session, too.
        dashboard: answer `/dashboard` (dashboard_door.py).
        tells_predictions: tell them and the recorder the frames that the policy predicts, too.
        device_workers: threads that may be inside the policy at once.
        drain_s: how long work in progress may take after SIGTERM.

    Raises:
        UnsafeAddressError: not loopback, no key, and not allowed explicitly.
        MemoryBudgetError: not even one session fits into the memory.
    """

    def __init__(
        self,
        policy: Policy,
        host: str | None = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        http_address: tuple[str, int] | None = None,
        tls: ssl.SSLContext | None = None,
        zmq: ZmqConfig | None = None,
        warm_up: bool = True,
        resets_on_one_frame: bool = True,
        keys: Sequence[str] = (),
        allow_remote: bool = False,
        origins: Sequence[str] = (),
        limits: Limits | None = None,
        session_memory_bytes: int | None = None,
        envelope: EnvelopeConfig | None = None,
        settled: SettledRule | None = None,
        journal: SessionJournal | None = None,
        meters: Sequence[Meter] = (),
        recorder: Recorder | None = None,
        watchers: Sequence[SessionWatcher] = (),
        tells_predictions: bool = False,
        dashboard: bool = False,
        device_workers: int = 1,
        drain_s: float = 30.0,
    ):
        self._http_address = None if port and http_address == (host, port) else http_address
        for address in filter(None, (host, self._http_address and self._http_address[0])):
            check_address(address, keys=keys, allow_remote=allow_remote)
        self._tls = tls
        metrics = ServerMetrics(policy.info)
        self.manager = manager = SessionManager(
            policy,
            limits=limits,
            session_memory_bytes=session_memory_bytes,
            envelope=envelope,
            settled=settled,
            journal=journal,
            device_workers=device_workers,
            meter=Meters((metrics, EventLog(), *meters)),
        )
        metrics.watch(sessions=lambda: manager.sessions, queue=lambda: manager.queue, is_ready=lambda: manager.is_ready)
        for watcher in watchers:
            manager.events.subscribe(watcher)
        if tells_predictions:
            manager.events.subscribe(PredictionTeller(manager).watch)
        if recorder is not None:
            manager.events.subscribe(recorder.watch)
            metrics.watch_recorder(recorder)
        access = AccessRule(keys=keys, origins=origins)
        entrance = Entrance(self.manager, access)
        self.door = WebSocketDoor(self.manager, entrance)
        self.openpi = OpenPIDoor(self.manager, entrance)
        self.http = HttpDoor(self.manager, access, resets_on_one_frame=resets_on_one_frame)
        self.zmq = None if zmq is None else ZmqDoor(self.manager, access, zmq, allow_remote=allow_remote)
        self.failure: WarmUpError | None = None
        self._warms_up = warm_up
        self._warming: asyncio.Task[None] | None = None
        self.is_listening = False
        """Whether every address is known and clients may come; the server may still be warming up."""
        self.host, self._bound_port, self._http_port, self._drain_s = host, 0, 0, drain_s
        doors: list[BaseRoute] = [
            Route(PREDICT_PATH, self.http.predict, methods=["POST"]),
            WebSocketRoute(WEBSOCKET_PATH, self.door.serve),
            *(WebSocketRoute(path, self.openpi.serve) for path in OPENPI_PATHS),
        ]
        self.dashboard = DashboardDoor(self.manager, access, has_keys=bool(keys)) if dashboard else None
        if self.dashboard is not None:
            doors += self.dashboard.routes
        super().__init__(
            uvicorn.Config(
                split_by_port(create_app(self.manager, doors, metrics), lambda: self._http_port),
                host=host or DEFAULT_HOST,
                port=port,
                ws=BoundedWebSocketConnection,
                ws_max_size=self.manager.limits.max_msg_bytes,
                ws_per_message_deflate=False,
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )
        self._room = ConnectionRoom(self.manager.limits, self.server_state.connections)

    @property
    def bound_port(self) -> int:
        """Port listened on; 0 until it is known, before `is_listening` turns True."""
        return self._bound_port

    @property
    def http_port(self) -> int:
        """Port of the HTTP API; as `bound_port`, unless it has one of its own."""
        return self._http_port or self._bound_port

    @property
    def url(self) -> str:
        """WebSocket address of the native protocol; valid once `started` is True. Empty without a port."""
        if self.host is None:
            return ""
        return f"{self._scheme('ws')}://{_in_url(self.host)}:{self.bound_port}{WEBSOCKET_PATH}"

    @property
    def zmq_urls(self) -> tuple[str, ...]:
        """ZeroMQ addresses of the native protocol; valid once `started` is True."""
        return () if self.zmq is None else self.zmq.urls

    @property
    def http_url(self) -> str:
        """Base address of the HTTP API; valid once `started` is True. Empty without a port."""
        host = self.host if self._http_address is None else self._http_address[0]
        return "" if host is None else f"{self._scheme('http')}://{_in_url(host)}:{self.http_port}"

    def _scheme(self, name: str) -> str:
        return name if self._tls is None else f"{name}s"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where clients connect: the native protocol's addresses, and the HTTP API's if it has a port of its own."""
        http_url = "" if self._http_address is None else self.http_url
        return tuple(filter(None, (self.url, http_url, *self.zmq_urls)))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and remember where: the listeners forget it when they close. Then warm up, while health answers."""
        if self._warms_up:
            self.manager.begin_warm_up()
        if self.zmq is not None:
            await self.zmq.open()
        ports: list[asyncio.Server] = []
        listener = Listener(
            self._connection, self._room, tls=self._tls, patience_s=self.manager.limits.headers_within_s
        )
        try:
            if self.host is not None:
                ports.append(await listener.open(self.host, self.config.port, "--ws"))
                self._bound_port = ports[-1].sockets[0].getsockname()[1]
            if self._http_address is not None:
                ports.append(await listener.open(*self._http_address, "--http"))
                self._http_port = ports[-1].sockets[0].getsockname()[1]
            await super().startup([])  # uvicorn's own ports would let connections in without bounds
        except BaseException:
            for port in ports:
                port.close()
            if self.zmq is not None:
                await self.zmq.close()
            self.manager.close()
            raise
        self.servers.extend(ports)
        self.is_listening = True
        if self._warms_up:
            self._warming = asyncio.create_task(self._warm_up())

    def _connection(self) -> asyncio.Protocol:
        return BoundedHttpConnection(
            self._room, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def _warm_up(self) -> None:
        try:
            await self.manager.warm_up(fly_until_steady)
        except WarmUpError as error:
            self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain and return normally. Second: stop at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, answer what is in progress, say bye, close."""
        if not self.force_exit:
            if not await self.manager.drain(self._drain_s):
                _log.warning("work was still in progress %.0f s after the shutdown began; it is cut off", self._drain_s)
            farewells = [self.door.say_bye_to_all(), self.openpi.close_all()]
            if self.zmq is not None:
                farewells.append(self.zmq.say_bye_to_all())
            await asyncio.gather(*farewells)
        if self._warming is not None:
            self._warming.cancel()
        if self.dashboard is not None:
            self.dashboard.board.close()
        if self.zmq is not None:
            await self.zmq.close()
        self._room.end_handshakes()
        await super().shutdown(sockets)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
