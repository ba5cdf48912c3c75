"""Which connections a ZeroMQ socket has: a number for each, so that a routing identity can be tied to one of them.

ZeroMQ names the file descriptor of a message's connection, and a descriptor is used again. Its monitor tells of the
end of a connection before anybody can come in its place, so a number taken from here is never inherited.
"""

from __future__ import annotations

import asyncio
import itertools
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
    """

    def __init__(self, socket: Any, *, on_end: Callable[[int], None], on_refused: Callable[[], None]):
        self._socket, self._on_end, self._on_refused = socket, on_end, on_refused
        self._link_of: dict[int, int] = {}
        self._numbers = itertools.count(1)
        address = f"inproc://monitor-{uuid.uuid4().hex}"
        socket.monitor(address, _WATCHED)
        # Read without waiting, so not a socket of zmq.asyncio.
        self._monitor: Any = zmq.Context.shadow(socket.context.underlying).socket(zmq.PAIR)
        self._monitor.connect(address)
        asyncio.get_running_loop().add_reader(self._monitor.FD, self.notice)

    def __len__(self) -> int:
        """Open connections."""
        return len(self._link_of)

    def notice(self) -> None:
        """Take in what happened until now; to be called before a message is believed, and before one is sent."""
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.DONTWAIT))
            except zmq.Again:
                return
            if event["event"] == zmq.Event.ACCEPTED:
                self._link_of[event["value"]] = next(self._numbers)
            elif event["event"] == zmq.Event.DISCONNECTED:
                link = self._link_of.pop(event["value"], None)
                if link is not None:
                    self._on_end(link)
            else:
                self._on_refused()

    def link_of(self, frame: zmq.Frame) -> int | None:
        """Number of the connection that a message came over; None if it has ended."""
        return self._link_of.get(frame_property(frame, zmq.SRCFD))

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
