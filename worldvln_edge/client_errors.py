"""What can go wrong between a client and a server, as types that a program can act on.

Source: spec/session_protocol.md 7.7.
"""

from __future__ import annotations

from worldvln_edge.protocol import UNSET, Error


class ServerError(RuntimeError):
    """The server refused a request. `code` is a key of protocol.ERRORS; absent details are None.

    Attributes:
        retry: sending again (after what the message says) can succeed; `retry_ms` says when.
        expected: for `gap`, the frame index that must come next.
        frames: frames that the session holds.
        error_id: for `internal`, what to look for in the server's log.
    """

    def __init__(self, error: Error):
        super().__init__(f"{error.code}: {error.msg}")
        self.code, self.retry = error.code, error.retry
        self.retry_ms = None if error.retry_ms is UNSET else error.retry_ms
        self.expected = None if error.expected is UNSET else error.expected
        self.frames = None if error.frames is UNSET else error.frames
        self.error_id = None if error.error_id is UNSET else error.error_id


class ServerAddressError(ValueError):
    """What was given as a server is no address."""

    def __init__(self, url: str):
        super().__init__(
            f"{url} is no server's address; give ws://host:port, wss://host:port, tcp://host:port or ipc:///path"
        )


class ServerUnreachableError(ConnectionError):
    """No server of this protocol answers at the address. The message says what to do."""

    def __init__(self, url: str, reason: object):
        reason = getattr(reason, "reason", reason)  # of several attempts, the last one's
        option = f"--zmq {url}" if url.startswith(("tcp://", "ipc://")) else "--ws HOST:PORT"
        super().__init__(
            f"no worldvln-edge server answers at {url} ({reason}); check the address, or start one with "
            f"`worldvln-edge serve BUNDLE {option}`"
        )
        self.url, self.reason = url, reason


class ConnectionLostError(ConnectionError):
    """An open connection broke; the last request may or may not have been handled."""


class AnswerTimeoutError(TimeoutError):
    """The server took a request and did not answer in time."""

    def __init__(self, url: str, timeout_s: float):
        super().__init__(f"{url} did not answer within {timeout_s:g} s; see its /health for the load")


class MissingTransportError(ImportError):
    """The address needs a package that is not installed."""

    def __init__(self, url: str, package: str):
        super().__init__(f"{url} needs {package}; install it with: pip install 'worldvln-edge[zmq]'")
