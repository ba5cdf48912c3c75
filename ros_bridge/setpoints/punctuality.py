"""Settings of the setpoint process that make its ticks punctual while others compute."""

from __future__ import annotations

import gc
import os
import sys

_SWITCH_S = 0.0005


class RealtimePriorityError(PermissionError):
    """This process may not have the real-time priority that is configured. The message says how it may."""


def become_punctual(realtime_priority: int) -> None:
    """Call it before threads are started: they inherit the priority.

    Args:
        realtime_priority: 1 to 99 of SCHED_FIFO; 0 leaves the process as it is.

    Raises:
        RealtimePriorityError: the system does not allow it.
    """
    sys.setswitchinterval(_SWITCH_S)  # the port's thread must not keep the loop from its tick
    gc.collect()
    gc.freeze()  # what is loaded by now is not searched again
    if realtime_priority == 0:
        return
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(realtime_priority))
    except OSError as failure:
        raise RealtimePriorityError(
            f"setpoint.realtime_priority {realtime_priority} is not allowed here ({failure.strerror}); start the "
            "setpoint process as root, give it CAP_SYS_NICE or a limit of rtprio, or set 0"
        ) from failure
