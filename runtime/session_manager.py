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

from worldvln_edge.protocol import Actions, Bye, Limits, Observe, ProtocolError, SessionState, Start
from worldvln_edge.runtime.device_queue import DeviceQueue, Ticket
from worldvln_edge.runtime.observation import PATIENCE_S, ObservationRunner, internal_error, on_device
from worldvln_edge.runtime.policy import Policy, PolicySession
from worldvln_edge.runtime.session_table import LiveSession, SessionKey, SessionTable

_log = logging.getLogger(__name__)


def new_session_name() -> str:
    """Name of a session that its client did not name: 128 random bits (7.2)."""
    return secrets.token_hex(16)


class SessionManager:
    """Sessions of one policy, shared by every connection.

    Args:
        policy: what turns frames into actions.
        limits: spec/session_protocol.md 7.8.
        device_workers: threads that may be inside the policy at the same time.
        decode_workers: threads that decode images.
        clock: seconds for idle times; monotonic.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        limits: Limits | None = None,
        device_workers: int = 1,
        decode_workers: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.policy = policy
        self.limits = limits or Limits()
        self.is_ready = True
        self._device = DeviceQueue(device_workers)
        self._device_workers = device_workers
        self._decoders = ThreadPoolExecutor(decode_workers, thread_name_prefix="decode")
        self._table = SessionTable(self.limits, clock=clock, on_drop=self._free)
        self._clock = clock
        self._observations = ObservationRunner(policy, self.limits, self._device, self._decoders, self._table)
        self._ahead: set[asyncio.Task[None]] = set()
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
                session = self._table.get(key)
                session.notify = notify
                return session.state(request.id)
            prompt = request.prompt or ""
            with self._table.reserve(key):
                policy_session = await on_device(
                    self._device,
                    lambda: self.policy.new_session(
                        prompt, seed=request.seed, negative_prompt=request.negative_prompt, emit=request.emit
                    ),
                    ticket=ticket,
                    priority=self._now() + PATIENCE_S,
                )
                if ticket.is_cancelled:
                    self._close_later(policy_session)
                    raise ProtocolError("cancelled", "cancelled; no session was started")
                session = LiveSession(
                    key=key,
                    policy_session=policy_session,
                    num_frames=self.policy.info.horizon.num_frames,
                    seed=request.seed,
                    last_used=self._clock(),
                    notify=notify,
                )
                self._table.add(session)
            self._work_ahead_later(session)
            return session.state(request.id)

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
        self._stop_working_ahead(key)
        async with self._admission(), self._table.turn(key):
            session = self._table.get(key)
            session.notify = notify or session.notify
            try:
                answer = await self._observations.run(session, request, ticket or Ticket(), arrived_s)
                if answer.seg >= 0:
                    self._work_ahead_later(session)
                return answer
            except ProtocolError as error:
                error.frames = session.frames
                raise
            finally:
                session.last_used = self._clock()

    async def end(self, peer: str, session: str, re: int) -> SessionState:
        """Free a session after its earlier requests were answered; ending an unknown one is not an error."""
        key = (peer, session)
        self._stop_working_ahead(key)
        async with self._table.turn(key):
            ended = self._table.remove(key)
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

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait for the admitted work; False if some was left after the time-out."""
        self.is_ready = False
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Free every session and let the worker threads end."""
        self.is_ready = False
        for task in self._ahead:
            task.cancel()
        self._table.clear()
        self._device.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    @asynccontextmanager
    async def _admission(self) -> AsyncIterator[None]:
        """Count a request in, or refuse it; whatever the policy raises leaves as `internal`."""
        if not self.is_ready:
            raise ProtocolError("overloaded", "the server is shutting down; connect again in a moment", retry_ms=2000)
        if self.queue >= self.limits.max_queue:
            wait_s = self._observations.estimate.seconds * self.queue / self._device_workers
            raise ProtocolError(
                "overloaded", f"{self.queue} requests are waiting", retry_ms=max(1, math.ceil(wait_s * 1e3))
            )
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

    def _work_ahead_later(self, session: LiveSession) -> None:
        """Once nobody else wants the device: what the session's next segment will need."""
        if session.is_done:
            return
        session.ahead = ticket = Ticket()
        task = asyncio.get_running_loop().create_task(self._work_ahead(session, ticket))
        self._ahead.add(task)
        task.add_done_callback(self._ahead.discard)

    async def _work_ahead(self, session: LiveSession, ticket: Ticket) -> None:
        async with self._table.turn(session.key):
            if ticket.is_cancelled or self._table.find(session.key) is not session:
                return
            try:
                await on_device(self._device, session.policy_session.work_ahead, ticket=ticket, priority=math.inf)
            except ProtocolError as error:  # it was logged; the next request does the work, or meets the same fault
                _log.debug("work ahead of session was left out: %s", error)

    def _stop_working_ahead(self, key: SessionKey) -> None:
        """A request must not wait behind work that only waits for an idle device."""
        session = self._table.find(key)
        if session is not None and session.ahead is not None:
            session.ahead.cancel()

    def _free(self, session: LiveSession) -> None:
        session.waiting_frames.clear()
        self._close_later(session.policy_session)

    def _close_later(self, session: PolicySession) -> None:
        def close() -> None:
            try:
                session.close()
            except (RuntimeError, ValueError, OSError) as error:
                _log.warning("a session's buffers could not be freed", exc_info=error)

        self._device.submit_background(close)
