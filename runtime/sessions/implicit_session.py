"""Calls that bring their session along: its first prompt opens it, and one call may restart, extend and ask at once.

The compatible HTTP API and openpi's protocol have no `start`. A call that is refused changes nothing: its frames are
decoded before anything is replaced. Readiness is the call's own, so the policy session always runs ahead (rule F) and
frames wait here for as long as the call's rule says that nothing is due.
Source: spec/session_protocol.md 2.3, 2.5, 2.6, 6.2, 7.4.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from worldvln_edge.config import HorizonConfig
from worldvln_edge.protocol import ProtocolError, StageTimes
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.live_session import LiveSession
from worldvln_edge.runtime.sessions.observation import Inferred, ObservationRunner, stage_times
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.sessions.session_events import SentFrame


@dataclass(frozen=True, kw_only=True)
class ReadinessRule:
    """When a segment's actions are due (2.6). The default is rule D: once its last frame was observed."""

    ahead: bool = False
    """Rule F: once its first frame was observed."""
    last_ahead: bool = False
    """Rule L: the last segment, once its first frame was observed."""

    def frames_needed(self, segment: int, points: tuple[int, ...]) -> int:
        """Frames from which on the segment is due."""
        is_last = segment == len(points) - 2
        return points[segment] if self.ahead or (self.last_ahead and is_last) else points[segment + 1]

    def is_due(self, frames: int, emitted: int, points: tuple[int, ...]) -> bool:
        """Whether the segment after `emitted` is due when `frames` are stored."""
        if emitted + 1 >= len(points) - 1 or (frames == 1 and emitted == -1 and not self.ahead):
            return False
        return frames >= self.frames_needed(emitted + 1, points)


class FrameBatch(Protocol):
    """The frames of a call as they came, oldest first."""

    def __len__(self) -> int: ...

    def decode(self, new: slice, *, keep: int, room_bytes: int) -> list[np.ndarray]:
        """Decode the frames in `new`, on a worker thread: uint8 RGB [H, W, 3] each, at most `keep` of them.

        Raises:
            ProtocolError: `bad_image`, `too_large`, `overloaded`; see `frame_decoding.decode_each`.
        """
        ...

    def sent(self, new: slice) -> list[SentFrame]:
        """The frames in `new` as they came."""
        ...


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How a door calls its fields where a call is refused."""

    reset_needs_prompt: str
    first_call_needs_prompt: str
    frames_needed: str


@dataclass(frozen=True, kw_only=True)
class ImplicitCall:
    """One call of a door without `start`."""

    session: str
    """Key within the peer's sessions; see `door_session_name`."""
    frames: FrameBatch
    wording: Wording
    prompt: str | None = None
    """Opens a session; later it replaces the prompt of the segments still to come."""
    negative_prompt: str | None = None
    """None keeps the session's."""
    seed: int | None = None
    """None keeps the session's; 0 for a new one."""
    keeps_seed: bool = False
    """Only the call that starts a session sets its seed and its negative prompt."""
    reset: bool = False
    restarts_on_one_frame: bool = False
    """A prompt together with exactly one frame starts afresh."""
    needs_frames: bool = False
    """Refuse a call without frames even where the session exists."""
    first: int | None = None
    """1-based index of the first frame; None: they follow what is stored."""
    is_prefix: bool = False
    """The frames are all of the trajectory so far; those that are stored are not looked at."""
    rule: ReadinessRule = field(default_factory=ReadinessRule)
    deadline_ms: float | None = None
    reply: str = "segment"
    """Kept with a new session, for the door."""

    @property
    def starts_afresh(self) -> bool:
        """Whatever the session was before does not matter to it."""
        is_one = self.restarts_on_one_frame and self.prompt is not None and len(self.frames) == 1
        return self.reset or is_one


@dataclass(frozen=True, kw_only=True)
class ImplicitAnswer:
    chunk: ActionChunk | None
    """The segment that this call emitted, or that the same call emitted before."""
    chunks: Mapping[int, ActionChunk]
    """All segments of the session so far."""
    frames: int
    emitted: int
    need: int
    """Frames missing for the next segment under the call's rule; 0 when none are."""
    prompt: str
    reply: str
    is_late: bool
    """The segment came after the call's deadline."""
    ms: StageTimes

    @property
    def hold(self) -> str | None:
        """Why the actions are a standstill, where the safety envelope replaced them."""
        return None if self.chunk is None else self.chunk.hold


def door_session_name(door: str, name: str) -> str:
    """Name of a door's session in the table: doors have name spaces of their own (2.8).

    It starts with a character that no client may use in a name.
    """
    return f"\0{door}/{name}"


