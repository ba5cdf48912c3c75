"""What happens to the sessions of a server, told to whoever watches: the recorder, the dashboard.

The session manager tells everything here, whatever door a client came through. Watchers are called on the event loop,
in the order in which things happened, and before the request that caused it is answered: a watcher takes references
and returns; work is for a thread of its own. Arrays and messages are shared: nobody writes to them.

    def watch(event: SessionEvent) -> None: ...
    forget = events.subscribe(watch)

A meter (`meter.py`) counts what all sessions do together; an event says which session it was, and carries the data.

Legend: H W rows and columns, N steps of a segment.
Source: spec/session_protocol.md 2.5, 7.2, 7.4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from worldvln_edge.config import HorizonConfig
from worldvln_edge.protocol import StageTimes
from worldvln_edge.runtime.sessions.policy import ActionChunk, Emit

_log = logging.getLogger(__name__)
Pose = tuple[float, float, float, float, float, float]
"""As clients send it: poses.POSE_ORDER, cm and deg."""


@dataclass(frozen=True)
class SentFrame:
    """One frame as its client sent it, not decoded; it was decoded once, so it can be."""

    data: bytes | str | np.ndarray
    """An encoded image, its base64 text or data URL; or raw pixels: uint8 [H, W, 3], their bytes, or base64 of them."""
    raw_hw: tuple[int, int] | None = None
    """Size of raw pixels; None: `data` is an encoded image."""


@dataclass(frozen=True, kw_only=True)
class SessionOpened:
    """A session began, or was taken up again from its journal after the server was started again."""

    uid: str
    """Random, of this session alone: a key may be used again. It may be shown; it opens nothing."""
    key: tuple[str, str]
    """(peer, name). The name is enough to resume the session where no API keys are used: do not write it down."""
    prompt: str
    negative_prompt: str
    seed: int
    emit: Emit
    horizons: int | None
    """How many it is made of; None: it is not chained."""
    horizon: HorizonConfig
    """Of the whole trajectory."""
    restored_frames: Sequence[np.ndarray] = ()
    """What its journal kept: uint8 [H, W, 3] each, at the model's size, oldest first."""
    restored_emitted: int = -1
    """Last segment that had been emitted."""
    is_held: bool = False
    """An operator held it before."""


@dataclass(frozen=True, kw_only=True)
class SessionResumed:
    """Its client connected again; nothing was lost."""

    uid: str


@dataclass(frozen=True, kw_only=True)
class FramesStored:
    uid: str
    first: int
    """1-based index of the first one."""
    sent: Sequence[SentFrame]
    frames: Sequence[np.ndarray]
    """The same ones decoded, at the model's size: uint8 RGB [H, W, 3] each."""
    age_s: float
    """Since they reached the server."""
    t_ns: Sequence[int] | None
    """When they were captured, by the client's clock."""
    poses: Sequence[Pose] | None
    """Where they were captured."""


@dataclass(frozen=True, kw_only=True)
class SettingsReplaced:
    """What holds from the next segment on."""

    uid: str
    prompt: str
    negative_prompt: str
    seed: int
    is_held: bool = False
    """An operator holds the drone."""


@dataclass(frozen=True, kw_only=True)
class FramesTaken:
    """The policy session was told the new settings and given the waiting frames, and no segment came of it."""

    uid: str
    frames: int
    """That it has now."""


@dataclass(frozen=True, kw_only=True)
class WorkedAhead:
    """The policy session used an idle device for its next segment."""

    uid: str
    has_more: bool
    """It was broken off, and may go on later."""


@dataclass(frozen=True, kw_only=True)
class SegmentEmitted:
    """The policy session was told the new settings, given the waiting frames, and gave a segment."""

    uid: str
    chunk: ActionChunk
    """As it is answered."""
    made: ActionChunk
    """As the policy gave it; other actions than in `chunk` where the safety envelope put a hold in their place."""
    device_s: float
    """What it took on the device."""
    late_s: float | None
    """How long after its deadline; None: in time, or without one."""


@dataclass(frozen=True, kw_only=True)
class FramesPredicted:
    """What the policy expects to see in the segment that was emitted last; told only where somebody asks for it."""

    uid: str
    segment: int
    frames: np.ndarray
    """uint8 RGB [F, H, W, 3], of the frames behind the segment's first one."""


@dataclass(frozen=True, kw_only=True)
class RequestAnswered:
    """A request with an observation."""

    uid: str
    segment: int
    """-1: none was ready."""
    frames: int
    """Stored so far."""
    ms: StageTimes
    is_late: bool
    hold: str | None


@dataclass(frozen=True, kw_only=True)
class RequestRefused:
    """A request with an observation of a session that exists."""

    uid: str
    code: str
    """A key of protocol.ERRORS."""
    message: str


SessionEnd = Literal["ended", "expired", "replaced", "shutdown"]


@dataclass(frozen=True, kw_only=True)
class SessionClosed:
    """It left the server: ended by its client, dropped to make room or for its age, replaced by a new one of the same
    key, or the server goes down (its journal, if it has one, stays)."""

    uid: str
    reason: SessionEnd
    frames: int
    emitted: int
    is_done: bool


SessionEvent = (
    SessionOpened
    | SessionResumed
    | FramesStored
    | SettingsReplaced
    | FramesTaken
    | WorkedAhead
    | SegmentEmitted
    | FramesPredicted
    | RequestAnswered
    | RequestRefused
    | SessionClosed
)
SessionWatcher = Callable[[SessionEvent], None]


class SessionEvents:
    """Tells watchers. All methods are called from the event loop, or before it runs."""

    def __init__(self, watchers: Sequence[SessionWatcher] = ()):
        self._watchers: dict[int, SessionWatcher] = dict(enumerate(watchers))
        self._next = len(self._watchers)

    def subscribe(self, watcher: SessionWatcher) -> Callable[[], None]:
        """Tell this watcher from now on.

        Args:
            watcher: returns at once: the flight waits for it. One that raises is told nothing more.

        Returns:
            Ends the subscription; twice does no harm.
        """
        number, self._next = self._next, self._next + 1
        self._watchers[number] = watcher
        return lambda: self._forget(number)

    def tell(self, event: SessionEvent) -> None:
        """Tell every watcher, in the order in which they came."""
        for number, watcher in tuple(self._watchers.items()):
            try:
                watcher(event)
            except Exception as error:  # whoever looks on must not end a flight, whatever is wrong with it
                self._forget(number)
                _log.error("a watcher of sessions failed, and is told nothing more", exc_info=error)

    def _forget(self, number: int) -> None:
        self._watchers.pop(number, None)
