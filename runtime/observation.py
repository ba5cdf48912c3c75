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
from worldvln_edge.runtime.device_queue import (
    DeviceQueue,
    DurationEstimate,
    StartedTooLateError,
    Ticket,
    WorkCancelledError,
)
from worldvln_edge.runtime.frame_decoding import decode_frames
from worldvln_edge.runtime.policy import ActionChunk, NonFiniteActionsError, Policy
from worldvln_edge.runtime.session_table import LiveSession, SessionTable

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
    device: DeviceQueue, work: Callable[[], T], *, ticket: Ticket, priority: float, start_by: float | None = None
) -> T:
    """Run policy code on a device thread; what it raises becomes a typed refusal.

    Raises:
        ProtocolError: `cancelled`, `nonfinite_actions`, `internal`.
        StartedTooLateError: see DeviceQueue.run.
    """
    try:
        return await device.run(work, priority=priority, ticket=ticket, start_by=start_by)
    except StartedTooLateError:
        raise
    except WorkCancelledError:
        raise ProtocolError("cancelled", "cancelled before it ran") from None
    except NonFiniteActionsError:
        raise ProtocolError(
            "nonfinite_actions", "the model gave NaN or infinity; the segment may be asked for again"
        ) from None
    except Exception as error:  # the boundary to foreign code: whatever a policy raises must not end the server
        raise internal_error(error) from None


