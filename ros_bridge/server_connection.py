"""Connections to the server, as the configuration says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worldvln_edge.client import SessionClient
from worldvln_edge.ros_bridge.bridge_config import BridgeConfigError, ServerConfig

_CONNECT_S = 2.0


def server_client(config: ServerConfig) -> Callable[[], SessionClient]:
    """What opens a connection. A lost one is not opened again: the drone holds, and the next flight connects anew.

    Raises:
        BridgeConfigError: the key file cannot be read, or is empty.
        ServerAddressError: the URL is no server's.
    """
    key = None
    if config.key_file is not None:
        try:
            key = Path(config.key_file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as failure:
            raise BridgeConfigError(f"server.key_file {config.key_file}: cannot be read ({failure})") from failure
        if not key:
            raise BridgeConfigError(f"server.key_file {config.key_file} is empty; write the API key into it")

    def connect() -> SessionClient:
        return SessionClient(
            config.url,
            key,
            connect_timeout_s=_CONNECT_S,
            answer_timeout_s=config.answer_timeout_s,
            reconnect_s=0.0,
            frame_format=config.frame_format,
        )

    connect()  # an address that is none is named now, not in flight
    return connect
