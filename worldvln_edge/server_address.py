"""Addresses of servers: which transport a URL means, and its full form.

Source: spec/session_protocol.md 7 (transports and default ports).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from worldvln_edge.client_errors import ServerAddressError
from worldvln_edge.protocol import WEBSOCKET_PATH, ZMQ_PORT

_ZMQ_SCHEMES = ("ipc", "tcp")


def server_url(url: str) -> str:
    """The address in full: `host:port`, `http://...` and `ws://...` get the path of the native protocol.

    `ipc:///path` and `tcp://host:port` (ZeroMQ) are taken as they are; `tcp://host` gets the default port.

    Raises:
        ServerAddressError: no such address.
    """
    if "://" not in url:
        url = "ws://" + url
    scheme, _, rest = url.partition("://")
    scheme = {"http": "ws", "https": "wss"}.get(scheme.lower(), scheme.lower())
    if scheme == "ipc":
        if not rest or rest == "*":
            raise ServerAddressError(url)
        return f"ipc://{rest}"
    if scheme not in ("ws", "wss", "tcp"):
        raise ServerAddressError(url)
    try:
        parts = urlsplit(url)
        if not parts.hostname or parts.port == 0:
            raise ServerAddressError(url)
    except ValueError as error:
        raise ServerAddressError(url) from error
    if scheme == "tcp":
        if parts.path or parts.hostname == "*":
            raise ServerAddressError(url)
        return f"tcp://{rest}" if parts.port else f"tcp://{rest.rstrip(':')}:{ZMQ_PORT}"
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}{slash}{path}" if path else f"{scheme}://{host}{WEBSOCKET_PATH}"


def is_zmq(url: str) -> bool:
    """Whether the address is ZeroMQ's."""
    return url.partition("://")[0].lower() in _ZMQ_SCHEMES
