"""The open sessions of a server: who owns them, whose turn it is, and which go first when room is needed.

A session is keyed by (peer, name): the name is the client's and never leaves memory; two peers may use the same name.
Source: spec/session_protocol.md 2.5 (aliasing), 2.8, 7.4, 7.6, 7.8.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from worldvln_edge.protocol import Bye, Limits, ProtocolError
from worldvln_edge.runtime.sessions.live_session import LiveSession, SessionKey
from worldvln_edge.runtime.sessions.memory_budget import MemoryBudget, in_units
from worldvln_edge.runtime.sessions.session_events import SessionEnd


class SessionTable:
    """All methods are called from one event loop.

    Args:
        limits: counts and times.
        budget: bytes.
        clock: seconds, monotonic.
        on_drop: called with every session that leaves the table, and why, to free what it holds.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        budget: MemoryBudget,
        clock: Callable[[], float],
        on_drop: Callable[[LiveSession, SessionEnd], None],
    ):
        self._limits, self._budget, self._clock, self._on_drop = limits, budget, clock, on_drop
        self._sessions: dict[SessionKey, LiveSession] = {}
        self._turns: dict[SessionKey, tuple[asyncio.Lock, int]] = {}
        self._reserved: list[SessionKey] = []

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def waiting_bytes(self) -> int:
        return sum(session.waiting_bytes for session in self._sessions.values())

    @asynccontextmanager
    async def turn(self, key: SessionKey) -> AsyncIterator[None]:
        """Hold the session's turn: requests for one (peer, name) are handled in order of arrival."""
        lock, users = self._turns.get(key) or (asyncio.Lock(), 0)
        self._turns[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            users = self._turns[key][1] - 1
            if users:
                self._turns[key] = (lock, users)
            else:
                del self._turns[key]

    def users(self, key: SessionKey) -> int:
        """Requests that hold the session's turn or wait for it."""
        return self._turns[key][1] if key in self._turns else 0

    def of_uid(self, peer: str, uid: str) -> LiveSession:
        """A peer's session by the name that its events carry. Raises ProtocolError `unknown_session`."""
        for session in self._sessions.values():
            if session.uid == uid and session.key[0] == peer:
                return session
        raise ProtocolError("unknown_session", "there is no such session, or it has ended")

    def find(self, key: SessionKey) -> LiveSession | None:
        return self._sessions.get(key)

    def get(self, key: SessionKey) -> LiveSession:
        """The session, marked as used now.

        Raises:
            ProtocolError: `unknown_session`: never started, ended, expired, or another peer's.
        """
        session = self.use(key)
        if session is None:
            raise ProtocolError("unknown_session", "no such session; start it (it may have ended or expired)")
        return session

    def use(self, key: SessionKey) -> LiveSession | None:
        """The session if there is one, marked as used now."""
        session = self._sessions.get(key)
        if session is not None:
            session.last_used = self._clock()
        return session

    @contextmanager
    def reserve(self, key: SessionKey) -> Iterator[None]:
        """Hold a place for a session about to be added, dropping old ones where needed.

        Raises:
            ProtocolError: `overloaded`: every session was active lately, or what they may hold leaves no room for
                another one. `busy`: this peer has too many open ones.
        """
        peer = key[0]
        if peer and self._open_sessions(peer, besides=key) >= self._limits.max_open_sessions_per_key:
            self._drop_oldest_idle(lambda session: session.key[0] == peer and not session.is_done)
            if self._open_sessions(peer, besides=key) >= self._limits.max_open_sessions_per_key:
                raise ProtocolError(
                    "busy",
                    f"this key has {self._limits.max_open_sessions_per_key} open sessions; end one of them first",
                )
        if self._count(besides=key) >= self._limits.max_sessions:
            self._drop_oldest_idle(lambda session: True)
            if self._count(besides=key) >= self._limits.max_sessions:
                raise ProtocolError(
                    "overloaded",
                    f"the server holds {self._limits.max_sessions} active sessions",
                    retry_ms=round(self._limits.min_idle_s * 1000),
                )
        self._make_room_for_session(key)
        self._reserved.append(key)
        try:
            yield
        finally:
            self._reserved.remove(key)

    def _count(self, besides: SessionKey) -> int:
        reserved = [key for key in self._reserved if key != besides]
        return len(self._sessions.keys() - {besides}) + len([key for key in reserved if key not in self._sessions])

    def _open_sessions(self, peer: str, besides: SessionKey) -> int:
        held = {key for key, session in self._sessions.items() if key[0] == peer and not session.is_done}
        return len((held | {key for key in self._reserved if key[0] == peer}) - {besides})

    def make_room_for_bytes(self) -> None:
        """Drop the idle session that frees frames, if there is one."""
        self._drop_oldest_idle(lambda session: session.waiting_bytes > 0)

    def _make_room_for_session(self, key: SessionKey) -> None:
        """Drop idle sessions until another one's memory fits; none if that would not be enough."""
        allowed, needed = self._budget.sessions_bytes, self._budget.session_bytes
        if allowed is None or needed == 0:
            return
        held = {other: session.counted_bytes for other, session in self._sessions.items() if other != key}
        # A place that is being filled counts as the session that it is for, whatever it replaces.
        held |= {other: needed for other in self._reserved if other != key}
        missing = sum(held.values()) + needed - allowed
        going = []
        for session in self._idle_in_order():
            if missing <= 0:
                break
            if session.counted_bytes > 0:
                going.append(session)
                missing -= session.counted_bytes
        if missing > 0:
            free = max(0, allowed - sum(held.values()))
            raise ProtocolError(
                "overloaded",
                f"another session may need {in_units(needed)}, and {in_units(free)} of the {in_units(allowed)} for "
                f"sessions are free, with {len(held)} sessions there; end one, or try again when one was idle for "
                f"{self._limits.min_idle_s:g} s (the server's operator may allow more with --session-memory-mb)",
                retry_ms=round(self._limits.min_idle_s * 1000),
            )
        for session in going:
            self._drop(session)

    def _drop_oldest_idle(self, may_drop: Callable[[LiveSession], bool]) -> None:
        """Drop the first session in the order of `_idle_in_order` that may go."""
        for session in self._idle_in_order():
            if may_drop(session):
                self._drop(session)
                return

    def _idle_in_order(self) -> list[LiveSession]:
        """Sessions that may be dropped: done ones first, then the longest idle; none in use or active lately."""
        now = self._clock()
        idle = [
            session
            for key, session in self._sessions.items()
            if key not in self._turns and now - session.last_used >= self._limits.min_idle_s
        ]
        return sorted(idle, key=lambda session: (not session.is_done, session.last_used))

    def add(self, session: LiveSession) -> None:
        """Put a session in; one of the same key is replaced and freed."""
        self.remove(session.key, "replaced")
        self._sessions[session.key] = session

    def remove(self, key: SessionKey, reason: SessionEnd) -> LiveSession | None:
        """Take a session out and free it; None if there is none."""
        session = self._sessions.get(key)
        if session is not None:
            del self._sessions[key]
            self._on_drop(session, reason)
        return session

    def _drop(self, session: LiveSession) -> None:
        self.remove(session.key, "expired")
        if session.notify is not None:
            session.notify(Bye(reason="expired", session=session.key[1]))

    def expire(self) -> int:
        """Drop every session that was idle longer than session_ttl_s; returns how many."""
        now = self._clock()
        old = [
            session
            for key, session in self._sessions.items()
            if key not in self._turns and now - session.last_used > self._limits.session_ttl_s
        ]
        for session in old:
            self._drop(session)
        return len(old)

    def clear(self) -> None:
        """Free every session."""
        for key in list(self._sessions):
            self.remove(key, "shutdown")
