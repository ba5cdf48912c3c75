"""Predicted frames for whoever records: asked for after every segment, once nobody else wants the device.

A segment whose frames were not there before the next one was emitted goes without: people look at them, nothing flies
by them.
"""

from __future__ import annotations

import asyncio

from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.session_events import (
    FramesPredicted,
    SegmentEmitted,
    SessionClosed,
    SessionEvent,
    SessionOpened,
)
from worldvln_edge.runtime.sessions.session_manager import SessionManager


class PredictionTeller:
    """Give `watch` to the manager's events; it tells `FramesPredicted` there. All on the event loop."""

    def __init__(self, manager: SessionManager):
        self._manager = manager
        self._peers: dict[str, str] = {}
        self._asking: dict[str, tuple[int, Ticket]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, event: SessionEvent) -> None:
        """See `session_events.SessionWatcher`."""
        if isinstance(event, SessionOpened):
            self._peers[event.uid] = event.key[0]
        elif isinstance(event, SegmentEmitted):
            self._stop(event.uid)
            ticket = Ticket()
            self._asking[event.uid] = (event.chunk.segment, ticket)
            task = asyncio.get_running_loop().create_task(self._tell(event, ticket))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(event, SessionClosed):
            self._stop(event.uid)
            self._peers.pop(event.uid, None)

    def _stop(self, uid: str) -> None:
        _, ticket = self._asking.pop(uid, (0, None))
        if ticket is not None:
            ticket.cancel()

    async def _tell(self, event: SegmentEmitted, ticket: Ticket) -> None:
        try:
            frames = await self._manager.operator.predicted_frames(self._peers[event.uid], event.uid, ticket=ticket)
        except ProtocolError:  # cancelled, or ended; a fault was logged where it happened
            return
        # What was decoded behind the next segment would be that one's.
        if frames is not None and self._asking.get(event.uid) == (event.chunk.segment, ticket):
            self._manager.events.tell(FramesPredicted(uid=event.uid, segment=event.chunk.segment, frames=frames))
