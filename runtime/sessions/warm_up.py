"""Flights that nobody asked for, so that the first real one finds engines that have allocated and chosen kernels.

More than one, because what a deadline may choose rests on the times of the last segments: the slow first ones must not
be among most of them.

Source: spec/session_protocol.md 2.8 (models load at start), 2.7 (readiness).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from worldvln_edge.runtime.sessions.policy import Policy

_PROMPT = "move forward"
_LEAST_FLIGHTS, _MOST_FLIGHTS = 2, 4
_STEADY = 0.8  # of the time of the flight before


class WarmUpError(RuntimeError):
    """The policy cannot fly on this machine."""

    def __init__(self, error: BaseException):
        super().__init__(
            f"the first flight, which warms the engines up, failed ({type(error).__name__}: {error}); the server would "
            "answer no other one. Does the bundle fit this machine's memory and backend? `worldvln-edge bench BUNDLE` "
            "shows what it needs"
        )


def fly_until_steady(policy: Policy, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Fly until a flight is hardly quicker than the one before.

    Args:
        clock: seconds.

    Returns:
        Seconds of each flight.

    Raises:
        Exception: whatever the policy raises.
    """
    seconds: list[float] = []
    while len(seconds) < _MOST_FLIGHTS:
        began = clock()
        fly_once(policy)
        seconds.append(clock() - began)
        if len(seconds) >= _LEAST_FLIGHTS and seconds[-1] >= _STEADY * seconds[-2]:
            break
    return seconds


def fly_once(policy: Policy) -> None:
    """All segments of one trajectory over a grey picture, on the calling thread. Raises whatever the policy raises."""
    horizon = policy.info.horizon
    frame = policy.fit_frame(np.full((*policy.info.image_hw, 3), 127, np.uint8))
    session = policy.new_session(_PROMPT)
    try:
        for start in horizon.points[:-1]:
            session.observe([frame] * (start - session.frames))
            while session.work_ahead():
                pass
    finally:
        session.close()
