"""How many connections the HTTP and WebSocket ports hold, and which of them make way for a newcomer.

A connection waits as long as the server has no whole request of it: in its TLS handshake, before its headers, between
two requests, and in the middle of a body. Whoever waits costs a place and no more, so with all places taken the one
that waits longest goes, and connections that are opened and left alone keep nobody out.
Source: spec/session_protocol.md 7.8.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import Protocol

from worldvln_edge.protocol import Limits

SPARE_CONNECTIONS = 64
"""Above `max_connections`, so that health and metrics are answered while clients take all of their places."""


class Guest(Protocol):
    """A connection."""

    def give_up(self) -> None:
        """End at once; called when it waited too long, or when its place is needed."""
        ...


class ConnectionRoom:
    """All connections of one server's ports. Lives on one event loop.

    Args:
        limits: `max_connections`, and `headers_within_s`, which a TLS handshake may take, too.
        served: connections behind their handshake; uvicorn keeps the set.
    """

    def __init__(self, limits: Limits, served: Sized):
        self._most, self._served = limits.max_connections + SPARE_CONNECTIONS, served
        self._patience_s = limits.headers_within_s
        self._shaking_hands: set[Guest] = set()
        self._waiting: dict[Guest, asyncio.TimerHandle | None] = {}
        """Longest first; None for those whose time somebody else bounds."""

    def __len__(self) -> int:
        return len(self._served) + len(self._shaking_hands)

    def make_place(self) -> bool:
        """Whether the newcomer, which is counted already and does not wait yet, may stay."""
        if len(self) <= self._most:
            return True
        longest = next(iter(self._waiting), None)
        if longest is None:
            return False
        self.stop_waiting(longest)
        longest.give_up()
        return True

    def begin_handshake(self, guest: Guest) -> bool:
        """Count a connection that has only been accepted. Returns whether it may stay."""
        self._shaking_hands.add(guest)
        if not self.make_place():
            return False
        self.wait(guest)
        return True

    def end_handshake(self, guest: Guest) -> None:
        """It is among the served ones now, or gone."""
        self._shaking_hands.discard(guest)
        self.stop_waiting(guest)

    def end_handshakes(self) -> None:
        """The server stops: nobody else is let in."""
        for guest in list(self._shaking_hands):
            self.end_handshake(guest)
            guest.give_up()

    def wait(self, guest: Guest) -> None:
        """The guest owes a request from now on, and is given up unless it comes in time."""
        self.stop_waiting(guest)
        self._waiting[guest] = asyncio.get_running_loop().call_later(self._patience_s, self._too_late, guest)

    def wait_for_body(self, guest: Guest) -> None:
        """The headers are here. How long the body may take is the route's business, but its place may be needed."""
        timer = self._waiting.get(guest)
        if timer is not None:
            timer.cancel()
            self._waiting[guest] = None

    def stop_waiting(self, guest: Guest) -> None:
        """It is the server's turn, or the guest is gone."""
        timer = self._waiting.pop(guest, None)
        if timer is not None:
            timer.cancel()

    def _too_late(self, guest: Guest) -> None:
        del self._waiting[guest]
        guest.give_up()
