"""How a client reaches its server and speaks with it: one list for the blocking and the asynchronous client.

Source: spec/session_protocol.md 7 (transports), 7.4 to 7.6.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from worldvln_edge.protocol import Encoding
from worldvln_edge.server_address import server_url
from worldvln_edge.tls_trust import client_context

if TYPE_CHECKING:
    from worldvln_edge.curve_keys import CurveClientKeys  # needs pyzmq

FrameFormat = Literal["jpeg", "rgb8"]


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Everything that a client may be told, with its defaults.

    Attributes:
        url: `ws://host:port`, `wss://...` or `host:port` (without a path, the native protocol's is used);
            `tcp://host:port` or `ipc:///path` for ZeroMQ. Kept in full, as `server_address.server_url` gives it.
        key: API key.
        curve: CURVE keys, for a ZeroMQ server that has them.
        ca_file: PEM file with the authorities to trust behind wss://; None: those of this system.
        encoding: how messages are written; msgpack is smaller and faster.
        frame_format: how arrays are sent: `jpeg` (small) or `rgb8` (exact, 3 bytes a pixel).
        jpeg_quality: 1..95.
        connect_timeout_s: for one attempt.
        answer_timeout_s: longest wait for one answer.
        silent_for_s: a link is lost when the server answers no heartbeat, or takes no byte of a message, for so long.
            Heartbeats go out every third of it, so it is noticed after four thirds at the latest.
        reconnect_s: how long to try again after a lost connection; 0 does not try.
        proxy: URL of an HTTP or SOCKS proxy (WebSocket); None connects directly, whatever the environment says.

    Raises:
        ServerAddressError: the URL is none of these.
        TrustFileError: `ca_file` cannot be read, or the URL is not wss://.
        ValueError: `silent_for_s` is not positive.
    """

    url: str
    key: str | None = None
    curve: CurveClientKeys | None = None
    ca_file: Path | str | None = None
    encoding: Encoding = "msgpack"
    frame_format: FrameFormat = "jpeg"
    jpeg_quality: int = 90
    connect_timeout_s: float = 10.0
    answer_timeout_s: float = 600.0
    silent_for_s: float = 15.0
    reconnect_s: float = 30.0
    proxy: str | None = None

    def __post_init__(self) -> None:
        if not self.silent_for_s > 0:
            raise ValueError(f"silent_for_s must be more than 0 s, found {self.silent_for_s:g}")
        object.__setattr__(self, "url", server_url(self.url))
        _ = self.tls  # a file that cannot be used is named before anybody connects

    @property
    def heartbeat_s(self) -> float:
        """How often the server is asked whether it is there."""
        return self.silent_for_s / 3

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """How the server's certificate is checked; None where TLS is not spoken."""
        return client_context(self.url, self.ca_file)


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of the clients: what `ClientConfig` has behind `url` and `key`."""

    curve: CurveClientKeys | None
    ca_file: Path | str | None
    encoding: Encoding
    frame_format: FrameFormat
    jpeg_quality: int
    connect_timeout_s: float
    answer_timeout_s: float
    silent_for_s: float
    reconnect_s: float
    proxy: str | None
