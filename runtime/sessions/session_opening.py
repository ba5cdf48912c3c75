"""How a session comes into the table: begun by its client, or taken up again from its journal.

What a journal cannot give back is said once, with the way out: the file is set aside, and a new start works at once.
Source: spec/session_protocol.md 2.5, 2.8, 7.2 (`start`), 7.4.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from worldvln_edge.protocol import Bye, ProtocolError
from worldvln_edge.runtime.sessions.chained_session import ChainedSession, SettledRule, chained_horizon
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, Ticket
from worldvln_edge.runtime.sessions.journal_records import JournalDamageError, Opening, RecordedSession
from worldvln_edge.runtime.sessions.live_session import LiveSession, SessionKey
from worldvln_edge.runtime.sessions.observation import PATIENCE_S
from worldvln_edge.runtime.sessions.policy import Emit, Policy, PolicySession
from worldvln_edge.runtime.sessions.policy_calls import on_device
from worldvln_edge.runtime.sessions.session_events import SessionEvents, SessionOpened
from worldvln_edge.runtime.sessions.session_journal import SessionJournal, SessionLog
from worldvln_edge.runtime.sessions.session_table import SessionTable

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class _NotRestored:
    """What the policy said to its frames; its session is closed."""

    error: Exception


@dataclass(frozen=True, kw_only=True)
class SessionStart:
    """What a session begins with."""

    prompt: str
    seed: int = 0
    negative_prompt: str = ""
    emit: Emit = "ahead"
    horizons: int | None = None
    """How many it is made of; None: it is not chained."""
    reply: str = "segment"
    """What an answer holds where the client may choose it (openpi)."""


class SessionOpener:
    """Opens sessions whose turn is held.

    Args:
        policy: makes the policy sessions, on threads of `device`.
        device: is shared with those that fly.
        table: that they go into.
        journal: that they are kept in; None: nowhere.
        settled: when a chained session has arrived.
        clock: seconds for idle times; monotonic.
        events: is told of every session that opens, and then of what happens to it.
    """

    def __init__(
        self,
        policy: Policy,
        device: DeviceQueue,
        table: SessionTable,
        journal: SessionJournal | None,
        settled: SettledRule,
        clock: Callable[[], float],
        events: SessionEvents,
    ):
        self._policy, self._device, self._table, self._journal = policy, device, table, journal
        self._settled, self._clock, self._events = settled, clock, events
        info = policy.info
        self._policy_name = " ".join(
            str(part) for part in (info.name, info.precision, info.image_hw, info.horizon, info.weights) if part
        )

    async def open(
        self, key: SessionKey, start: SessionStart, ticket: Ticket, notify: Callable[[Bye], None] | None = None
    ) -> LiveSession:
        """A new session in the table, in place of one of the same key; when it is refused, the old one stays.

        Args:
            key: its peer and name.
            start: what it begins with.
            ticket: lets the caller cancel.
            notify: called with `bye` if the session expires.

        Raises:
            ProtocolError: `busy`, `overloaded`, `cancelled`, `internal`.
        """
        with self._table.reserve(key):
            policy_session = await self._on_device(key, lambda: self._new_policy_session(start), ticket)
            if ticket.is_cancelled:
                self.close_later(policy_session)
                raise ProtocolError("cancelled", "cancelled; no session was started")
            replaced = self._table.find(key)
            session = self._add(key, start, policy_session)
        session.notify = notify
        if self._journal is not None:
            session.log = SessionLog(self._journal, key)
            session.log.open(self._opening(key, start))
        self._tell_opened(session, start)
        if replaced is not None and replaced.is_held:  # whoever holds a drone lets it go: a client cannot
            session.steer(hold=True)
        return session

    async def restore(self, key: SessionKey, ticket: Ticket) -> LiveSession | None:
        """The session as its journal tells it, if it is not here but has one: before a crash it was here.

        Raises:
            ProtocolError: `unknown_session`: the journal cannot be restored; it was set aside. `busy`, `overloaded`,
                `cancelled`, `internal`: it was not tried, and may be.
        """
        if self._journal is None or self._table.find(key) is not None:
            return None
        try:
            recorded = await asyncio.wrap_future(self._journal.read(key))
        except JournalDamageError as error:
            raise await self._given_up(self._journal, key, error) from None
        if recorded is None:
            return None
        opening, settings = recorded.opening, recorded.settings
        if opening.policy != self._policy_name:
            text = f"it was written for {opening.policy}, and this server flies {self._policy_name}"
            raise await self._given_up(self._journal, key, JournalDamageError(text))
        start = SessionStart(
            prompt=settings.prompt,
            seed=settings.seed,
            negative_prompt=settings.negative_prompt,
            emit=opening.emit,
            horizons=opening.horizons,
            reply=opening.reply,
        )
        with self._table.reserve(key):
            found = await self._on_device(key, lambda: self._restored(start, recorded), ticket)
            if isinstance(found, _NotRestored):
                raise await self._given_up(self._journal, key, found.error)
            if ticket.is_cancelled:
                self.close_later(found)
                raise ProtocolError("cancelled", "cancelled; the session may be resumed")
            session = self._add(key, start, found)
        self._go_on(session, recorded)
        session.log = SessionLog(self._journal, key)
        session.log.go_on(recorded)
        self._tell_opened(session, start, recorded)
        return session

    def close_later(self, session: PolicySession) -> None:
        """Free a policy session on a device thread, behind what runs there."""
        self._device.submit_background(partial(_close, session))

    async def _on_device(self, key: SessionKey, work: Callable[[], _T], ticket: Ticket) -> _T:
        priority = asyncio.get_running_loop().time() + PATIENCE_S
        return await on_device(self._device, work, ticket=ticket, priority=priority, session=key)

    def _new_policy_session(self, start: SessionStart) -> PolicySession:
        open_session: Callable[..., PolicySession] = self._policy.new_session
        if start.horizons is not None:
            open_session = partial(ChainedSession, self._policy, horizons=start.horizons)
        return open_session(start.prompt, seed=start.seed, negative_prompt=start.negative_prompt, emit=start.emit)

    def _restored(self, start: SessionStart, recorded: RecordedSession) -> PolicySession | _NotRestored:
        """On a device thread."""
        session = self._new_policy_session(start)
        try:
            session.restore(recorded.frames, recorded.emitted)
        except Exception as error:  # the boundary to foreign code: whatever a policy raises must not leak its session
            _close(session)
            return _NotRestored(error)
        return session

    def _add(self, key: SessionKey, start: SessionStart, policy_session: PolicySession) -> LiveSession:
        horizon = self._policy.info.horizon
        session = LiveSession(
            key=key,
            policy_session=policy_session,
            horizon=horizon if start.horizons is None else chained_horizon(horizon, start.horizons),
            still_steps=None if start.horizons is None else 0,
            seed=start.seed,
            last_used=self._clock(),
            most_bytes=self._policy.session_bytes,
            prompt=start.prompt,
            negative_prompt=start.negative_prompt,
            reply=start.reply,
            events=self._events,
        )
        self._table.add(session)
        return session

    def _tell_opened(self, session: LiveSession, start: SessionStart, recorded: RecordedSession | None = None) -> None:
        self._events.tell(
            SessionOpened(
                uid=session.uid,
                key=session.key,
                prompt=start.prompt,
                negative_prompt=start.negative_prompt,
                seed=start.seed,
                emit=start.emit,
                horizons=start.horizons,
                horizon=session.horizon,
                restored_frames=() if recorded is None else tuple(recorded.frames),
                restored_emitted=-1 if recorded is None else recorded.emitted,
                is_held=session.is_held,
            )
        )

    def _opening(self, key: SessionKey, start: SessionStart) -> Opening:
        return Opening(
            peer=key[0],
            name=key[1],
            prompt=start.prompt,
            seed=start.seed,
            negative_prompt=start.negative_prompt,
            emit=start.emit,
            horizons=start.horizons,
            reply=start.reply,
            policy=self._policy_name,
        )

    def _go_on(self, session: LiveSession, recorded: RecordedSession) -> None:
        """Take over what the table knows of a session besides its policy session."""
        now_s, unix_s = asyncio.get_running_loop().time(), time.time()
        session.chunks, session.capture_ns = dict(recorded.chunks), dict(recorded.capture_ns)
        session.last_call = recorded.last_call
        session.is_held, session.said_prompt = recorded.settings.is_held, recorded.settings.said_prompt
        # The clock of the machine may have been set back since; no frame comes from the future.
        ages_s = [max(0.0, unix_s - arrived_s) for arrived_s in recorded.arrived_s]
        session.arrived_s = {index: now_s - age_s for index, age_s in enumerate(ages_s, start=1)}
        session.waiting_frames = recorded.frames[session.frames_seen :]
        session.refresh()
        if session.is_done:
            session.held_bytes = session.policy_session.held_bytes
        if session.still_steps is not None:
            for segment in sorted(session.chunks):
                session.still_steps = self._settled.after(session.chunks[segment], session.still_steps)

    async def _given_up(self, journal: SessionJournal, key: SessionKey, error: Exception) -> ProtocolError:
        """The refusal, after the journal was set aside."""
        path = await asyncio.wrap_future(journal.set_aside(key))
        is_damage = isinstance(error, JournalDamageError)
        _log.error(
            "a session could not be restored (%s); its journal %s",
            error if is_damage else f"{type(error).__name__}: {error}",
            "stays where it is" if path is None else f"was set aside: {path}",
            exc_info=None if is_damage else error,
        )
        return ProtocolError(
            "unknown_session", "the session could not be restored after the server was started again; start it again"
        )


def _close(session: PolicySession) -> None:
    try:
        session.close()
    except (RuntimeError, ValueError, OSError) as error:
        _log.warning("a session's buffers could not be freed", exc_info=error)
