"""The native protocol over ZeroMQ: one ROUTER socket, any number of DEALER (or REQ) clients, msgpack or JSON.

A client is known by its routing identity, and only as long as its connection lives: whoever comes later under the same
identity starts anew. Nothing here waits for a client: answers that it does not read pile up to a limit, then it is cut
off. Messages above the size limit end the connection inside ZeroMQ, before they are in memory.
Source: spec/session_protocol.md 7 (transports), 7.5, 7.6, 7.8.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from worldvln_edge.protocol import Bye, Hello, ProtocolError
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.connection_room import SPARE_CONNECTIONS
from worldvln_edge.runtime.doors.listen_address import AddressInUseError
from worldvln_edge.runtime.doors.native_connection import NativeConnection
from worldvln_edge.runtime.doors.zmq_client import PeerGoneError, PipeFullError, ZmqClient
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig, check_endpoints, make_router, start_authenticator
from worldvln_edge.runtime.doors.zmq_endpoint import ZmqEndpoint, ZmqEndpointError, file_mode
from worldvln_edge.runtime.doors.zmq_links import ZmqLinks, frame_property
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.wire import encode

_log = logging.getLogger(__name__)
_SWEEP_S = 1.0
_STRANGER_IDLE_S = 5.0  # after that, one who never said hello gives up its place
_FAREWELL_S = 2.0
_SETTLE_S, _SETTLE_TRIES = 0.02, 50
_GIVEN_BY_ZMQ = b"\0"  # such identities are never given twice
_JSON_STARTS = b"{ \t\r\n"  # no msgpack map starts with one of these


class ZmqDoor:
    """All ZeroMQ clients of one server. Lives on one event loop.

    Args:
        manager: the sessions.
        access: API keys; a client shows one in `hello`, unless its CURVE key is known.
        config: see ZmqConfig.
        allow_remote: listen beyond this machine although nobody needs a key.

    Raises:
        ZmqEndpointError: an endpoint is none.
        UnsafeAddressError: an endpoint is reached from other machines, no key is asked for, and it is not allowed.
    """

    def __init__(self, manager: SessionManager, access: AccessRule, config: ZmqConfig, *, allow_remote: bool = False):
        self._manager, self._access, self._config = manager, access, config
        self._endpoints = check_endpoints(config, has_api_keys=access.asks_for_keys, allow_remote=allow_remote)
        self.urls: tuple[str, ...] = ()
        """Where it listens, once it is open; free ports are filled in."""
        self._clients: dict[bytes, ZmqClient] = {}
        self._client_on: dict[int, ZmqClient] = {}
        """By number of the connection; without those that have left."""
        self._context: Any = None
        self._socket: Any = None
        self._links: ZmqLinks | None = None
        self._authenticator: AsyncioAuthenticator | None = None
        self._bound: list[ZmqEndpoint] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._unparsed_bytes = 0
        self._has_room = asyncio.Event()

    async def open(self) -> None:
        """Listen and serve.

        Raises:
            AddressInUseError: somebody else listens there, or the address is not this machine's.
            ZmqEndpointError: an ipc path cannot be used.
        """
        self._context = zmq.asyncio.Context()
        try:
            self._authenticator = start_authenticator(self._context, self._config)
            self._socket = make_router(self._context, self._config, self._manager.limits)
            self._links = ZmqLinks(
                self._socket,
                on_end=self._link_ended,
                on_refused=self._handshake_failed,
                most=self._manager.limits.max_connections + SPARE_CONNECTIONS,
            )
            self.urls = tuple([self._bind(endpoint) for endpoint in self._endpoints])
        except BaseException:
            await self.close()
            raise
        self._has_room.set()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._sweep())]
        for task in self._tasks:
            task.add_done_callback(_report)

    def _bind(self, endpoint: ZmqEndpoint) -> str:
        endpoint.clear_stale_file()
        try:
            with file_mode(self._config.ipc_mode):
                self._socket.bind(endpoint.url)
        except zmq.ZMQError as error:
            if endpoint.path is not None and error.errno != zmq.EADDRINUSE:
                raise ZmqEndpointError(endpoint.url, f" ({error.strerror})") from error
            raise AddressInUseError(
                f"cannot listen on {endpoint.url} ({error.strerror}); is another server running there? "
                "Give another --zmq ENDPOINT"
            ) from error
        self._bound.append(endpoint)
        return endpoint.url if endpoint.path else self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    async def _read(self) -> None:
        while True:
            await self._has_room.wait()
            frames = await self._socket.recv_multipart(copy=False)
            self._take(frames)
            del frames  # or the message would be kept until the next one comes
            await asyncio.sleep(0)  # while messages wait, receiving them waits for nothing

    def _take(self, frames: list[zmq.Frame]) -> None:
        """One message of one client."""
        client = self._sender(frames)
        if client is None:
            return
        client.last_heard_s = asyncio.get_running_loop().time()
        if len(frames) != (3 if _has_delimiter(frames) else 2):
            refusal = ProtocolError("bad_request", "send each message as one frame")
            self._manager.meter.refused(refusal.code)
            client.put(refusal.to_message(), "msgpack")
            return
        data = frames[-1].bytes
        if not data:
            return  # how ZeroMQ programs probe a ROUTER
        self._unparsed_bytes += len(data)
        if self._unparsed_bytes > self._manager.limits.max_msg_bytes:
            self._has_room.clear()  # until some of it was parsed, clients find their pipes full
        client.take(data, "json" if data[:1] in _JSON_STARTS else "msgpack")

    def _sender(self, frames: list[zmq.Frame]) -> ZmqClient | None:
        """Whose message it is; None for what is to be dropped."""
        assert self._links is not None, "open() comes first"
        self._links.notice()
        identity = frames[0].bytes
        client, link = self._clients.get(identity), self._links.link_of(frames[-1])
        if client is not None and (client.link == link or (client.has_left and identity[:1] == _GIVEN_BY_ZMQ)):
            return client
        if link is None:  # sent before the connection ended, of which we heard first
            return client if client is not None and client.has_left else None
        if client is not None:
            self._forget(client)  # a successor under the same identity inherits nothing
        claimed = self._client_on.get(link)
        if claimed is not None:
            self._forget(claimed)
        return self._welcome_stranger(identity, link, frames)

    def _parsed(self, size: int) -> None:
        self._unparsed_bytes -= size
        if self._unparsed_bytes <= self._manager.limits.max_msg_bytes:
            self._has_room.set()

    def _welcome_stranger(self, identity: bytes, link: int, frames: list[zmq.Frame]) -> ZmqClient | None:
        """A client for an identity that is not known, or None if there is no place for it."""
        envelope = (identity, b"") if _has_delimiter(frames) else (identity,)
        if len(self._client_on) >= self._manager.limits.max_connections and not self._make_place():
            refusal = ProtocolError("overloaded", "the server has as many connections as it accepts", retry_ms=1000)
            self._manager.meter.refused(refusal.code)
            with contextlib.suppress(PipeFullError, PeerGoneError):
                self._send(envelope, encode(refusal.to_message(), "msgpack"))
            return None
        curve_key = frame_property(frames[-1], "User-Id")
        client = ZmqClient(
            envelope,
            link,
            limits=self._manager.limits,
            meter=self._manager.meter,
            stalled_after_s=self._config.stalled_after_s,
            send=self._send_to,
            on_end=self._forget,
        )
        client.connection = NativeConnection(
            self._manager,
            admit=lambda hello: self._peer(hello, curve_key),
            address=frame_property(frames[-1], "Peer-Address") or "ipc",
            send=client.put,
        )
        self._clients[identity] = self._client_on[link] = client
        if self._links is not None:
            self._links.keep(link)
        client.start(self._parsed)
        return client

    def _peer(self, hello: Hello, curve_key: str | None) -> str:
        """Name space of a client's sessions: that of its API key, else that of its CURVE key."""
        if curve_key is not None and (hello.key is None or not self._access.asks_for_keys):
            return f"curve:{curve_key}"
        return self._access.peer_of_key(hello.key)

    def _send(self, envelope: tuple[bytes, ...], data: bytes) -> None:
        """Raises PipeFullError, PeerGoneError."""
        try:
            # Done when it returns, because it must not wait.
            self._socket.send_multipart([*envelope, data], zmq.DONTWAIT).result()
        except zmq.Again:
            raise PipeFullError from None
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                _log.warning("an answer could not be sent; its client is given up", exc_info=error)
            raise PeerGoneError from None

    def _send_to(self, client: ZmqClient, data: bytes) -> None:
        """As `_send`, but never to who came after the client under the same identity."""
        if self._links is not None:
            self._links.notice()
        if client.has_left:
            raise PeerGoneError
        self._send(client.envelope, data)

    def _handshake_failed(self) -> None:
        self._manager.meter.refused("unauthorized")
        _log.info("a handshake failed: a CURVE key is missing or unknown, or it was no ZeroMQ client")

    def _link_ended(self, link: int) -> None:
        client = self._client_on.pop(link, None)
        if client is not None:
            client.has_left = True
            asyncio.get_running_loop().call_later(_SETTLE_S, self._settle, client, _SETTLE_TRIES)

    def _settle(self, client: ZmqClient, tries_left: int) -> None:
        """Let a client that left end; what it sent just before may still be in ZeroMQ's hands."""
        if client.is_closed:
            return
        if tries_left and self._socket.get(zmq.EVENTS) & zmq.POLLIN:
            asyncio.get_running_loop().call_later(_SETTLE_S, self._settle, client, tries_left - 1)
        else:
            client.finish()

    def _forget(self, client: ZmqClient) -> None:
        """Let go of a client; its sessions stay."""
        is_known = self._clients.get(client.identity) is client
        has_link = self._client_on.get(client.link) is client
        if is_known:
            del self._clients[client.identity]
        if has_link:
            del self._client_on[client.link]
            if self._links is not None:
                self._links.release(client.link)
        self._parsed(client.close())

    def _make_place(self) -> bool:
        """Forget the client that was silent longest, if one was silent long enough; its sessions stay."""
        now_s, limits = asyncio.get_running_loop().time(), self._manager.limits
        idle = [
            client
            for client in self._client_on.values()
            if not client.is_busy
            and now_s - client.last_heard_s
            >= (limits.min_idle_s if client.connection.said_hello else min(_STRANGER_IDLE_S, limits.min_idle_s))
        ]
        if not idle:
            return False
        self._forget(min(idle, key=lambda client: (client.connection.said_hello, client.last_heard_s)))
        return True

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._forget_silent()

    def _forget_silent(self) -> None:
        """Forget whom nothing was heard of for as long as a session lives.

        A method of its own: the loop that calls it sleeps, and would keep the last client that it looked at.
        """
        now_s, ttl_s = asyncio.get_running_loop().time(), self._manager.limits.session_ttl_s
        for client in list(self._clients.values()):
            if not client.is_busy and now_s - client.last_heard_s > ttl_s:
                self._forget(client)

    async def say_bye_to_all(self) -> None:
        """Send what is written so far and `bye` to every client that reads."""
        for client in list(self._clients.values()):
            client.connection.say_bye(Bye(reason="shutdown"))
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + _FAREWELL_S
        while any(client.has_unsent for client in self._clients.values()) and loop.time() < give_up_s:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Stop, and leave no file behind. What was sent may still go out for a moment."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for client in list(self._clients.values()):
            self._forget(client)
        if self._links is not None:
            self._links.close()
            self._links = None
        if self._socket is not None:
            self._socket.close(round(_FAREWELL_S * 1e3))
            self._socket = None
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        if self._context is not None:
            await asyncio.to_thread(self._context.term)
            self._context = None
        for endpoint in self._bound:
            endpoint.remove_file()
        self._bound.clear()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("the ZeroMQ door stopped working; restart the server", exc_info=error)


def _has_delimiter(frames: list[zmq.Frame]) -> bool:
    """Whether it is the message of a REQ socket."""
    return len(frames) > 2 and len(frames[1]) == 0