class ImplicitCallRunner:
    """Runs calls whose session's turn is held."""

    def __init__(self, horizon: HorizonConfig, observations: ObservationRunner):
        self._horizon, self._observations = horizon, observations

    async def run(
        self,
        session: LiveSession | None,
        call: ImplicitCall,
        open_session: Callable[[], Awaitable[LiveSession]],
        ticket: Ticket,
        arrived_s: float,
    ) -> ImplicitAnswer:
        """Answer one call; see SessionManager.call.

        Args:
            session: as it stands, if there is one.
            open_session: puts a new one in its place.
        """
        began_s = _now()
        deadline_s = None if call.deadline_ms is None else arrived_s + call.deadline_ms / 1e3
        is_new = self._starts_afresh(session, call)
        stored = 0 if session is None or is_new else session.frames
        first = self._first_frame(call, stored)
        skip = min(stored + 1 - first, len(call.frames))
        repeated = None if is_new or session is None else _repeated_chunk(session, call, first, skip)
        frames: list[np.ndarray] = []
        async with AsyncExitStack() as until_stored:
            if skip < len(call.frames):
                keep = self._horizon.num_frames - stored
                frames = await until_stored.enter_async_context(
                    self._observations.decoded(
                        lambda room: call.frames.decode(slice(skip, None), keep=keep, room_bytes=room)
                    )
                )
            decoded_s = _now()
            # From here on the call is accepted.
            if session is None or is_new:
                session = await open_session()
            elif repeated is None:
                _replace_settings(session, call)
            session.store_frames(frames, arrived_s, sent=call.frames.sent(slice(skip, skip + len(frames))))
        found = Inferred()
        if repeated is not None:
            found = Inferred(repeated, is_late=deadline_s is not None and _now() > deadline_s)
        elif self._has_work(session, call):
            answers = None if call.first is None else (first, len(call.frames))
            found = await self._observations.infer(session, ticket, deadline_s, answers)
        if repeated is None and ticket.is_cancelled:
            raise ProtocolError("cancelled", "cancelled; the frames are stored")
        times = stage_times(arrived_s, began_s, decoded_s, found.seconds)
        return self._answer(session, call, found, times)

    def _starts_afresh(self, session: LiveSession | None, call: ImplicitCall) -> bool:
        """Whether the call replaces or opens the session; refuses what it cannot do."""
        if call.reset and call.prompt is None:
            raise ProtocolError("bad_request", call.wording.reset_needs_prompt)
        if session is None and call.prompt is None:
            raise ProtocolError("unknown_session", call.wording.first_call_needs_prompt)
        is_new = session is None or call.starts_afresh
        if not len(call.frames) and (is_new or call.needs_frames):
            raise ProtocolError("bad_request", call.wording.frames_needed)
        return is_new

    @staticmethod
    def _first_frame(call: ImplicitCall, stored: int) -> int:
        if call.is_prefix:
            if len(call.frames) < stored:
                raise ProtocolError(
                    "prefix_shrunk",
                    f"prefix_mode expects non-decreasing prefix length, but server already has {stored} frames and "
                    f"request has only {len(call.frames)}",
                )
            return 1
        first = stored + 1 if call.first is None else call.first
        if first > stored + 1:
            raise ProtocolError("gap", f"expected frame {stored + 1}, got {first}", expected=stored + 1)
        return first

    def _has_work(self, session: LiveSession, call: ImplicitCall) -> bool:
        """Whether to go to the policy: a segment is due, or frames can be encoded without one becoming due."""
        if session.is_done:
            return False
        if call.rule.is_due(session.frames, session.emitted, self._horizon.points):
            return True
        return bool(session.waiting_frames) and session.frames < self._horizon.points[session.emitted + 1]

    def _answer(self, session: LiveSession, call: ImplicitCall, found: Inferred, ms: StageTimes) -> ImplicitAnswer:
        need = 0
        if not session.is_done:
            need = max(0, call.rule.frames_needed(session.emitted + 1, self._horizon.points) - session.frames)
        return ImplicitAnswer(
            chunk=found.chunk,
            chunks=dict(session.chunks),
            frames=session.frames,
            emitted=session.emitted,
            need=need,
            prompt=session.prompt,
            reply=session.reply,
            is_late=found.is_late,
            ms=ms,
        )


def _repeated_chunk(session: LiveSession, call: ImplicitCall, first: int, skip: int) -> ActionChunk | None:
    """What the same call was answered before, when nothing in it is new (7.4)."""
    if call.first is None or session.last_call is None or skip < len(call.frames):
        return None
    sent, segment = session.last_call
    return session.chunks.get(segment) if sent == (first, len(call.frames)) else None


def _replace_settings(session: LiveSession, call: ImplicitCall) -> None:
    if call.keeps_seed:
        session.replace_settings(prompt=call.prompt)
    else:
        session.replace_settings(prompt=call.prompt, negative_prompt=call.negative_prompt, seed=call.seed)


def _now() -> float:
    return asyncio.get_running_loop().time()
