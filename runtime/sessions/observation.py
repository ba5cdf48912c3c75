"""One observation, start to answer: are the frames in order, decode and keep them, emit the segment in time.

`ObservationRunner` is called with the session's turn held, so it sees one request of a session at a time.
Source: spec/session_protocol.md 2.6, 7.2, 7.4, 7.5.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from worldvln_edge.protocol import UNSET, Actions, Limits, Observe, ProtocolError, StageTimes, UnsetType
from worldvln_edge.runtime.sessions.chained_session import SettledRule
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, DurationEstimate, StartedTooLateError, Ticket
from worldvln_edge.runtime.sessions.envelope import Envelope
from worldvln_edge.runtime.sessions.frame_decoding import decode_frames, store_is_full
from worldvln_edge.runtime.sessions.journal_records import FramesSent
from worldvln_edge.runtime.sessions.live_session import LiveSession
from worldvln_edge.runtime.sessions.meter import Meter
from worldvln_edge.runtime.sessions.policy import ActionChunk, NonFiniteActionsError, Policy, TooLateError
from worldvln_edge.runtime.sessions.policy_calls import internal_error, on_device
from worldvln_edge.runtime.sessions.session_events import FramesTaken, SentFrame
from worldvln_edge.runtime.sessions.session_table import SessionTable

PATIENCE_S = 10.0
"""A request without a deadline is ranked as if it had this one, so it is never starved."""


OPERATOR_HOLD = "operator"
"""Reason of a hold that an operator asked for, beside those of the envelope."""


class Inferred(NamedTuple):
    """What giving frames to the policy led to."""

    chunk: ActionChunk | None = None
    """The segment, if one was emitted."""
    seconds: float = 0.0
    """On the device."""
    is_late: bool = False
    """The segment came after its deadline."""


class ObservationRunner:
    """What every observation shares: the policy's horizon, the manager's threads and table, the running estimate."""

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        device: DeviceQueue,
        decoders: ThreadPoolExecutor,
        table: SessionTable,
        meter: Meter,
        envelope: Envelope | None = None,
        settled: SettledRule | None = None,
    ):
        self._fit_frame = policy.fit_frame
        self._limits, self._device, self._decoders, self._table = limits, device, decoders, table
        self._meter, self._envelope = meter, envelope
        self._arriving_bytes = 0  # decoded, not yet stored
        self.settled = settled or SettledRule()
        self.estimate = DurationEstimate()

    async def run(self, session: LiveSession, request: Observe, ticket: Ticket, arrived_s: float) -> Actions:
        """Answer one request; see SessionManager.observe."""
        deadline_s = None if request.deadline_ms is None else arrived_s + request.deadline_ms / 1e3
        began_s = _now()
        self._check_order(session, request)
        await self._store_frames(session, request, arrived_s)
        decoded_s = _now()
        found = Inferred()
        if request.seg is not None and request.seg <= session.emitted:
            found = Inferred(
                _stored_chunk(session, request.seg), is_late=deadline_s is not None and _now() > deadline_s
            )
        else:
            session.replace_settings(prompt=request.prompt)
            if not session.is_done and (session.need == 0 or session.waiting_frames):
                found = await self.infer(session, ticket, deadline_s)
        if ticket.is_cancelled:
            raise ProtocolError("cancelled", "cancelled; the frames are stored")
        chunk = found.chunk
        return Actions(
            re=request.id,
            session=request.session,
            seg=-1 if chunk is None else chunk.segment,
            actions=[] if chunk is None else chunk.actions.tolist(),
            frames=session.frames,
            need=session.need,
            done=session.is_done,
            ms=stage_times(arrived_s, began_s, decoded_s, found.seconds),
            head="latent" if chunk is None else chunk.head,
            seed=session.seed if chunk is None else chunk.seed,
            profile=UNSET if chunk is None else chunk.profile,
            why=UNSET if chunk is None or not chunk.profile_reason else chunk.profile_reason,
            t_ns=UNSET if chunk is None else self._rests_on_ns(session, chunk),
            late=True if found.is_late else UNSET,
            hold=UNSET if chunk is None or chunk.hold is None else chunk.hold,
            settled=UNSET if session.still_steps is None else session.still_steps >= self.settled.steps,
        )

    def _check_order(self, session: LiveSession, request: Observe) -> None:
        """Refuse what cannot follow from the session's state; nothing is stored yet."""
        expected = session.frames + 1
        if request.first > expected:
            raise ProtocolError("gap", f"expected frame {expected}, got {request.first}", expected=expected)
        last = session.horizon.segments - 1
        if request.seg is not None and request.seg > last:
            raise ProtocolError("invalid_field", f"seg must be 0..{last}, found {request.seg}")
        if request.seg is not None and request.seg > session.emitted + 1:
            raise ProtocolError(
                "bad_request", f"segment {request.seg} was asked for, but segment {session.emitted + 1} is next"
            )

    async def _store_frames(self, session: LiveSession, request: Observe, arrived_s: float) -> None:
        """Decode the frames that are new and store them all, or none."""
        skip = session.frames + 1 - request.first
        new = slice(skip, skip + session.horizon.num_frames - session.frames)
        if not request.frames[new]:
            return
        async with self.decoded(lambda room: decode_frames(request, new, self._limits, room_bytes=room)) as frames:
            raw_hw = (request.h or 0, request.w or 0) if request.fmt == "rgb8" else None
            session.store_frames(
                frames,
                arrived_s,
                sent=[SentFrame(data, raw_hw) for data in request.frames[new]],
                t_ns=None if request.t_ns is None else request.t_ns[new],
                poses=None if request.poses is None else request.poses[new],
            )

    @asynccontextmanager
    async def decoded(self, decode: Callable[[int], list[np.ndarray]]) -> AsyncIterator[list[np.ndarray]]:
        """Frames from `decode(room)` on a decoding thread; until the context ends, they count as if they were stored.

        Args:
            decode: is told how many bytes of frames may still be stored.

        Raises:
            ProtocolError: `overloaded`: other requests took the room in the meantime; and what `decode` raises.
        """
        if self._room_bytes <= 0:
            self._table.make_room_for_bytes()
        room = self._room_bytes

        def decode_and_fit() -> list[np.ndarray]:
            return [self._fit_frame(frame) for frame in decode(room)]

        frames = await asyncio.get_running_loop().run_in_executor(self._decoders, decode_and_fit)
        size = sum(frame.nbytes for frame in frames)
        if size > self._room_bytes:
            raise store_is_full()
        self._arriving_bytes += size
        try:
            yield frames
        finally:
            self._arriving_bytes -= size

    @property
    def _room_bytes(self) -> int:
        """Of frames that may still be stored."""
        return self._limits.max_stored_bytes - self._table.waiting_bytes - self._arriving_bytes

    async def infer(
        self, session: LiveSession, ticket: Ticket, deadline_s: float | None, answers: FramesSent | None = None
    ) -> Inferred:
        """Give the waiting frames to the policy, and keep what it emits.

        Args:
            deadline_s: event-loop time at which the actions are due.
            answers: the call that a segment would answer, if that may be repeated.

        Raises:
            ProtocolError: `deadline`, `cancelled`, `nonfinite_actions`, `internal`; the frames stay stored.
        """
        with session.advancing():
            return await self._infer(session, ticket, deadline_s, answers)

    async def _infer(
        self, session: LiveSession, ticket: Ticket, deadline_s: float | None, answers: FramesSent | None
    ) -> Inferred:
        will_emit = session.need == 0
        start_by = deadline_s
        least_s = session.policy_session.least_s(
            len(session.waiting_frames), with_new_settings=session.has_new_settings
        )
        needs_s = self.estimate.seconds if least_s is None else least_s * self.estimate.trust
        if deadline_s is not None and will_emit:
            start_by = deadline_s - needs_s
        took_s, was_called = 0.0, False
        due_s = None if deadline_s is None else time.perf_counter() + deadline_s - _now()

        def step() -> ActionChunk | None:
            nonlocal took_s, was_called
            was_called = True
            started = time.perf_counter()
            budget_s = None if due_s is None else due_s - started
            chunk = _advance(
                session, budget_s, lambda: ticket.is_cancelled, may_hold=self._envelope is not None or session.is_held
            )
            took_s = time.perf_counter() - started
            return chunk

        chunk: ActionChunk | None = None
        try:
            chunk = await on_device(
                self._device,
                step,
                ticket=ticket,
                # From now, not from the request's arrival: one that came early behind its session's other requests
                # is not ahead of the other sessions for it.
                priority=deadline_s if deadline_s is not None else _now() + PATIENCE_S,
                start_by=start_by,
                session=session.key,
            )
        except (StartedTooLateError, TooLateError) as error:
            if not will_emit:  # nothing was due: the frames simply wait for the next request
                return Inferred()
            if isinstance(error, TooLateError):
                needs_s = error.needs_s
            retry_ms = max(1, math.ceil(needs_s * 1e3))
            self.estimate.soften()
            raise ProtocolError("deadline", f"needs about {retry_ms} ms", retry_ms=retry_ms) from None
        finally:
            session.refresh()
            if chunk is None and was_called:
                session.events.tell(FramesTaken(uid=session.uid, frames=session.frames_seen))
        if chunk is None:
            return Inferred(seconds=took_s)
        now_s = _now()
        late_s = now_s - deadline_s if deadline_s is not None and now_s > deadline_s else None
        if not chunk.was_ready:
            self.estimate.add(took_s)
        made = chunk
        try:
            self._check_shape(session, made)
            chunk = self._within_envelope(session, made, late_s)
        except ProtocolError:
            session.events.tell(FramesTaken(uid=session.uid, frames=session.frames_seen))
            raise
        self._meter.segment(chunk, took_s)
        session.store_chunk(chunk, answers, made=made, device_s=took_s, late_s=late_s)
        if session.still_steps is not None:
            session.still_steps = self.settled.after(chunk, session.still_steps)
        return Inferred(chunk, took_s, late_s is not None)

    def _check_shape(self, session: LiveSession, chunk: ActionChunk) -> None:
        points = session.horizon.points
        shape = (points[chunk.segment + 1] - points[chunk.segment], 6)
        if chunk.actions.shape != shape:
            raise internal_error(
                RuntimeError(f"policy gave actions {chunk.actions.shape} for segment {chunk.segment}, expected {shape}")
            )

    def _within_envelope(self, session: LiveSession, chunk: ActionChunk, late_s: float | None) -> ActionChunk:
        """The chunk, or a hold in its place; without an envelope, actions must be finite all the same."""
        if session.is_held:
            return replace(chunk, actions=np.zeros_like(chunk.actions), hold=OPERATOR_HOLD)
        now_s, rests_on = _now(), session.horizon.points[chunk.segment]
        if self._envelope is None:
            if not np.isfinite(chunk.actions).all():
                raise ProtocolError("nonfinite_actions", f"the model gave NaN or infinity in segment {chunk.segment}")
            return chunk
        return self._envelope.apply(
            chunk,
            flown_before=session.flown_before(chunk.segment, self._envelope.steps_before),
            age_s=now_s - session.arrived_s.get(rests_on, now_s),
            late_s=late_s,
        )

    def _rests_on_ns(self, session: LiveSession, chunk: ActionChunk) -> int | UnsetType:
        """Capture time of frame points[s]: a segment conditions on the frames up to its first one (2.6)."""
        return session.capture_ns.get(session.horizon.points[chunk.segment], UNSET)


