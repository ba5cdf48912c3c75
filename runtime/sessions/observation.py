"""One observation, start to answer: are the frames in order, decode and keep them, emit the segment in time.

`ObservationRunner` is called with the session's turn held, so it sees one request of a session at a time.
Source: spec/session_protocol.md 2.6, 7.2, 7.4, 7.5.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from worldvln_edge.protocol import UNSET, Actions, Limits, Observe, ProtocolError, StageTimes, UnsetType
from worldvln_edge.runtime.sessions.chained_session import SettledRule
from worldvln_edge.runtime.sessions.device_queue import (
    DeviceQueue,
    DurationEstimate,
    StartedTooLateError,
    Ticket,
    WorkCancelledError,
)
from worldvln_edge.runtime.sessions.envelope import Envelope
from worldvln_edge.runtime.sessions.frame_decoding import decode_frames
from worldvln_edge.runtime.sessions.meter import Meter
from worldvln_edge.runtime.sessions.policy import ActionChunk, NonFiniteActionsError, Policy, StoppedError
from worldvln_edge.runtime.sessions.session_journal import Settings, frames_record, segment_record
from worldvln_edge.runtime.sessions.session_table import LiveSession, SessionKey, SessionTable

_log = logging.getLogger(__name__)
PATIENCE_S = 10.0
"""A request without a deadline is ranked as if it had this one, so it is never starved."""
T = TypeVar("T")


def internal_error(error: Exception) -> ProtocolError:
    """Log the traceback under a random id; the client learns the id only."""
    error_id = secrets.token_hex(8)
    _log.error("internal error %s", error_id, exc_info=error)
    return ProtocolError(
        "internal",
        f"the request failed; send it once more, and start a new session if it fails again (the server's log has error "
        f"{error_id})",
        error_id=error_id,
    )


async def on_device(
    device: DeviceQueue,
    work: Callable[[], T],
    *,
    ticket: Ticket,
    priority: float,
    start_by: float | None = None,
    session: SessionKey | None = None,
) -> T:
    """Run policy code on a device thread; what it raises becomes a typed refusal.

    Raises:
        ProtocolError: `cancelled`, `nonfinite_actions`, `internal`.
        StartedTooLateError: see DeviceQueue.run.
    """
    try:
        return await device.run(work, priority=priority, ticket=ticket, start_by=start_by, session=session)
    except StartedTooLateError:
        raise
    except WorkCancelledError:
        raise ProtocolError("cancelled", "cancelled before it ran") from None
    except StoppedError:
        raise ProtocolError("cancelled", "cancelled; the frames are stored") from None
    except NonFiniteActionsError:
        raise ProtocolError(
            "nonfinite_actions", "the model gave NaN or infinity; the segment may be asked for again"
        ) from None
    except Exception as error:  # the boundary to foreign code: whatever a policy raises must not end the server
        raise internal_error(error) from None


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
        self.settled = settled or SettledRule()
        self.estimate = DurationEstimate()

    async def run(self, session: LiveSession, request: Observe, ticket: Ticket, arrived_s: float) -> Actions:
        """Answer one request; see SessionManager.observe."""
        deadline_s = None if request.deadline_ms is None else arrived_s + request.deadline_ms / 1e3
        began_s = _now()
        self._check_order(session, request)
        await self._store_frames(session, request)
        decoded_s = _now()
        infer_s = 0.0
        chunk: ActionChunk | None = None
        if request.seg is not None and request.seg <= session.emitted:
            chunk = _stored_chunk(session, request.seg)
        else:
            if request.prompt is not None:
                session.prompt = session.next_prompt = request.prompt
            if not session.is_done and (session.need == 0 or session.waiting_frames):
                chunk, infer_s = await self.infer(session, ticket, deadline_s)
        if ticket.is_cancelled:
            raise ProtocolError("cancelled", "cancelled; the frames are stored")
        now_s = _now()
        is_late = chunk is not None and deadline_s is not None and now_s > deadline_s
        return Actions(
            re=request.id,
            session=request.session,
            seg=-1 if chunk is None else chunk.segment,
            actions=[] if chunk is None else chunk.actions.tolist(),
            frames=session.frames,
            need=session.need,
            done=session.is_done,
            ms=stage_times(arrived_s, began_s, decoded_s, infer_s),
            head="latent" if chunk is None else chunk.head,
            seed=session.seed if chunk is None else chunk.seed,
            profile=UNSET if chunk is None else chunk.profile,
            why=UNSET if chunk is None or not chunk.profile_reason else chunk.profile_reason,
            t_ns=UNSET if chunk is None else self._rests_on_ns(session, chunk),
            late=True if is_late else UNSET,
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

    async def _store_frames(self, session: LiveSession, request: Observe) -> None:
        """Decode the frames that are new and store them all, or none."""
        skip = session.frames + 1 - request.first
        new = slice(skip, skip + session.horizon.num_frames - session.frames)
        if not request.frames[new]:
            return
        frames = await self.decode(lambda room: decode_frames(request, new, self._limits, room_bytes=room))
        store_frames(session, frames, None if request.t_ns is None else request.t_ns[new])

    async def decode(self, decode: Callable[[int], list[np.ndarray]]) -> list[np.ndarray]:
        """Frames from `decode(room)` on a decoding thread; room is how many bytes of frames may still be stored."""
        room = self._limits.max_stored_bytes - self._table.waiting_bytes
        if room <= 0:
            self._table.make_room_for_bytes()
            room = self._limits.max_stored_bytes - self._table.waiting_bytes

        def decode_and_fit() -> list[np.ndarray]:
            return [self._fit_frame(frame) for frame in decode(room)]

        return await asyncio.get_running_loop().run_in_executor(self._decoders, decode_and_fit)

    async def infer(
        self, session: LiveSession, ticket: Ticket, deadline_s: float | None
    ) -> tuple[ActionChunk | None, float]:
        """Give the waiting frames to the policy. Returns (the emitted chunk or None, seconds on the device).

        Raises:
            ProtocolError: `deadline`, `cancelled`, `nonfinite_actions`, `internal`; the frames stay stored.
        """
        has_new_settings = (session.next_prompt, session.next_negative_prompt, session.next_seed) != (None, None, None)
        if session.log is not None and has_new_settings:
            settings = Settings(prompt=session.prompt, seed=session.seed, negative_prompt=session.negative_prompt)
            session.log.add(settings)
        will_emit = session.need == 0
        start_by = deadline_s
        least_s = session.policy_session.least_s(len(session.waiting_frames))
        needs_s = self.estimate.seconds if least_s is None else least_s
        if deadline_s is not None and will_emit:
            start_by = deadline_s - needs_s
        took_s = 0.0
        due_s = None if deadline_s is None else time.perf_counter() + deadline_s - _now()

        def step() -> ActionChunk | None:
            nonlocal took_s
            started = time.perf_counter()
            chunk = _advance(session, None if due_s is None else due_s - started, lambda: ticket.is_cancelled)
            took_s = time.perf_counter() - started
            return chunk

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
        except StartedTooLateError:
            if not will_emit:  # nothing was due: the frames simply wait for the next request
                return None, 0.0
            retry_ms = max(1, math.ceil(needs_s * 1e3))
            self.estimate.soften()
            raise ProtocolError("deadline", f"needs about {retry_ms} ms", retry_ms=retry_ms) from None
        finally:
            session.refresh()
        if chunk is not None:
            if not chunk.was_ready:
                self.estimate.add(took_s)
            self._check_shape(session, chunk)
            chunk = self._within_envelope(session, chunk, deadline_s)
            self._meter.segment(chunk, took_s)
            session.chunks[chunk.segment] = chunk
            if session.log is not None:
                session.log.add(segment_record(chunk))
            if session.still_steps is not None:
                session.still_steps = self.settled.still_steps(session.still_steps, chunk.actions)
        return chunk, took_s

    def _check_shape(self, session: LiveSession, chunk: ActionChunk) -> None:
        points = session.horizon.points
        shape = (points[chunk.segment + 1] - points[chunk.segment], 6)
        if chunk.actions.shape != shape:
            raise internal_error(
                RuntimeError(f"policy gave actions {chunk.actions.shape} for segment {chunk.segment}, expected {shape}")
            )

    def _within_envelope(self, session: LiveSession, chunk: ActionChunk, deadline_s: float | None) -> ActionChunk:
        """The chunk, or a hold in its place; without an envelope, actions must be finite all the same."""
        now_s, rests_on = _now(), session.horizon.points[chunk.segment]
        if self._envelope is None:
            if not np.isfinite(chunk.actions).all():
                raise ProtocolError("nonfinite_actions", f"the model gave NaN or infinity in segment {chunk.segment}")
            return chunk
        before = session.chunks.get(chunk.segment - 1)
        return self._envelope.apply(
            chunk,
            flown_before=np.zeros((0, 6)) if before is None else before.actions,
            age_s=now_s - session.stored_s.get(rests_on, now_s),
            late_s=now_s - deadline_s if deadline_s is not None and now_s > deadline_s else None,
        )

    def _rests_on_ns(self, session: LiveSession, chunk: ActionChunk) -> int | UnsetType:
        """Capture time of frame points[s]: a segment conditions on the frames up to its first one (2.6)."""
        return session.capture_ns.get(session.horizon.points[chunk.segment], UNSET)


def store_frames(session: LiveSession, frames: list[np.ndarray], t_ns: list[int] | None = None) -> None:
    """Keep decoded frames, and when they were captured, until the policy takes them."""
    now_s = _now()
    if t_ns is not None:
        session.capture_ns.update(enumerate(t_ns, start=session.frames + 1))
    if session.log is not None:
        session.log.add(*frames_record(frames, t_ns))
    session.stored_s.update({session.frames + 1 + index: now_s for index in range(len(frames))})
    session.waiting_frames.extend(frames)
    session.waiting_bytes += sum(frame.nbytes for frame in frames)


def _advance(session: LiveSession, budget_s: float | None, should_stop: Callable[[], bool]) -> ActionChunk | None:
    """On a device thread: new prompts and the new seed, then the waiting frames."""
    if session.next_prompt is not None:
        session.policy_session.set_prompt(session.next_prompt)
        session.next_prompt = None
    if session.next_negative_prompt is not None:
        session.policy_session.set_negative_prompt(session.next_negative_prompt)
        session.next_negative_prompt = None
    if session.next_seed is not None:
        session.policy_session.set_seed(session.next_seed)
        session.next_seed = None
    chunk = session.policy_session.observe(tuple(session.waiting_frames), budget_s=budget_s, should_stop=should_stop)
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
