"""Every door's way to the policy: named sessions, idempotent frames, deadlines, back-pressure, and errors that explain.

A door turns its wire messages into `start`, `observe` and `end`; everything that the protocol promises about frames,
segments and time is kept here. The manager lives on one event loop; decoding and inference run on worker threads.
Source: spec/session_protocol.md 2.5, 2.6, 2.8, 7.4, 7.5.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import msgspec

from worldvln_edge.protocol import UNSET, Actions, Bye, Limits, Observe, ProtocolError, SessionState, Start
from worldvln_edge.runtime.doors.implicit_session import ImplicitAnswer, ImplicitCall, ImplicitCallRunner
from worldvln_edge.runtime.doors.request_rate import RequestRate
from worldvln_edge.runtime.sessions.ahead_worker import AheadWorker
from worldvln_edge.runtime.sessions.chained_session import ChainedSession, SettledRule, chained_horizon
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, Ticket
from worldvln_edge.runtime.sessions.envelope import Envelope, EnvelopeConfig
from worldvln_edge.runtime.sessions.memory_budget import plan_budget
from worldvln_edge.runtime.sessions.meter import Meter, NoMeter
from worldvln_edge.runtime.sessions.observation import PATIENCE_S, ObservationRunner, internal_error, on_device
from worldvln_edge.runtime.sessions.policy import Emit, Policy, PolicySession
from worldvln_edge.runtime.sessions.session_journal import Opening, RecordedSession, SessionJournal, SessionLog
from worldvln_edge.runtime.sessions.session_table import LiveSession, SessionKey, SessionTable
from worldvln_edge.runtime.sessions.warm_up import WarmUpError

_log = logging.getLogger(__name__)


def new_session_name() -> str:
    """Name of a session that its client did not name: 128 random bits (7.2)."""
    return secrets.token_hex(16)


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
        clock: Callable[[], float] = time.monotonic,
    ):
        self.policy = policy
        limits = limits or Limits()
        self.budget = plan_budget(
            policy.session_bytes, limits, available_bytes=policy.available_bytes(), asked_bytes=session_memory_bytes
        )
        self.limits = msgspec.structs.replace(limits, max_stored_bytes=self.budget.frames_bytes)
        self.is_ready = True
        self.meter: Meter = meter or NoMeter()
        self.request_rate = RequestRate(self.limits)
        self._is_warming_up = self._is_closed = False
        self._journal = journal
        info = policy.info
        self._policy_name = f"{info.name} {info.precision} {info.image_hw} {info.horizon}"
        self._device = DeviceQueue(device_workers)
        self._device_workers = device_workers
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
        self._calls = ImplicitCallRunner(policy.info.horizon, self._observations)
        self._ahead = AheadWorker(self._device, self._table)
        self._admitted = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def sessions(self) -> int:
        """Open sessions."""
        return len(self._table)

    @property
    def queue(self) -> int:
        """Requests that wait for their turn, for decoding or for the device."""
        return max(0, self._admitted - self._device.running)

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
        async with self._admission(), self._table.turn(key):
            if ticket.is_cancelled:
                raise ProtocolError("cancelled", "cancelled before the session was started")
            if request.resume:
                session = await self._restore(key, ticket) or self._table.get(key)
                session.notify = notify
                return session.state(request.id)
            session = await self._open(
                key,
                request.prompt or "",
                seed=request.seed,
                negative_prompt=request.negative_prompt,
                emit=request.emit,
                horizons=self._horizons(request),
                ticket=ticket,
                notify=notify,
            )
            self._ahead.begin(session)
            return session.state(request.id)

    def _horizons(self, request: Start) -> int | None:
        """How many horizons a session is made of; None: it is not chained."""
        if not request.chain:
            return None
        most = self.limits.max_horizons
        if request.max_horizons is not None and request.max_horizons > most:
            raise ProtocolError("invalid_field", f"max_horizons must be 1..{most}, found {request.max_horizons}")
        return request.max_horizons or most

    async def _open(
        self,
        key: SessionKey,
        prompt: str,
        *,
        seed: int,
        negative_prompt: str,
        emit: Emit,
        ticket: Ticket,
        horizons: int | None = None,
        notify: Callable[[Bye], None] | None = None,
        recorded: RecordedSession | None = None,
    ) -> LiveSession:
        """A new session in the table, in place of one of the same key; when it is refused, the old one stays.

        With `recorded` it goes on where that one was left, and in its journal.
        """
        open_session: Callable[..., PolicySession] = self.policy.new_session
        horizon = self.policy.info.horizon
        if horizons is not None:
            open_session = partial(ChainedSession, self.policy, horizons=horizons)
            horizon = chained_horizon(horizon, horizons)

        def begin() -> PolicySession:
            found = open_session(prompt, seed=seed, negative_prompt=negative_prompt, emit=emit)
            if recorded is not None:
                found.restore(recorded.frames, recorded.emitted)
            return found

        with self._table.reserve(key):
            policy_session = await on_device(
                self._device,
                begin,
                ticket=ticket,
                priority=self._now() + PATIENCE_S,
                session=key,
            )
            if ticket.is_cancelled:
                self._close_later(policy_session)
                raise ProtocolError("cancelled", "cancelled; no session was started")
            session = LiveSession(
                key=key,
                policy_session=policy_session,
                horizon=horizon,
                still_steps=None if horizons is None else 0,
                seed=seed,
                last_used=self._clock(),
                most_bytes=self.policy.session_bytes,
                notify=notify,
                prompt=prompt,
                negative_prompt=negative_prompt,
            )
            self._table.add(session)
            if recorded is not None:
                self._go_on(session, recorded)
            if self._journal is not None:
                session.log = SessionLog(self._journal, key)
                if recorded is None:
                    session.log.open(
                        Opening(
                            peer=key[0],
                            name=key[1],
                            prompt=prompt,
                            seed=seed,
                            negative_prompt=negative_prompt,
                            emit=emit,
                            horizons=horizons,
                            policy=self._policy_name,
                        )
                    )
            return session

    async def _restore(self, key: SessionKey, ticket: Ticket) -> LiveSession | None:
        """The session as its journal tells it, if it is not here but has one; before a crash it was here."""
        if self._journal is None or self._table.find(key) is not None:
            return None
        recorded = await asyncio.wrap_future(self._journal.read(key))
        if recorded is None or recorded.opening.policy != self._policy_name:
            return None
        opening, settings = recorded.opening, recorded.settings
        return await self._open(
            key,
            settings.prompt,
            seed=settings.seed,
            negative_prompt=settings.negative_prompt,
            emit=opening.emit,
            ticket=ticket,
            horizons=opening.horizons,
            recorded=recorded,
        )

    def _go_on(self, session: LiveSession, recorded: RecordedSession) -> None:
        """Take over what the table knows of a session besides its policy session."""
        now_s = self._now()
        session.chunks, session.capture_ns = dict(recorded.chunks), dict(recorded.capture_ns)
        session.stored_s = {index: now_s for index in range(1, len(recorded.frames) + 1)}
        session.waiting_frames = recorded.frames[session.frames_seen :]
        session.refresh()
        if session.still_steps is not None:
            for segment in sorted(session.chunks):
                actions = session.chunks[segment].actions
                session.still_steps = self._observations.settled.still_steps(session.still_steps, actions)

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
        async with self._admission(), self._short_queue(key), self._table.turn(key):
            before = await self._restore(key, ticket) or self._table.use(key)
            try:
                answer = await self._calls.run(
                    before,
                    call,
                    lambda: self._open(
                        key,
                        call.prompt or "",
                        seed=call.seed or 0,
                        negative_prompt=call.negative_prompt or "",
                        emit="ahead",
                        ticket=ticket,
                    ),
                    ticket,
                    arrived_s,
                )
            except ProtocolError as error:
                held = self._table.find(key)
                error.frames = None if held is None else held.frames
                raise
            finally:
                session = self._table.use(key)
                await _written(session)
            self.meter.answered(answer.ms, is_late=answer.is_late, hold=answer.hold)
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
        async with self._admission(), self._table.turn(key):
            session = self._table.get(key)
            session.notify = notify or session.notify
            try:
                answer = await self._observations.run(session, request, ticket or Ticket(), arrived_s)
                hold = None if answer.hold is UNSET else answer.hold
                self.meter.answered(answer.ms, is_late=answer.late is True, hold=hold)
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
            ended = self._table.remove(key)
            if self._journal is not None:
                await asyncio.wrap_future(self._journal.forget(key))
            if ended is None:
                return SessionState(re=re, session=session, state="ended", frames=0, emitted=-1, need=0)
            return ended.state(re, "ended")

    def state(self, peer: str, session: str, re: int) -> SessionState:
        """The session as it stands now, without waiting for its turn; `ended` if there is none."""
        found = self._table.find((peer, session))
        if found is None:
            return SessionState(re=re, session=session, state="ended", frames=0, emitted=-1, need=0)
        return found.state(re)

    def expire(self) -> int:
        """Drop sessions idle longer than session_ttl_s; returns how many. A server calls it every few seconds."""
        return self._table.expire()

    def begin_warm_up(self) -> None:
        """Refuse requests with `not_ready` until `warm_up` has returned."""
        self.is_ready, self._is_warming_up = False, True

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
        if self._is_warming_up:  # and was not told to end in the meantime
            self.is_ready, self._is_warming_up = True, False

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait for the admitted work; False if some was left after the time-out."""
        self.is_ready = self._is_warming_up = False
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Free every session and let the worker threads end."""
        self.is_ready = False
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
    async def _admission(self) -> AsyncIterator[None]:
        """Count a request in, or refuse it; whatever the policy raises leaves as `internal`."""
        try:
            self._check_admission()
            self._admitted += 1
            self._idle.clear()
            try:
                yield
            except ProtocolError:
                raise
            except Exception as error:  # a fault of this code, or of an image library, is answered too
                raise internal_error(error) from None
            finally:
                self._admitted -= 1
                if self._admitted == 0:
                    self._idle.set()
        except ProtocolError as error:
            self.meter.refused(error.code)
            raise

    def _check_admission(self) -> None:
        if self._is_warming_up:
            raise ProtocolError("not_ready", "the server is warming up; send it again in a moment", retry_ms=1000)
        if not self.is_ready:
            raise ProtocolError("overloaded", "the server is shutting down; connect again in a moment", retry_ms=2000)
        if self.queue >= self.limits.max_queue:
            wait_s = self._observations.estimate.seconds * self.queue / self._device_workers
            raise ProtocolError(
                "overloaded", f"{self.queue} requests are waiting", retry_ms=max(1, math.ceil(wait_s * 1e3))
            )

    def _free(self, session: LiveSession) -> None:
        if self._journal is not None and not self._is_closed:  # after a restart, sessions are wanted again
            self._journal.forget(session.key)
        session.waiting_frames.clear()
        self._device.forget(session.key)
        self._close_later(session.policy_session)

    def _close_later(self, session: PolicySession) -> None:
        def close() -> None:
            try:
                session.close()
            except (RuntimeError, ValueError, OSError) as error:
                _log.warning("a session's buffers could not be freed", exc_info=error)

        self._device.submit_background(close)