class ObservationRunner:
    """What every observation shares: the policy's horizon, the manager's threads and table, the running estimate."""

    def __init__(
        self, policy: Policy, limits: Limits, device: DeviceQueue, decoders: ThreadPoolExecutor, table: SessionTable
    ):
        self._horizon = policy.info.horizon
        self._limits, self._device, self._decoders, self._table = limits, device, decoders, table
        self.estimate = DurationEstimate()

    async def run(self, session: LiveSession, request: Observe, ticket: Ticket, arrived_s: float) -> Actions:
        """Answer one request; see SessionManager.observe."""
        deadline_s = None if request.deadline_ms is None else arrived_s + request.deadline_ms / 1e3
        began_s = _now()
        self._check_order(session, request)
        await self._store_frames(session, request)
        decoded_s = _now()
        queue_s, infer_s = began_s - arrived_s, 0.0
        chunk: ActionChunk | None = None
        if request.seg is not None and request.seg <= session.emitted:
            chunk = _stored_chunk(session, request.seg)
        else:
            if request.prompt is not None:
                session.next_prompt = request.prompt
            if not session.is_done and (session.need == 0 or session.waiting_frames):
                chunk, infer_s = await self._infer(session, ticket, arrived_s, deadline_s)
                queue_s += _now() - decoded_s - infer_s
        if ticket.is_cancelled:
            raise ProtocolError("cancelled", "cancelled; the frames are stored")
        now_s = _now()
        return Actions(
            re=request.id,
            session=request.session,
            seg=-1 if chunk is None else chunk.segment,
            actions=[] if chunk is None else chunk.actions.tolist(),
            frames=session.frames,
            need=session.need,
            done=session.is_done,
            ms=StageTimes(
                queue=_ms(queue_s), decode=_ms(decoded_s - began_s), infer=_ms(infer_s), total=_ms(now_s - arrived_s)
            ),
            head="latent" if chunk is None else chunk.head,
            seed=session.seed if chunk is None else chunk.seed,
            profile=UNSET if chunk is None else chunk.profile,
            why=UNSET if chunk is None or not chunk.profile_reason else chunk.profile_reason,
            t_ns=UNSET if chunk is None else self._rests_on_ns(session, chunk),
            late=True if chunk is not None and deadline_s is not None and now_s > deadline_s else UNSET,
        )

    def _check_order(self, session: LiveSession, request: Observe) -> None:
        """Refuse what cannot follow from the session's state; nothing is stored yet."""
        expected = session.frames + 1
        if request.first > expected:
            raise ProtocolError("gap", f"expected frame {expected}, got {request.first}", expected=expected)
        last = self._horizon.segments - 1
        if request.seg is not None and request.seg > last:
            raise ProtocolError("invalid_field", f"seg must be 0..{last}, found {request.seg}")
        if request.seg is not None and request.seg > session.emitted + 1:
            raise ProtocolError(
                "bad_request", f"segment {request.seg} was asked for, but segment {session.emitted + 1} is next"
            )

    async def _store_frames(self, session: LiveSession, request: Observe) -> None:
        """Decode the frames that are new and store them all, or none."""
        skip = session.frames + 1 - request.first
        new = slice(skip, skip + session.num_frames - session.frames)
        if not request.frames[new]:
            return
        room = self._limits.max_stored_bytes - self._table.waiting_bytes
        if room <= 0:
            self._table.make_room_for_bytes()
            room = self._limits.max_stored_bytes - self._table.waiting_bytes
        frames = await asyncio.get_running_loop().run_in_executor(
            self._decoders, lambda: decode_frames(request, new, self._limits, room_bytes=room)
        )
        if request.t_ns is not None:
            for index, t_ns in enumerate(request.t_ns[new], start=session.frames + 1):
                session.capture_ns[index] = t_ns
        session.waiting_frames.extend(frames)
        session.waiting_bytes += sum(frame.nbytes for frame in frames)

    async def _infer(
        self, session: LiveSession, ticket: Ticket, arrived_s: float, deadline_s: float | None
    ) -> tuple[ActionChunk | None, float]:
        """Give the waiting frames to the policy. Returns (the emitted chunk or None, seconds on the device)."""
        will_emit = session.need == 0
        start_by = deadline_s
        least_s = session.policy_session.least_s
        needs_s = self.estimate.seconds if least_s is None else least_s
        if deadline_s is not None and will_emit:
            start_by = deadline_s - needs_s
        took_s = 0.0
        due_s = None if deadline_s is None else time.perf_counter() + deadline_s - _now()

        def step() -> ActionChunk | None:
            nonlocal took_s
            started = time.perf_counter()
            chunk = _advance(session, None if due_s is None else due_s - started)
            took_s = time.perf_counter() - started
            return chunk

        try:
            chunk = await on_device(
                self._device,
                step,
                ticket=ticket,
                priority=deadline_s if deadline_s is not None else arrived_s + PATIENCE_S,
                start_by=start_by,
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
            self.estimate.add(took_s)
            self._check_actions(chunk)
            session.chunks[chunk.segment] = chunk
        return chunk, took_s

    def _check_actions(self, chunk: ActionChunk) -> None:
        points = self._horizon.points
        shape = (points[chunk.segment + 1] - points[chunk.segment], 6)
        if chunk.actions.shape != shape:
            raise internal_error(
                RuntimeError(f"policy gave actions {chunk.actions.shape} for segment {chunk.segment}, expected {shape}")
            )
        if not np.isfinite(chunk.actions).all():
            raise ProtocolError("nonfinite_actions", f"the model gave NaN or infinity in segment {chunk.segment}")

    def _rests_on_ns(self, session: LiveSession, chunk: ActionChunk) -> int | UnsetType:
        """Capture time of frame points[s]: a segment conditions on the frames up to its first one (2.6)."""
        return session.capture_ns.get(self._horizon.points[chunk.segment], UNSET)


def _advance(session: LiveSession, budget_s: float | None) -> ActionChunk | None:
    """On a device thread: the new prompt, then the waiting frames."""
    if session.next_prompt is not None:
        session.policy_session.set_prompt(session.next_prompt)
        session.next_prompt = None
    return session.policy_session.observe(tuple(session.waiting_frames), budget_s=budget_s)


def _stored_chunk(session: LiveSession, segment: int) -> ActionChunk:
    chunk = session.chunks.get(segment)
    if chunk is None:
        raise ProtocolError("nonfinite_actions", f"segment {segment} has no usable actions; start the session again")
    return chunk


def _now() -> float:
    return asyncio.get_running_loop().time()


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1e3, 3)
