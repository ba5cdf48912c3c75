"""Every door's way to the policy: named sessions, idempotent frames, deadlines, back-pressure, and errors that explain.

A door turns its wire messages into `start`, `observe` and `end`; everything that the protocol promises about frames,
segments and time is kept here. The manager lives on one event loop; decoding and inference run on worker threads.
Source: spec/session_protocol.md 2.5, 2.6, 2.8, 7.4, 7.5.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import msgspec

from worldvln_edge.protocol import UNSET, Actions, Bye, Limits, Observe, ProtocolError, SessionState, Start
from worldvln_edge.runtime.sessions.admission import Admission
from worldvln_edge.runtime.sessions.ahead_worker import AheadWorker
from worldvln_edge.runtime.sessions.chained_session import SettledRule
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, Ticket
from worldvln_edge.runtime.sessions.envelope import Envelope, EnvelopeConfig
from worldvln_edge.runtime.sessions.implicit_session import ImplicitAnswer, ImplicitCall, ImplicitCallRunner
from worldvln_edge.runtime.sessions.live_session import LiveSession, SessionKey
from worldvln_edge.runtime.sessions.memory_budget import plan_budget
from worldvln_edge.runtime.sessions.meter import Meter, NoMeter
from worldvln_edge.runtime.sessions.observation import ObservationRunner
from worldvln_edge.runtime.sessions.operator_desk import OperatorDesk
from worldvln_edge.runtime.sessions.policy import Policy
from worldvln_edge.runtime.sessions.request_rate import RequestRate
from worldvln_edge.runtime.sessions.session_events import (
    RequestAnswered,
    RequestRefused,
    SessionClosed,
    SessionEnd,
    SessionEvents,
    SessionResumed,
)
from worldvln_edge.runtime.sessions.session_journal import SessionJournal
from worldvln_edge.runtime.sessions.session_opening import SessionOpener, SessionStart
from worldvln_edge.runtime.sessions.session_table import SessionTable
from worldvln_edge.runtime.sessions.warm_up import WarmUpError

_log = logging.getLogger(__name__)


def new_session_name() -> str:
    """Name of a session that its client did not name: 128 random bits (7.2)."""
    return secrets.token_hex(16)


def _ended(session: str, re: int) -> SessionState:
    """Of a session that nobody knows."""
    return SessionState(re=re, session=session, state="ended", frames=0, emitted=-1, need=0)


async def _written(session: LiveSession | None) -> None:
    """Nothing is answered that a crash could undo."""
    if session is not None and session.log is not None:
        await session.log.written()


class SessionManager:
    """Sessions of one policy, shared by every connection.

    Args:
        policy: what turns frames into actions.
        limits: spec/session_protocol.md 7.8. Where little memory is available, less is kept for waiting frames.
        session_memory_bytes: that all sessions together may hold; None: see `memory_budget.plan_budget`.
        device_workers: threads that may be inside the policy at the same time.
        decode_workers: threads that decode images.
        meter: is told what happens.
        envelope: what may be flown; None: actions are answered as the policy gives them.
        journal: where sessions are kept beyond the end of this process; closed with the manager. None: nowhere.
        events: is told what happens to sessions; `events` of the manager.
        settled: when a chained session says that the drone has arrived; None: UAV-Flow's rule.
        clock: seconds for idle times; monotonic.

    Raises:
        MemoryBudgetError: not even one session fits into the memory.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        limits: Limits | None = None,
        session_memory_bytes: int | None = None,
        device_workers: int = 1,
        decode_workers: int = 2,
        meter: Meter | None = None,
        envelope: EnvelopeConfig | None = None,
        settled: SettledRule | None = None,
        journal: SessionJournal | None = None,
        events: SessionEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.policy = policy
        limits = limits or Limits()
        self.budget = plan_budget(
            policy.session_bytes, limits, available_bytes=policy.available_bytes(), asked_bytes=session_memory_bytes
        )
        self.limits = msgspec.structs.replace(limits, max_stored_bytes=self.budget.frames_bytes)
        self.meter: Meter = meter or NoMeter()
        self.events = events or SessionEvents()
        self.request_rate = RequestRate(self.limits)
        self._is_closed = False
        self._journal = journal
        self._device = DeviceQueue(device_workers)
        self._decoders = ThreadPoolExecutor(decode_workers, thread_name_prefix="decode")
        self._table = SessionTable(self.limits, budget=self.budget, clock=clock, on_drop=self._free)
        self._clock = clock
        self._observations = ObservationRunner(
            policy,
            self.limits,
            self._device,
            self._decoders,
            self._table,
            self.meter,
            None if envelope is None else Envelope(envelope, fps=policy.info.horizon.fps),
            settled,
        )
        self._admission = Admission(self.limits, self._device, device_workers, self._observations.estimate, self.meter)
        self._opener = SessionOpener(
            policy, self._device, self._table, journal, self._observations.settled, clock, self.events
        )
        self._calls = ImplicitCallRunner(policy.info.horizon, self._observations)
        self._ahead = AheadWorker(self._device, self._table)
        self.operator = OperatorDesk(self._table, self._ahead, self._device)
        """For who watches the flights."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are let in."""
        return self._admission.is_open

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._table)

    @property
    def queue(self) -> int:
        """Requests that wait for their turn, for decoding or for the device."""
        return self._admission.waiting

    @property
    def device_work_s(self) -> float:
        """How long the longest piece of device work runs now, 0 without any."""
        return self._device.running_s

    async def start(
        self, peer: str, request: Start, *, ticket: Ticket | None = None, notify: Callable[[Bye], None] | None = None
    ) -> SessionState:
        """Open, replace or resume a session. A start that is refused or cancelled changes nothing.

        Args:
            peer: whose name space: the sessions of other peers do not exist for this one.
            request: as decoded by `wire.decode_request`.
            ticket: lets the caller cancel.
            notify: called with `bye` if the session expires.

        Raises:
            ProtocolError: `unknown_session` (resume), `busy`, `overloaded`, `cancelled`, `internal`.
        """
        ticket = ticket or Ticket()
        key = (peer, request.session if request.session is not None else new_session_name())
        self._ahead.stop(key)
        async with self._admission.admit(), self._table.turn(key):
            if ticket.is_cancelled:
                raise ProtocolError("cancelled", "cancelled before the session was started")
            if request.resume:
                restored = await self._opener.restore(key, ticket)
                session = restored or self._table.get(key)
                session.notify = notify
                if restored is None:
                    self.events.tell(SessionResumed(uid=session.uid))
                if restored or session.has_more_ahead:
                    self._ahead.begin(session)
            else:
                start = SessionStart(
                    prompt=request.prompt or "",
                    seed=request.seed,
                    negative_prompt=request.negative_prompt,
                    emit=request.emit,
                    horizons=self._horizons(request),
                )
                session = await self._opener.open(key, start, ticket, notify)
                self._ahead.begin(session)
            await _written(session)
            return session.state(request.id)

    def _horizons(self, request: Start) -> int | None:
        """How many horizons a session is made of; None: it is not chained."""
        if not request.chain:
            return None
        most = self.limits.max_horizons
        if request.max_horizons is not None and request.max_horizons > most:
            raise ProtocolError("invalid_field", f"max_horizons must be 1..{most}, found {request.max_horizons}")
        return request.max_horizons or most

    async def call(
        self, peer: str, call: ImplicitCall, *, ticket: Ticket | None = None, arrived_s: float | None = None
    ) -> ImplicitAnswer:
        """One call of a door whose sessions begin with their first prompt; a call that is refused changes nothing.

        Args:
            peer, ticket, arrived_s: as for `observe`.
            call: what was sent.

        Raises:
            ProtocolError: nothing was changed: `bad_request`, `unknown_session`, `invalid_field`, `prefix_shrunk`,
                `gap`, `bad_image`, `too_large`, `busy`, `overloaded`. The frames were stored: `deadline`, `cancelled`,
                `nonfinite_actions`, `internal`.
        """
        arrived_s = self._now() if arrived_s is None else arrived_s
        key, ticket = (peer, call.session), ticket or Ticket()
        self._ahead.stop(key)
        async with self._refusals_told(key), self._admission.admit(), self._short_queue(key), self._table.turn(key):
            restored = None if call.starts_afresh else await self._opener.restore(key, ticket)
            before = restored or self._table.use(key)
            start = SessionStart(
                prompt=call.prompt or "",
                seed=call.seed or 0,
                negative_prompt=call.negative_prompt or "",
                reply=call.reply,
            )
            try:
                answer = await self._calls.run(
                    before, call, lambda: self._opener.open(key, start, ticket), ticket, arrived_s
                )
            except ProtocolError as error:
                held = self._table.find(key)
                error.frames = None if held is None else held.frames
                raise
            finally:
                session = self._table.use(key)
                await _written(session)
            self.meter.answered(answer.ms, is_late=answer.is_late, hold=answer.hold)
            if session is not None:
                self.events.tell(
                    RequestAnswered(
                        uid=session.uid,
                        segment=-1 if answer.chunk is None else answer.chunk.segment,
                        frames=answer.frames,
                        ms=answer.ms,
                        is_late=answer.is_late,
                        hold=answer.hold,
                    )
                )
            if session is not None and (session is not before or answer.chunk is not None or session.has_more_ahead):
                self._ahead.begin(session)
            return answer

    @asynccontextmanager
    async def _short_queue(self, key: SessionKey) -> AsyncIterator[None]:
        """Refuse a call for which too many of the same session wait already."""
        if self._table.users(key) > self.limits.max_in_flight:
            self.meter.refused("busy")
            raise ProtocolError("busy", f"{self.limits.max_in_flight} calls wait for this session; wait for one")
        yield

    async def observe(
        self,
        peer: str,
        request: Observe,
        *,
        ticket: Ticket | None = None,
        notify: Callable[[Bye], None] | None = None,
        arrived_s: float | None = None,
    ) -> Actions:
        """Store new frames and answer the next segment's actions if they are ready; see 7.4 and 7.5 for the rules.

        Args:
            arrived_s: event-loop time at which the request arrived; deadlines count from there. Default: now.
            peer, request, ticket, notify: as for `start`.

        Raises:
            ProtocolError: nothing was stored: `unknown_session`, `gap`, `bad_image`, `too_large`, `invalid_field`,
                `bad_request`, `overloaded`. The frames were stored: `deadline`, `cancelled`, `nonfinite_actions`,
                `internal`.
        """
        arrived_s = self._now() if arrived_s is None else arrived_s
        key = (peer, request.session)
        self._ahead.stop(key)
        async with self._refusals_told(key), self._admission.admit(), self._table.turn(key):
            session = self._table.get(key)
            session.notify = notify or session.notify
            try:
                answer = await self._observations.run(session, request, ticket or Ticket(), arrived_s)
                hold = None if answer.hold is UNSET else answer.hold
                is_late = answer.late is True
                self.meter.answered(answer.ms, is_late=is_late, hold=hold)
                self.events.tell(
                    RequestAnswered(
                        uid=session.uid,
                        segment=answer.seg,
                        frames=answer.frames,
                        ms=answer.ms,
                        is_late=is_late,
                        hold=hold,
                    )
                )
                if answer.seg >= 0 or session.has_more_ahead:
                    self._ahead.begin(session)
                return answer
            except ProtocolError as error:
                error.frames = session.frames
                raise
            finally:
                session.last_used = self._clock()
                await _written(session)

    async def end(self, peer: str, session: str, re: int) -> SessionState:
        """Free a session after its earlier requests were answered; ending an unknown one is not an error."""
        key = (peer, session)
        self._ahead.stop(key)
        async with self._table.turn(key):
            ended = self._table.remove(key, "ended")
            if self._journal is not None:
                await asyncio.wrap_future(self._journal.forget(key))
            return _ended(session, re) if ended is None else ended.state(re, "ended")

    async def state(self, peer: str, session: str, re: int) -> SessionState:
        """The session as it stands now, without waiting for its turn; `ended` if there is none."""
        found = self._table.find((peer, session))
        if found is None:
            return _ended(session, re)
        state = found.state(re)
        await _written(found)
        return state

    def expire(self) -> int:
        """Drop sessions idle longer than session_ttl_s; returns how many. A server calls it every few seconds."""
        if self._journal is not None and not self._is_closed:
            self._journal.forget_old()
        return self._table.expire()

    def begin_warm_up(self) -> None:
        """Refuse requests with `not_ready` until `warm_up` has returned."""
        self._admission.begin_warm_up()

    async def warm_up(self, fly: Callable[[Policy], object]) -> None:
        """Run first flights on a device thread, then be ready.

        Raises:
            WarmUpError: a flight failed.
        """
        try:
            await self._device.run(lambda: fly(self.policy), priority=0.0, ticket=Ticket())
        except Exception as error:  # the boundary to foreign code: an engine may raise anything
            _log.error("the first flight failed", exc_info=error)
            raise WarmUpError(error) from error
        self._admission.end_warm_up()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait for the admitted work; False if some was left after the time-out."""
        self._admission.close()
        return await self._admission.drained(timeout_s)

    def close(self) -> None:
        """Free every session and let the worker threads end."""
        self._admission.close()
        self._ahead.close()
        self._is_closed = True
        self._table.clear()
        self._device.close()
        if self._journal is not None:
            self._journal.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    @asynccontextmanager
    async def _refusals_told(self, key: SessionKey) -> AsyncIterator[None]:
        """Tell watchers of a request that is refused, wherever that happens, if its session exists."""
        try:
            yield
        except ProtocolError as error:
            session = self._table.find(key)
            if session is not None:
                self.events.tell(RequestRefused(uid=session.uid, code=error.code, message=error.msg))
            raise

    def _free(self, session: LiveSession, reason: SessionEnd) -> None:
        self.events.tell(
            SessionClosed(
                uid=session.uid,
                reason=reason,
                frames=session.frames,
                emitted=session.emitted,
                is_done=session.is_done,
            )
        )
        if self._journal is not None and not self._is_closed:  # after a restart, sessions are wanted again
            self._journal.forget(session.key)
        session.waiting_frames.clear()
        self._device.forget(session.key)
        self._opener.close_later(session.policy_session)
