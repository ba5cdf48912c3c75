"""Which connections a ZeroMQ socket has: a number for each, so that a routing identity can be tied to one of them.

ZeroMQ names the file descriptor of a message's connection, and a descriptor is used again. Its monitor tells of the
end of a connection before anybody can come in its place, so a number taken from here is never inherited.

ZeroMQ itself lets any number of connections in. Here they are bounded: with all places taken, the connection that has
been there longest without a message is ended, whether it shook hands or not.
Source: spec/session_protocol.md 7.8.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket as socketlib
import uuid
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

_WATCHED = (
    zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
)


class ZmqLinks:
    """Watches a listening socket, on its event loop.

    Args:
        socket: of `zmq.asyncio`; not bound yet.
        on_end: told the number of a connection that ended.
        on_refused: told of a handshake that failed.
        most: connections at the same time.
    """

    def __init__(self, socket: Any, *, on_end: Callable[[int], None], on_refused: Callable[[], None], most: int):
        self._socket, self._on_end, self._on_refused, self._most = socket, on_end, on_refused, most
        self._link_of: dict[int, int] = {}
        """Number by descriptor."""
        self._strangers: dict[int, int] = {}
        """Descriptor by number, of those who are nobody's; longest first."""
        self._leaving: set[int] = set()
        """Numbers of those that were ended here, until ZeroMQ has noticed."""
        self._numbers = itertools.count(1)
        address = f"inproc://monitor-{uuid.uuid4().hex}"
        socket.monitor(address, _WATCHED)
        # Read without waiting, so not a socket of zmq.asyncio.
        self._monitor: Any = zmq.Context.shadow(socket.context.underlying).socket(zmq.PAIR)
        self._monitor.connect(address)
        asyncio.get_running_loop().add_reader(self._monitor.FD, self.notice)
        self.notice()  # ZeroMQ tells of an event only whoever has once found that there was none

    def __len__(self) -> int:
        """Open connections."""
        return len(self._link_of)

    def notice(self) -> None:
        """Take in what happened until now; to be called before a message is believed, and before one is sent."""
        self._take_events()
        while self._strangers and len(self._link_of) - len(self._leaving) > self._most:
            self._end(*next(iter(self._strangers.items())))

    def _take_events(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return
            if event["event"] == zmq.Event.ACCEPTED:
                link = self._link_of[event["value"]] = next(self._numbers)
                self._strangers[link] = event["value"]
            elif event["event"] == zmq.Event.DISCONNECTED:
                ended = self._link_of.pop(event["value"], None)
                if ended is not None:
                    self._strangers.pop(ended, None)
                    self._leaving.discard(ended)
                    self._on_end(ended)
            else:
                self._on_refused()

    def link_of(self, frame: zmq.Frame) -> int | None:
        """Number of the connection that a message came over; None if it has ended."""
        return self._link_of.get(frame_property(frame, zmq.SRCFD))

    def keep(self, link: int) -> None:
        """It is a client's now: it is not ended for newcomers."""
        self._strangers.pop(link, None)

    def release(self, link: int) -> None:
        """The client was forgotten; its connection may be there still, and makes way again."""
        descriptor = next((each for each, number in self._link_of.items() if number == link), None)
        if descriptor is not None and link not in self._leaving:
            self._strangers[link] = descriptor

    def _end(self, link: int, descriptor: int) -> None:
        """End a connection. ZeroMQ, which owns it, finds it closed by the other side."""
        del self._strangers[link]
        family, kind = socketlib.AF_INET, socketlib.SOCK_STREAM  # no matter which, to shut it down
        with contextlib.suppress(OSError), socketlib.fromfd(descriptor, family, kind) as copy:
            # Had the connection ended before it was copied, so that the copy is somebody else's, we hear of it here.
            self._take_events()
            if self._link_of.get(descriptor) == link:
                self._leaving.add(link)
                copy.shutdown(socketlib.SHUT_RDWR)

    def close(self) -> None:
        """Stop watching; before the socket is closed."""
        asyncio.get_running_loop().remove_reader(self._monitor.FD)
        self._socket.disable_monitor()
        self._monitor.close(0)


def frame_property(frame: zmq.Frame, name: Any) -> Any:
    """What ZeroMQ knows of a message's origin; None where it knows nothing."""
    try:
        return frame.get(name)
    except zmq.ZMQError:
        return None
