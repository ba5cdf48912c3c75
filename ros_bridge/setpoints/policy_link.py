"""The line between the policy process and the setpoint process: a Unix socket, one small message a packet.

The setpoint process listens, one policy is connected at a time; a newer one replaces it. Packets keep their borders
(SOCK_SEQPACKET), and a peer that dies closes the line, so its death is seen at once. Times are CLOCK_MONOTONIC in ns,
which all processes of a machine share.
"""

from __future__ import annotations

import errno
import select
import socket
from pathlib import Path

import msgspec

_PACKET = 65536
_BACKLOG = 4
_SEND_S = 0.5
Action = tuple[float, float, float, float, float, float]


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """Heartbeat of the policy. `seen_ns`: when it, and its server, were last known to be alive."""

    seen_ns: int


class Chunk(msgspec.Struct, tag="chunk", frozen=True):
    """Actions to fly (cm, deg). `seen_ns`: when the newest frame was taken that they rest on."""

    number: int
    actions: list[Action]
    fps: float
    seen_ns: int


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """The flight is over: hold."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """With a simulator in lockstep: the policy has taken in what came with this /clock, and the world may go on."""

    stamp_ns: int


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """What the setpoint process did at `at_ns`; sent to the policy at every tick."""

    at_ns: int
    mode: str
    reason: str
    chunk: int | None
    progress: float
    faults: tuple[str, ...] = ()


FromPolicy = Alive | Chunk | Stop | Ready
_encoder = msgspec.msgpack.Encoder()
_from_policy = msgspec.msgpack.Decoder(FromPolicy)
_progress = msgspec.msgpack.Decoder(Progress)


class LinkError(OSError):
    """The line cannot be opened. The message says where and what to do."""


class LinkListener:
    """The setpoint process's end. Not thread-safe; every call returns at once.

    Raises:
        LinkError: somebody listens at the path already, or it cannot be made.
    """

    def __init__(self, path: Path):
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _remove_dead(path)
            self._socket.bind(str(path))
            path.chmod(0o600)  # who may connect may fly
            self._socket.listen(_BACKLOG)
        except OSError as failure:
            self._socket.close()
            if failure.errno == errno.EADDRINUSE:
                raise LinkError(f"{path}: a setpoint process listens here already; stop it first") from failure
            raise LinkError(f"{path}: cannot listen here ({failure}); give a path in a folder of your own") from failure
        self._socket.setblocking(False)
        self._policy: socket.socket | None = None

    def sockets(self) -> list[socket.socket]:
        """What to wait on for messages."""
        return [self._socket] if self._policy is None else [self._socket, self._policy]

    @property
    def has_policy(self) -> bool:
        return self._policy is not None

    def accept(self) -> bool:
        """Let a waiting policy in; whether a new one came."""
        try:
            policy, _ = self._socket.accept()
        except BlockingIOError:
            return False
        policy.setblocking(False)
        self._drop()
        self._policy = policy
        return True

    def receive(self) -> list[FromPolicy]:
        """Messages that have come, in order. Whoever sends something else is disconnected."""
        messages: list[FromPolicy] = []
        while self._policy is not None:
            try:
                packet = self._policy.recv(_PACKET)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                self._drop()
                break
            try:
                messages.append(_from_policy.decode(packet))
            except msgspec.MsgspecError:
                self._drop()
        return messages

    def send(self, progress: Progress) -> None:
        """Tell the policy; a report that it has no room for is lost, the next one says more."""
        if self._policy is None:
            return
        try:
            self._policy.send(_encoder.encode(progress))
        except BlockingIOError:
            pass
        except OSError:
            self._drop()

    def close(self) -> None:
        self._drop()
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _drop(self) -> None:
        if self._policy is not None:
            self._policy.close()
            self._policy = None


class PolicyLink:
    """The policy's end. Sending is thread-safe.

    Raises:
        LinkError: no setpoint process listens at the path.
    """

    def __init__(self, path: Path):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_SEND_S)
        try:
            self._socket.connect(str(path))
        except OSError as failure:
            self._socket.close()
            raise LinkError(
                f"{path}: no setpoint process listens here ({failure}); start `worldvln-edge ros setpoints` first"
            ) from failure

    def send(self, message: FromPolicy) -> None:
        """Raises LinkError: the setpoint process has gone, or has taken another policy."""
        try:
            self._socket.send(_encoder.encode(message))
        except OSError as failure:
            raise _lost(failure) from failure

    def receive(self, timeout_s: float) -> Progress | None:
        """The next report; None if none comes in time. Raises LinkError as `send`."""
        try:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                return None
            packet = self._socket.recv(_PACKET)
        except (OSError, ValueError) as failure:  # ValueError: closed here, by another thread
            raise _lost(failure) from failure
        if not packet:
            raise _lost("closed")
        return _progress.decode(packet)

    def close(self) -> None:
        self._socket.close()


def _lost(reason: object) -> LinkError:
    return LinkError(f"the line to the setpoint process is lost ({reason}); see its log")


def _remove_dead(path: Path) -> None:
    """A socket file that nobody listens at is left over from a process that was killed."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
