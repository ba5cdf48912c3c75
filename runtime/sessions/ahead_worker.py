"""Work ahead of time: what a session's next segment will need, done while nobody else wants the device.

It waits behind every request, makes way for one between two steps of the world model, and goes on afterwards.
Source: spec/world_model.md 9.2.
"""

from __future__ import annotations

import asyncio
import logging
import math

from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, Ticket
from worldvln_edge.runtime.sessions.live_session import LiveSession, SessionKey
from worldvln_edge.runtime.sessions.policy_calls import on_device
from worldvln_edge.runtime.sessions.session_events import WorkedAhead
from worldvln_edge.runtime.sessions.session_table import SessionTable

_log = logging.getLogger(__name__)


class AheadWorker:
    """All methods are called from one event loop."""

    def __init__(self, device: DeviceQueue, table: SessionTable):
        self._device, self._table = device, table
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Is there work that was begun, or that waits?"""
        return bool(self._tasks)

    def begin(self, session: LiveSession) -> None:
        """Work for this session once nobody else wants the device, in place of what was begun for it before."""
        if session.is_done:
            return
        if session.ahead is not None:
            session.ahead.cancel()
        session.ahead, session.has_more_ahead = Ticket(), True
        ticket = session.ahead
        task = asyncio.get_running_loop().create_task(self._work(session, ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self, key: SessionKey) -> None:
        """A request of this session has come; it must not wait behind work that only waits for an idle device."""
        session = self._table.find(key)
        if session is not None and session.ahead is not None:
            session.ahead.cancel()

    def close(self) -> None:
        """Begin nothing any more."""
        for task in self._tasks:
            task.cancel()

    async def _work(self, session: LiveSession, ticket: Ticket) -> None:
        def step() -> bool:
            return session.policy_session.work_ahead(lambda: ticket.is_cancelled or self._device.is_wanted)

        async with self._table.turn(session.key):
            if ticket.is_cancelled or self._table.find(session.key) is not session:
                return
            try:
                while session.has_more_ahead and not ticket.is_cancelled:
                    session.has_more_ahead = await on_device(self._device, step, ticket=ticket, priority=math.inf)
                    session.events.tell(WorkedAhead(uid=session.uid, has_more=session.has_more_ahead))
            except ProtocolError as error:  # it was logged; the next request does the work, or meets the same fault
                session.has_more_ahead = error.code == "cancelled"
                _log.debug("work ahead of session was left out: %s", error)
