"""ZeroMQ addresses that a server listens on: which are safe, and what becomes of the files of `ipc://`.

Source: spec/session_protocol.md 7 (transports), 7.6.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from worldvln_edge.protocol import ZMQ_PORT
from worldvln_edge.runtime.doors.listen_address import AddressInUseError, UnsafeAddressError, is_loopback

_LONGEST_PATH = 107  # of a unix socket's name


class ZmqEndpointError(ValueError):
    """What was given is no address that a server can listen on."""

    def __init__(self, text: str, why: str = ""):
        super().__init__(
            f"{text!r} is no ZeroMQ address to listen on{why}; give tcp://HOST:PORT, for example tcp://127.0.0.1:8003, "
            "or ipc:///PATH, for example ipc:///run/worldvln/session.sock"
        )


@dataclass(frozen=True)
class ZmqEndpoint:
    """An address, taken apart."""

    url: str
    """As ZeroMQ binds it: it knows numbers and interfaces, no names."""
    host: str | None = None
    """Of tcp://; `*` means all interfaces."""
    path: Path | None = None
    """Of ipc://; None also for Linux's abstract names (ipc://@name), which have no file."""

    @classmethod
    def parse(cls, text: str) -> ZmqEndpoint:
        """Raises ZmqEndpointError. Port 0 or * takes a free one; without a port, it is the default one."""
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in ("tcp", "ipc"):
            raise ZmqEndpointError(text)
        if scheme == "ipc":
            if not rest or rest in ("*", "@"):
                raise ZmqEndpointError(text)
            return cls(text) if rest.startswith("@") else cls(text, path=Path(rest))
        is_bare = ":" not in rest or rest.endswith("]")
        host, _, port = f"{rest}:{ZMQ_PORT}".rpartition(":") if is_bare else rest.rpartition(":")
        is_port = port == "*" or (port.isascii() and port.isdigit() and int(port) <= 65535)
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        if not host or not is_port:
            raise ZmqEndpointError(text)
        bound_to = {"localhost": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
        return cls(f"tcp://{bound_to}:{port}", host=host)

    def check_reach(self, *, has_keys: bool, allow_remote: bool) -> None:
        """Raise UnsafeAddressError if other machines reach it, nobody needs a key, and it was not allowed."""
        if has_keys or allow_remote or self.host is None or is_loopback(self.host):
            return
        raise UnsafeAddressError(
            f"{self.url} can be reached from other machines and no key is set; give CURVE keys (--zmq-key-file, "
            "--zmq-clients) or API keys (--key-file), or allow it explicitly (--allow-remote)"
        )

    def clear_stale_file(self) -> None:
        """Remove the socket file of a server that was killed, and nothing else: binding would replace any file.

        Raises:
            AddressInUseError: a server listens there.
            ZmqEndpointError: the path is too long, is taken by something that is no socket, or has no folder.
        """
        if self.path is None:
            return
        if len(os.fsencode(self.path)) > _LONGEST_PATH:
            raise ZmqEndpointError(self.url, f" (its path is too long; at most {_LONGEST_PATH} bytes)")
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise ZmqEndpointError(self.url, f" (there is no folder {self.path.parent})") from None
            return
        except OSError as error:
            raise ZmqEndpointError(self.url, f" ({error.strerror})") from error
        if not stat.S_ISSOCK(mode):
            raise ZmqEndpointError(self.url, " (the path is taken by something that is no socket)")
        if _somebody_listens(self.path):
            raise AddressInUseError(
                f"cannot listen on {self.url}: another server listens there; stop it, or give another --zmq ENDPOINT"
            )
        self.path.unlink(missing_ok=True)

    def remove_file(self) -> None:
        """Leave no socket file behind."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


@contextlib.contextmanager
def file_mode(mode: int) -> Iterator[None]:
    """Files made inside get no more permissions than `mode`, from their first moment on.

    The mask belongs to the process: another thread that makes a file now makes it less accessible, never more.
    """
    before = os.umask(~mode & 0o777)
    try:
        yield
    finally:
        os.umask(before)


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # not ours to open, or too busy to answer: in any case not left behind
    return True
