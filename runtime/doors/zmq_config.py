"""How a server's ZeroMQ socket is set up: where it listens, for whom, and its limits.

Source: spec/session_protocol.md 7 (transports), 7.5, 7.6, 7.8.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.auth.asyncio import AsyncioAuthenticator

from worldvln_edge.curve_keys import CurveKeyPair
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors.connection_room import SPARE_CONNECTIONS
from worldvln_edge.runtime.doors.zmq_endpoint import ZmqEndpoint

_ZAP_DOMAIN = "worldvln"


@dataclass(frozen=True, kw_only=True)
class ZmqConfig:
    """Where and for whom the door opens.

    Attributes:
        endpoints: tcp://HOST:PORT or ipc://PATH.
        server_keys: CURVE keys of the server; with them nothing is accepted in clear text, on any endpoint.
        client_keys: public keys of the clients that may connect; None, with server_keys: everyone, encrypted.
        ipc_mode: permissions of ipc files.
        heartbeat_s: how often a silent client is asked whether it is there.
        silent_for_s: a client that does not answer that long is gone.
        high_water: answers that ZeroMQ holds for one client.
        stalled_after_s: a client that reads nothing that long, while answers wait, is cut off.
    """

    endpoints: tuple[str, ...]
    server_keys: CurveKeyPair | None = None
    client_keys: frozenset[bytes] | None = None
    ipc_mode: int = 0o600
    heartbeat_s: float = 5.0
    silent_for_s: float = 15.0
    high_water: int = 16
    stalled_after_s: float = 10.0


def check_endpoints(config: ZmqConfig, *, has_api_keys: bool, allow_remote: bool) -> list[ZmqEndpoint]:
    """The endpoints, taken apart. Raises what ZmqDoor raises."""
    has_keys = has_api_keys or (config.server_keys is not None and config.client_keys is not None)
    endpoints = [ZmqEndpoint.parse(text) for text in config.endpoints]
    for endpoint in endpoints:
        endpoint.check_reach(has_keys=has_keys, allow_remote=allow_remote)
    return endpoints


def make_router(context: Any, config: ZmqConfig, limits: Limits) -> Any:
    """A ROUTER socket of that context, not bound yet."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.SNDHWM, config.high_water)
    router.setsockopt(zmq.RCVHWM, limits.max_in_flight)  # a client has no use for more unread requests
    router.setsockopt(zmq.MAXMSGSIZE, limits.max_msg_bytes)
    # All clients may come back at once, after a restart, and others besides.
    router.setsockopt(zmq.BACKLOG, limits.max_connections + SPARE_CONNECTIONS)
    router.setsockopt(zmq.HANDSHAKE_IVL, round(limits.headers_within_s * 1e3))
    router.setsockopt(zmq.HEARTBEAT_IVL, round(config.heartbeat_s * 1e3))
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(config.silent_for_s * 1e3))
    router.setsockopt(zmq.LINGER, 0)
    if any("[" in text for text in config.endpoints):
        router.setsockopt(zmq.IPV6, 1)
    if config.server_keys is not None:
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, config.server_keys.secret)
        router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.encode())
    return router


def start_authenticator(context: Any, config: ZmqConfig) -> AsyncioAuthenticator | None:
    """What lets known clients in, if only those may come; to be stopped before the context ends."""
    if config.server_keys is None or config.client_keys is None:
        return None
    authenticator = AsyncioAuthenticator(context, log=logging.getLogger(f"{__name__}.curve"))
    authenticator.start()
    authenticator.configure_curve_callback(_ZAP_DOMAIN, _KnownClients(config.client_keys))
    return authenticator


class _KnownClients:
    """What pyzmq's authenticator asks whether it may let a key in."""

    def __init__(self, keys: frozenset[bytes]):
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys
