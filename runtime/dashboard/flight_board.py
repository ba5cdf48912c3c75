"""What a server's sessions do, as the dashboard shows it: the last state of each, and who waits to hear of a change.

Watches `session_events`. A reader that is slow misses states in between, never the last one, so nobody has to wait.

Positions are cm in the world of the client's poses; where it sends none, in a world that begins at the first frame,
and the path is what was commanded. Angles are deg.
Source: spec/session_protocol.md 5, 7.2.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import msgspec
import numpy as np

from worldvln_edge.poses import integrate_actions
from worldvln_edge.runtime.sessions.session_events import (
    FramesStored,
    RequestAnswered,
    RequestRefused,
    SegmentEmitted,
    SentFrame,
    SessionClosed,
    SessionEvent,
    SessionOpened,
    SettingsReplaced,
)

_KEPT_ANSWERS = 120
_KEPT_NOTES = 40
_KEPT_POINTS = 2000
"""Of a path; longer ones lose their oldest."""
_FARTHEST = 1e9
"""10,000 km; what lies behind it is no place, and no drawing ends with it."""
_KEPT_CLOSED = 8
"""Sessions that ended and are still shown."""


class SegmentTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of an answer with a segment."""

    segment: int
    queue: float
    decode: float
    infer: float
    total: float


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A hold, a late answer or a refusal."""

    segment: int
    kind: str
    """`hold`, `late` or `refused`."""
    reason: str


class FlightState(msgspec.Struct, kw_only=True):
    """One session, as the page gets it."""

    uid: str
    prompt: str
    seed: int
    frames: int = 0
    frames_total: int
    emitted: int = -1
    segments: int
    is_done: bool = False
    is_held: bool = False
    ended: str = ""
    """Why it left the server; empty while it is there."""
    profile: str = ""
    path: list[list[float]] = msgspec.field(default_factory=list)
    """x, y, z, yaw at every frame."""
    plan: list[list[float]] = msgspec.field(default_factory=list)
    """The last segment, from where it begins."""
    times: list[SegmentTimes] = msgspec.field(default_factory=list)
    notes: list[Note] = msgspec.field(default_factory=list)
    stages_ms: dict[str, float] = msgspec.field(default_factory=dict)
    """Of the last segment."""


class _Flight:
    """Everything that is known of one session."""

    def __init__(self, opened: SessionOpened):
        self.peer, self._horizon = opened.key[0], opened.horizon
        self._prompt, self._seed, self._is_held = opened.prompt, opened.seed, opened.is_held
        self._frames = len(opened.restored_frames)
        self._emitted, self._profile, self.ended = opened.restored_emitted, "", ""
        self.last_frame: tuple[bytes | str | None, np.ndarray] | None = None
        self._is_posed = False
        self._poses: deque[np.ndarray] = deque([np.zeros(6)], maxlen=_KEPT_POINTS)
        self._flown_to = self._frames  # frame that the last pose belongs to
        self._ahead: dict[int, np.ndarray] = {}  # frame -> action that leads away from it
        self._plan: list[list[float]] = []
        self._times: deque[SegmentTimes] = deque(maxlen=_KEPT_ANSWERS)
        self._notes: deque[Note] = deque(maxlen=_KEPT_NOTES)
        self._stages_ms: dict[str, float] = {}

    def take(self, event: SessionEvent) -> None:
        if isinstance(event, FramesStored):
            self._frames = event.first + len(event.frames) - 1
            self.last_frame = (_encoded(event.sent[-1]), event.frames[-1])
            self._fly(event)
        elif isinstance(event, SettingsReplaced):
            self._prompt, self._seed, self._is_held = event.prompt, event.seed, event.is_held
        elif isinstance(event, SegmentEmitted):
            chunk = event.chunk
            self._emitted, self._profile = chunk.segment, chunk.profile
            self._stages_ms = {name: round(ms, 2) for name, ms in chunk.timings_ms.items()}
            start = self._horizon.points[chunk.segment]
            self._ahead.update({start + step: action for step, action in enumerate(chunk.actions.astype(np.float64))})
            from_here = [self._ahead[frame] for frame in range(self._flown_to, start) if frame in self._ahead]
            begin = [self._poses[-1], *integrate_actions(self._poses[-1], np.reshape(from_here, (-1, 6)))][-1]
            self._plan = _points([begin, *integrate_actions(begin, chunk.actions)])
        elif isinstance(event, RequestAnswered):
            if event.segment >= 0:
                ms = event.ms
                self._times.append(
                    SegmentTimes(
                        segment=event.segment, queue=ms.queue, decode=ms.decode, infer=ms.infer, total=ms.total
                    )
                )
            if event.hold is not None:
                self._notes.append(Note(segment=event.segment, kind="hold", reason=event.hold))
            elif event.is_late:
                self._notes.append(Note(segment=event.segment, kind="late", reason="after its deadline"))
        elif isinstance(event, RequestRefused):
            self._notes.append(Note(segment=self._emitted + 1, kind="refused", reason=f"{event.code}: {event.message}"))
        elif isinstance(event, SessionClosed):
            self.ended = event.reason

    def _fly(self, event: FramesStored) -> None:
        """Where the drone is by the new frames."""
        if event.poses is not None:
            if not self._is_posed:
                self._is_posed = True
                self._poses.clear()
            self._poses.extend(np.asarray(pose, np.float64) for pose in event.poses)
        else:
            for frame in range(max(1, self._flown_to), self._frames):
                action = self._ahead.get(frame, np.zeros(6))
                self._poses.append(integrate_actions(self._poses[-1], action[None])[-1])
        self._flown_to = self._frames
        self._ahead = {frame: action for frame, action in self._ahead.items() if frame >= self._frames}

    def state(self, uid: str) -> FlightState:
        horizon = self._horizon
        return FlightState(
            uid=uid,
            prompt=self._prompt,
            seed=self._seed,
            frames=self._frames,
            frames_total=horizon.num_frames,
            emitted=self._emitted,
            segments=horizon.segments,
            is_done=self._emitted + 1 >= horizon.segments,
            is_held=self._is_held,
            ended=self.ended,
            profile=self._profile,
            path=_points(self._poses),
            plan=self._plan,
            times=list(self._times),
            notes=list(self._notes),
            stages_ms=self._stages_ms,
        )


class FlightBoard:
    """Give `watch` to `SessionEvents.subscribe`. All methods are called from one event loop."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight] = {}
        self._changes: dict[str, int] = {}  # uid -> number of its last change
        self._count = 0
        self._changed = asyncio.Event()
        self._is_closed = False

    def watch(self, event: SessionEvent) -> None:
        """See `session_events.SessionWatcher`."""
        if isinstance(event, SessionOpened):
            self._flights[event.uid] = _Flight(event)
        flight = self._flights.get(event.uid)
        if flight is None:
            return
        flight.take(event)
        self._count += 1
        self._changes[event.uid] = self._count
        self._changed.set()
        if isinstance(event, SessionClosed):
            self._forget_old()

    def last_frame(self, peer: str, uid: str) -> tuple[bytes | str | None, np.ndarray] | None:
        """The newest frame of a session; None where there is none.

        Returns:
            The image, or its base64 text or data URL, as it was sent, None where pixels were; and uint8 [H, W, 3] at
            the model's size.
        """
        flight = self._flights.get(uid)
        return flight.last_frame if flight is not None and flight.peer == peer else None

    async def states(self, peer: str, *, every_s: float = 0.1) -> AsyncIterator[list[FlightState]]:
        """All sessions of a peer, then those that changed, at most once in `every_s`, until the board is closed.

        An empty list comes every 5 s in which nothing changes, so that a lost connection is noticed.
        """
        seen = 0
        while not self._is_closed:
            count = self._count
            yield [
                flight.state(uid)
                for uid, flight in self._flights.items()
                if flight.peer == peer and self._changes[uid] > seen
            ]
            seen = count
            await asyncio.sleep(every_s)
            if self._count == seen and not self._is_closed:
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=5.0)
                except asyncio.TimeoutError:
                    continue

    def close(self) -> None:
        """End all `states`."""
        self._is_closed = True
        self._changed.set()

    def _forget_old(self) -> None:
        closed = [uid for uid, flight in self._flights.items() if flight.ended]
        for uid in closed[: max(0, len(closed) - _KEPT_CLOSED)]:
            del self._flights[uid], self._changes[uid]


def _encoded(sent: SentFrame) -> bytes | str | None:
    """Raw pixels are not kept: they may be a view of everything that was sent with them."""
    return sent.data if sent.raw_hw is None and isinstance(sent.data, bytes | str) else None


def _points(poses: deque[np.ndarray] | list[np.ndarray]) -> list[list[float]]:
    """x, y, z, yaw of poses, rounded for the wire; NaN becomes 0, which JSON can say."""
    columns = np.nan_to_num(np.asarray(list(poses), np.float64).reshape(-1, 6)[:, [0, 1, 2, 4]])
    return np.round(columns.clip(-_FARTHEST, _FARTHEST), 1).tolist()
