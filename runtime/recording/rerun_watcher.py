"""A server's sessions in the Rerun viewer while they fly, by a thread that nobody waits for (`serve --rerun`)."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from worldvln_edge.config import HorizonConfig
from worldvln_edge.runtime.recording.event_queue import EventQueue, Queued, without_decoded_frames
from worldvln_edge.runtime.recording.recording_messages import FlightSettings
from worldvln_edge.runtime.recording.rerun_stream import RerunStream
from worldvln_edge.runtime.recording.session_track import messages_of, opening_of
from worldvln_edge.runtime.sessions.policy import PolicyInfo
from worldvln_edge.runtime.sessions.session_events import SessionClosed, SessionEvent, SessionOpened

_log = logging.getLogger(__name__)
_QUEUE_BYTES = 64 * 2**20
_PAUSE_S, _CLOSE_WITHIN_S = 0.1, 10.0


class RerunWatcher:
    """Give `watch` to `SessionEvents.subscribe`.

    A viewer that is away or slow costs pictures in the viewer, and nothing else.

    Args:
        info: of the policy.
        connect: address of the viewer, such as rerun+http://ground:9876/proxy.
        save_folder: write files there instead, one a session; it exists.
    """

    def __init__(self, info: PolicyInfo, *, connect: str | None = None, save_folder: Path | None = None):
        self._info, self._connect, self._save_folder = info, connect, save_folder
        self._queue = EventQueue(_QUEUE_BYTES)
        self._streams: dict[str, tuple[RerunStream, HorizonConfig]] = {}
        self._thread = threading.Thread(target=self._run, name="rerun", daemon=True)
        self._thread.start()

    @property
    def lost_frames(self) -> int:
        """That came faster than they could be sent."""
        return self._queue.lost_frames

    def watch(self, event: SessionEvent) -> None:
        """Take an event; returns at once."""
        self._queue.put(without_decoded_frames(event), time.time_ns())

    def close(self) -> None:
        """Send what waits, and let the thread end."""
        self._queue.close()
        self._thread.join(_CLOSE_WITHIN_S)

    def _run(self) -> None:
        try:
            while not self._queue.is_over:
                queued = self._queue.take(_PAUSE_S)
                if queued is not None:
                    try:
                        self._show(queued)
                    finally:
                        self._queue.done(queued)
            for stream, _ in self._streams.values():
                stream.close()
        except Exception as error:  # the boundary to foreign code: a viewer that fails must not be heard of in flight
            _log.error("nothing is sent to the Rerun viewer any more", exc_info=error)
            self._queue.close()
            self._queue.clear()

    def _show(self, queued: Queued) -> None:
        event, time_ns = queued.event, queued.time_ns
        if isinstance(event, SessionOpened):
            save = None if self._save_folder is None else self._save_folder / f"{event.uid}.rrd"
            stream = RerunStream(event.uid, save=save, connect=self._connect)
            self._streams[event.uid] = stream, event.horizon
            stream.add(opening_of(event, self._info, FlightSettings()), time_ns)
        found = self._streams.get(event.uid)
        if found is None:
            return
        stream, horizon = found
        if queued.gap is not None:
            stream.add(queued.gap, time_ns)
        for message in messages_of(event, horizon):
            stream.add(message, time_ns)
        if isinstance(event, SessionClosed):
            del self._streams[event.uid]
            stream.close()
