"""The TCP ports: accept connections, shake hands where there is TLS, and bound both.

asyncio tells a server of a TLS connection only once its handshake is done. Here it is counted from the moment it is
accepted, because that is all that a hostile client has to do.
Source: spec/session_protocol.md 7.6, 7.8.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
from collections.abc import Callable
from typing import Any

from worldvln_edge.runtime.doors.connection_room import ConnectionRoom
from worldvln_edge.runtime.doors.listen_address import AddressInUseError

_log = logging.getLogger(__name__)
_BACKLOG = 2048  # the system's own limit is lower, as a rule


class Listener:
    """Opens ports whose connections share one room.

    Args:
        make_connection: protocol of a connection that may send its request.
        room: of all ports.
        tls: None: plain text.
        patience_s: how long a TLS handshake, or the end of TLS, may take.
    """

    def __init__(
        self,
        make_connection: Callable[[], asyncio.Protocol],
        room: ConnectionRoom,
        *,
        tls: ssl.SSLContext | None,
        patience_s: float,
    ):
        self._make_connection, self._room, self._tls = make_connection, room, tls
        self._options: dict[str, Any] = {"ssl_handshake_timeout": patience_s}
        if sys.version_info >= (3, 11):
            self._options["ssl_shutdown_timeout"] = patience_s

    async def open(self, host: str, port: int, option: str) -> asyncio.Server:
        """Accept connections.

        Args:
            option: of the command line, which gives another address.

        Raises:
            AddressInUseError: somebody else listens there, or the address is not this machine's.
        """
        make = self._make_connection if self._tls is None else self._make_handshake
        try:
            return await asyncio.get_running_loop().create_server(make, host, port, backlog=_BACKLOG)
        except OSError:
            raise AddressInUseError(
                f"cannot listen on {host}:{port}; is another server running there? Give another {option} HOST:PORT"
            ) from None

    def _make_handshake(self) -> asyncio.Protocol:
        assert self._tls is not None
        return _Handshake(self._make_connection, self._room, self._tls, self._options)


class _Handshake(asyncio.Protocol):
    """A connection that was accepted, until TLS is agreed on; then another protocol takes over."""

    def __init__(
        self,
        make_connection: Callable[[], asyncio.Protocol],
        room: ConnectionRoom,
        tls: ssl.SSLContext,
        options: dict[str, Any],
    ):
        self._make_connection, self._room, self._tls, self._options = make_connection, room, tls, options
        self._early = bytearray()
        """What the client sent right behind its last word of the handshake."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._room.begin_handshake(self):
            self._room.end_handshake(self)
            transport.abort()
            return
        self._task = asyncio.get_running_loop().create_task(self._shake_hands(transport))

    def data_received(self, data: bytes) -> None:
        self._early += data

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        encrypted: asyncio.Transport | None = None
        try:
            if not transport.is_closing():  # its place may have been needed at once
                encrypted = await asyncio.get_running_loop().start_tls(
                    transport, self, self._tls, server_side=True, **self._options
                )
        except OSError as error:  # no TLS, too slow, or a certificate that the client does not trust
            _log.debug("a TLS handshake failed: %s", error)
        finally:
            self._room.end_handshake(self)
        if encrypted is None or encrypted.is_closing():  # it went away in the meantime
            return
        connection = self._make_connection()
        encrypted.set_protocol(connection)
        connection.connection_made(encrypted)
        if self._early and not encrypted.is_closing():
            connection.data_received(bytes(self._early))

    def give_up(self) -> None:
        """See `connection_room.Guest`."""
        self._transport.abort()
