"""Policy code on a device thread: whatever it raises becomes a refusal that explains itself and gives nothing away.

Source: spec/session_protocol.md 2.8, 7.7.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import TypeVar

from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.sessions.device_queue import DeviceQueue, StartedTooLateError, Ticket, WorkCancelledError
from worldvln_edge.runtime.sessions.live_session import SessionKey
from worldvln_edge.runtime.sessions.policy import NonFiniteActionsError, StoppedError, TooLateError

_log = logging.getLogger(__name__)
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
    device: DeviceQueue,
    work: Callable[[], T],
    *,
    ticket: Ticket,
    priority: float,
    start_by: float | None = None,
    session: SessionKey | None = None,
) -> T:
    """Run policy code on a device thread; what it raises becomes a typed refusal.

    Raises:
        ProtocolError: `cancelled`, `nonfinite_actions`, `internal`.
        StartedTooLateError: see DeviceQueue.run.
        TooLateError: the policy's.
    """
    try:
        return await device.run(work, priority=priority, ticket=ticket, start_by=start_by, session=session)
    except (StartedTooLateError, TooLateError):
        raise
    except WorkCancelledError:
        raise ProtocolError("cancelled", "cancelled before it ran") from None
    except StoppedError:
        raise ProtocolError("cancelled", "cancelled; the frames are stored") from None
    except NonFiniteActionsError:
        raise ProtocolError(
            "nonfinite_actions", "the model gave NaN or infinity; the segment may be asked for again"
        ) from None
    except Exception as error:  # the boundary to foreign code: whatever a policy raises must not end the server
        raise internal_error(error) from None
