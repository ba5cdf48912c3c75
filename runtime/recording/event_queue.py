"""The way from the event loop to a thread: bounded in bytes and in number, and it never waits.

Where there is no room, frames are left out first; what they were, and how many events went with them, stands in a gap
that the thread is told before the session's next event.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from worldvln_edge.runtime.recording.recording_messages import Gap
from worldvln_edge.runtime.sessions.session_events import (
    FramesPredicted,
    FramesStored,
    SessionClosed,
    SessionEvent,
    SessionOpened,
)

_MOST_EVENTS = 10_000


@dataclass(frozen=True)
class Queued:
    """An event with its time."""

    time_ns: int
    """Since 1970."""
    event: SessionEvent
    gap: Gap | None
    """What is missing in front of it."""
    size_bytes: int


class EventQueue:
    """Many may put, one thread takes.

    Args:
        max_bytes: of the pictures that wait. One event alone may have more.
        max_events: that wait. Beginnings and ends of sessions, without which nothing else is of use, find room for as
            many again.
    """

    def __init__(self, max_bytes: int, max_events: int = _MOST_EVENTS):
        self._max_bytes, self._max_events = max_bytes, max_events
        self._waiting: deque[Queued] = deque()
        self._waiting_bytes = 0
        self._in_work = 0
        self._gaps: dict[str, Gap] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self.lost_events = 0
        self.lost_frames = 0

    def put(self, event: SessionEvent, time_ns: int) -> None:
        """Take an event, or count it as lost. Never waits for the thread's work."""
        size = _size_bytes(event)
        with self._changed:
            if self._is_closed:
                return
            is_border = isinstance(event, SessionOpened | SessionClosed)
            is_full = len(self._waiting) >= self._max_events * (2 if is_border else 1)
            is_large = size and self._waiting and self._waiting_bytes + size > self._max_bytes
            if is_full or (is_large and not is_border):
                self._lose(event)
                return
            self._waiting.append(Queued(time_ns, event, self._gaps.pop(event.uid, None), size))
            self._waiting_bytes += size
            # The thread comes by itself. Waking it for every event would cost the flight more than the writing.
            if self._waiting_bytes > self._max_bytes // 2 or len(self._waiting) > self._max_events // 2:
                self._changed.notify()

    def take(self, pause_s: float) -> Queued | None:
        """The oldest event; where none waits, pause so long, and look again. None: there is none."""
        with self._changed:
            if not self._waiting and not self._is_closed:
                self._changed.wait(pause_s)
            if not self._waiting:
                return None
            self._in_work += 1
            return self._waiting.popleft()

    def done(self, queued: Queued) -> None:
        """What was taken is dealt with; its pictures are not held any more."""
        with self._changed:
            self._waiting_bytes -= queued.size_bytes
            self._in_work -= 1
            self._changed.notify_all()

    def wait_until_done(self) -> None:
        """Return once nothing waits, and all that was taken is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._in_work)

    def close(self) -> None:
        """Take nothing more; what waits is still there to be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget what waits."""
        with self._changed:
            self._waiting_bytes -= sum(queued.size_bytes for queued in self._waiting)
            self._waiting.clear()
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Closed, and everything was taken."""
        with self._changed:
            return self._is_closed and not self._waiting

    def _lose(self, event: SessionEvent) -> None:
        gap = self._gaps.get(event.uid, Gap(first_frame=0, last_frame=0, events=0))
        first, last = gap.first_frame, gap.last_frame
        if isinstance(event, FramesStored):
            first, last = first or event.first, event.first + len(event.sent) - 1
            self.lost_frames += len(event.sent)
        self.lost_events += 1
        self._gaps[event.uid] = Gap(first_frame=first, last_frame=last, events=gap.events + 1)


def _size_bytes(event: SessionEvent) -> int:
    """Of its pictures."""
    if isinstance(event, FramesStored):
        sent = sum(each.data.nbytes if isinstance(each.data, np.ndarray) else len(each.data) for each in event.sent)
        return sent + sum(frame.nbytes for frame in event.frames)
    if isinstance(event, FramesPredicted):
        return event.frames.nbytes
    if isinstance(event, SessionOpened):
        return sum(frame.nbytes for frame in event.restored_frames)
    return 0


def without_decoded_frames(event: SessionEvent) -> SessionEvent:
    """The event with the frames only as they were sent, so that it holds nothing that the writer does not need."""
    return replace(event, frames=()) if isinstance(event, FramesStored) else event
