"""One trajectory on the server: what its client said, what was stored and answered, and the policy session behind it.

Source: spec/session_protocol.md 2.5, 7.4.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from worldvln_edge.config import HorizonConfig
from worldvln_edge.protocol import Bye, SessionPhase, SessionState
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.journal_records import FramesSent, Settings, frames_records, segment_record
from worldvln_edge.runtime.sessions.policy import ActionChunk, PolicySession
from worldvln_edge.runtime.sessions.session_events import (
    FramesStored,
    Pose,
    SegmentEmitted,
    SentFrame,
    SessionEvents,
    SettingsReplaced,
)
from worldvln_edge.runtime.sessions.session_journal import SessionLog

SessionKey = tuple[str, str]
"""(peer, session name)."""


@dataclass(eq=False)
class LiveSession:
    """One trajectory on the server.

    `frames_seen`, `emitted`, `policy_need` and `is_done` mirror the policy session as of its last turn, so that they
    may be read while a worker thread is inside it.
    """

    key: SessionKey
    policy_session: PolicySession
    horizon: HorizonConfig
    """Of the whole trajectory: the model's, or a chained one."""
    seed: int
    last_used: float
    most_bytes: int = 0
    """What the policy session holds at most."""
    notify: Callable[[Bye], None] | None = None
    waiting_frames: list[np.ndarray] = field(default_factory=list)
    """Stored frames that the policy has not taken yet: a deadline passed, or a resend was answered from `chunks`."""
    waiting_bytes: int = 0
    prompt: str = ""
    """What is flown: as the client said it last, or an operator after it."""
    said_prompt: str | None = None
    """As the client said it last, where an operator said something else since; it may repeat it without effect."""
    is_held: bool = False
    """An operator holds the drone: segments are answered as standstills."""
    next_prompt: str | None = None
    """What the policy session does not know yet; so the next two."""
    next_negative_prompt: str | None = None
    next_seed: int | None = None
    reply: str = "segment"
    """What an answer holds where the client may choose it (openpi)."""
    last_call: tuple[FramesSent, int] | None = None
    """The last call that said where its frames belong and was answered with a segment, and that segment."""
    ahead: Ticket | None = None
    """Of the last work ahead of time."""
    has_more_ahead: bool = False
    """It was not begun yet, or broken off."""
    chunks: dict[int, ActionChunk] = field(default_factory=dict)
    capture_ns: dict[int, int] = field(default_factory=dict)
    """Frame index -> capture time of the client's clock."""
    still_steps: int | None = None
    """Steps that were flown without motion at the end of what was answered so far; None: nobody counts."""
    arrived_s: dict[int, float] = field(default_factory=dict)
    """Frame index -> event-loop time at which it reached the server."""
    frames_seen: int = 0
    emitted: int = -1
    policy_need: int = 0
    is_done: bool = False
    negative_prompt: str = ""
    log: SessionLog | None = None
    """Its journal, where there is one."""
    held_bytes: int = 0
    """What a done session still holds; written by the thread that flew its last segment."""
    events: SessionEvents = field(default_factory=SessionEvents)
    """Is told what happens to it."""
    uid: str = field(default_factory=lambda: secrets.token_hex(8))
    """In events."""
    _is_advancing: bool = False
    _steered_prompt: str | None = None
    """An operator said it while the session was advancing."""

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Take over the policy session's counts; what it took no longer waits. Only while no thread is inside it."""
        del self.waiting_frames[: self.policy_session.frames - self.frames_seen]
        self.waiting_bytes = sum(frame.nbytes for frame in self.waiting_frames)
        self.frames_seen = self.policy_session.frames
        self.emitted = self.policy_session.emitted
        self.policy_need = self.policy_session.need
        self.is_done = self.policy_session.done

    def replace_settings(
        self, *, prompt: str | None = None, negative_prompt: str | None = None, seed: int | None = None
    ) -> None:
        """What the client says of the segments still to come; None leaves it as it is."""
        before = (self.prompt, self.negative_prompt, self.seed)
        if prompt == self.prompt:
            self.said_prompt = None  # the client says what the operator said: they agree again
        elif prompt is not None and prompt != self.said_prompt:
            self.prompt = self.next_prompt = prompt
            self.said_prompt = None
        if negative_prompt is not None and negative_prompt != self.negative_prompt:
            self.negative_prompt = self.next_negative_prompt = negative_prompt
        if seed is not None and seed != self.seed:
            self.seed = self.next_seed = seed
        if before != (self.prompt, self.negative_prompt, self.seed):
            self._settings_replaced()

    def steer(self, *, prompt: str | None = None, hold: bool | None = None) -> None:
        """What an operator says of the segments still to come; None leaves it as it is.

        A hold takes effect at once, on the segment that is on its way, too; a prompt with the segment behind it. Unlike
        everything else, this comes without the session's turn.
        """
        before = (self.prompt, self.is_held)
        if hold is not None:
            self.is_held = hold
        if prompt is not None and self._is_advancing:
            self._steered_prompt = prompt
        elif prompt is not None and prompt != self.prompt:
            if self.said_prompt is None:
                self.said_prompt = self.prompt
            self.prompt = self.next_prompt = prompt
        if before != (self.prompt, self.is_held):
            self._settings_replaced()

    @contextmanager
    def advancing(self) -> Iterator[None]:
        """A thread may be inside the policy session, and told the settings as they are; new prompts wait.

        Otherwise one that came in between would be lost, or told to watchers in front of a segment that it is not in.
        """
        self._is_advancing = True
        try:
            yield
        finally:
            self._is_advancing = False
            prompt, self._steered_prompt = self._steered_prompt, None
            self.steer(prompt=prompt)

    def _settings_replaced(self) -> None:
        prompt, seed, negative_prompt, is_held = self.prompt, self.seed, self.negative_prompt, self.is_held
        if self.log is not None:
            self.log.add(
                Settings(
                    prompt=prompt,
                    seed=seed,
                    negative_prompt=negative_prompt,
                    is_held=is_held,
                    said_prompt=self.said_prompt,
                )
            )
        self.events.tell(
            SettingsReplaced(uid=self.uid, prompt=prompt, seed=seed, negative_prompt=negative_prompt, is_held=is_held)
        )

    @property
    def has_new_settings(self) -> bool:
        """Is there something that the policy session does not know yet?"""
        return (self.next_prompt, self.next_negative_prompt, self.next_seed) != (None, None, None)

    def store_frames(
        self,
        frames: list[np.ndarray],
        arrived_s: float,
        *,
        sent: Sequence[SentFrame],
        t_ns: list[int] | None = None,
        poses: Sequence[Pose] | None = None,
    ) -> None:
        """Keep decoded frames until the policy takes them. Called on the event loop.

        Args:
            frames: uint8 [H, W, 3] each.
            arrived_s: event-loop time at which they reached the server.
            sent: the same ones as they came.
            t_ns: when they were captured, by the client's clock.
            poses: where they were captured.
        """
        if not frames:
            return
        age_s = asyncio.get_running_loop().time() - arrived_s
        if t_ns is not None:
            self.capture_ns.update(enumerate(t_ns, start=self.frames + 1))
        if self.log is not None:
            self.log.add(*frames_records(frames, t_ns, arrived_s=time.time() - age_s))
        first = self.frames + 1
        self.arrived_s.update({first + index: arrived_s for index in range(len(frames))})
        self.waiting_frames.extend(frames)
        self.waiting_bytes += sum(frame.nbytes for frame in frames)
        self.events.tell(
            FramesStored(
                uid=self.uid, first=first, sent=sent, frames=tuple(frames), age_s=age_s, t_ns=t_ns, poses=poses
            )
        )

    def store_chunk(
        self,
        chunk: ActionChunk,
        answers: FramesSent | None = None,
        *,
        made: ActionChunk,
        device_s: float,
        late_s: float | None,
    ) -> None:
        """Keep what is answered from now on for that segment.

        Args:
            chunk: of the segment that the policy emitted.
            answers: the call that it answers, if that may be repeated.
            made: the chunk as the policy gave it.
            device_s: what it took.
            late_s: how long after its deadline it is; None: it is not.
        """
        self.chunks[chunk.segment] = chunk
        if answers is not None:
            self.last_call = (answers, chunk.segment)
        if self.log is not None:
            self.log.add(segment_record(chunk, answers))
        self.events.tell(SegmentEmitted(uid=self.uid, chunk=chunk, made=made, device_s=device_s, late_s=late_s))

    def flown_before(self, segment: int, steps: int) -> np.ndarray:
        """The last actions that were answered in front of a segment, at least so many if there are: float32 [M, 6]."""
        parts: list[np.ndarray] = [np.zeros((0, 6), np.float32)]
        while steps > 0 and (chunk := self.chunks.get(segment - 1)) is not None:
            parts.insert(1, chunk.actions)
            steps, segment = steps - len(chunk.actions), segment - 1
        return np.concatenate(parts)

    @property
    def counted_bytes(self) -> int:
        """Its part of the server's memory for sessions. An open one counts what it may come to hold."""
        return self.held_bytes if self.is_done else self.most_bytes

    @property
    def frames(self) -> int:
        """Frames stored, n."""
        return min(self.frames_seen + len(self.waiting_frames), self.horizon.num_frames)

    @property
    def need(self) -> int:
        """Frames missing for the next segment; 0 when none are."""
        return 0 if self.is_done else max(0, self.policy_need - len(self.waiting_frames))

    def state(self, re: int, phase: SessionPhase | None = None) -> SessionState:
        return SessionState(
            re=re,
            session=self.key[1],
            state=phase or ("done" if self.is_done else "open"),
            frames=self.frames,
            emitted=self.emitted,
            need=self.need,
        )