def _advance(
    session: LiveSession, budget_s: float | None, should_stop: Callable[[], bool], *, may_hold: bool
) -> ActionChunk | None:
    """On a device thread: new prompts and the new seed, then the waiting frames.

    With `may_hold`, actions that are not finite are returned, and their segment is emitted: they become a hold.
    """
    if session.next_prompt is not None:
        session.policy_session.set_prompt(session.next_prompt)
        session.next_prompt = None
    if session.next_negative_prompt is not None:
        session.policy_session.set_negative_prompt(session.next_negative_prompt)
        session.next_negative_prompt = None
    if session.next_seed is not None:
        session.policy_session.set_seed(session.next_seed)
        session.next_seed = None
    frames = tuple(session.waiting_frames)
    chunk: ActionChunk | None
    try:
        chunk = session.policy_session.observe(frames, budget_s=budget_s, should_stop=should_stop)
    except NonFiniteActionsError as error:
        if not may_hold:
            raise
        session.policy_session.pass_over()
        chunk = error.chunk
    if session.policy_session.done:
        session.held_bytes = session.policy_session.held_bytes
    return chunk


def _stored_chunk(session: LiveSession, segment: int) -> ActionChunk:
    chunk = session.chunks.get(segment)
    if chunk is None:
        raise ProtocolError("nonfinite_actions", f"segment {segment} has no usable actions; start the session again")
    return chunk


def stage_times(arrived_s: float, began_s: float, decoded_s: float, infer_s: float) -> StageTimes:
    """Stages of a request that is answered now, from event-loop times and the seconds on the device."""
    now_s = _now()
    queue_s = now_s - arrived_s - (decoded_s - began_s) - infer_s
    return StageTimes(
        queue=_ms(queue_s), decode=_ms(decoded_s - began_s), infer=_ms(infer_s), total=_ms(now_s - arrived_s)
    )


def _now() -> float:
    return asyncio.get_running_loop().time()


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e3, 3)
