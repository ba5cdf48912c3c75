"""What whoever watches flights may say and ask, beside the client that flies: an instruction, a hold, a look ahead."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.sessions.ahead_worker import AheadWorker
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, Ticket
from worldvln_edge.runtime.sessions.policy_calls import on_device
from worldvln_edge.runtime.sessions.session_table import SessionTable


class OperatorDesk:
    """
    Args:
        table: the sessions.
        ahead: work that a word makes useless.
        device: where the policy runs.
    """

    def __init__(self, table: SessionTable, ahead: AheadWorker, device: DeviceQueue):
        self._table, self._ahead, self._device = table, ahead, device

    def steer(self, peer: str, uid: str, *, prompt: str | None = None, hold: bool | None = None) -> None:
        """An operator's word for the segments still to come of a session; None leaves things as they are.

        Args:
            peer: whose name space, as for `SessionManager.start`.
            uid: of the session, from its events.
            prompt: instruction; stays until the client says one that it did not say before.
            hold: True answers every segment as a standstill, False flies again.

        Raises:
            ProtocolError: `unknown_session`.
        """
        session = self._table.of_uid(peer, uid)
        self._ahead.stop(session.key)
        session.steer(prompt=prompt, hold=hold)

    async def predicted_frames(self, peer: str, uid: str, *, ticket: Ticket | None = None) -> np.ndarray | None:
        """What the policy expects to see in a session's last segment, once nobody else wants the device.

        Returns:
            uint8 RGB [F, H, W, 3]; None where it cannot say.

        Raises:
            ProtocolError: `unknown_session`, `cancelled`, `internal`.
        """
        ticket = ticket or Ticket()
        while True:
            ask = self._table.of_uid(peer, uid).policy_session.predicted_frames
            work = partial(ask, lambda: ticket.is_cancelled or self._device.is_wanted)
            try:
                return await on_device(self._device, work, ticket=ticket, priority=math.inf)
            except ProtocolError as error:
                if error.code != "cancelled" or ticket.is_cancelled:
                    raise
