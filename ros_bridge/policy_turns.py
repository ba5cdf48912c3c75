"""What a turn of the policy waits for, and on which clock: in flight, and with a simulator that waits for the bridge.

In flight times are monotonic, and every report of the setpoint process ends a turn. In lockstep times are those of
/clock, a turn ends with a new image, and the next turn tells the setpoint process that the policy is ready for that
step: everything that was due has been taken in, and a chunk that was planned has been sent.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from worldvln_edge.ros_bridge.ports.port import Port
from worldvln_edge.ros_bridge.setpoints.policy_link import PolicyLink, Progress, Ready

_WAIT_S = 0.05


class PolicyTurns(Protocol):
    """All but `image_came` belongs to the thread of the policy."""

    def image_came(self) -> None:
        """In the port's thread."""
        ...

    def is_new(self, stamp_ns: int) -> bool:
        """Of the image that is looked at now: whether it was not seen before."""
        ...

    def wait(self) -> list[Progress]:
        """Until something came, at most 50 ms. Reports in order. Raises LinkError."""
        ...

    def look(self) -> list[Progress]:
        """Reports that are here already; the world does not go on by it. Raises LinkError."""
        ...

    def now_ns(self) -> int:
        """The clock of reports and chunks."""
        ...

    def of_stamp(self, stamp_ns: int) -> int:
        """An image's time on that clock; a time ahead of it counts as now."""
        ...

    def to_stamp(self, at_ns: int) -> int:
        """Inverse."""
        ...

    @property
    def stuck_s(self) -> float:
        """For how long a simulator that should go on has not, since the last `look` or step; 0 in flight."""
        ...


class FlightTurns:
    """See PolicyTurns."""

    stuck_s = 0.0

    def __init__(self, port: Port, link: PolicyLink):
        self._port, self._link = port, link

    def image_came(self) -> None:
        """Images are looked at with the next report."""

    def is_new(self, stamp_ns: int) -> bool:
        return True  # what comes twice is for the camera's checks to say

    def wait(self) -> list[Progress]:
        report = self._link.receive(_WAIT_S)
        return [] if report is None else [report, *self.look()]

    def look(self) -> list[Progress]:
        return _drain(self._link)

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def of_stamp(self, stamp_ns: int) -> int:
        # A camera's clock may run a little ahead, and that is no frame from the future.
        now_ns = time.monotonic_ns()
        return min(stamp_ns - self._port.now_ns() + now_ns, now_ns)

    def to_stamp(self, at_ns: int) -> int:
        return self._port.now_ns() - time.monotonic_ns() + at_ns


class LockstepTurns:
    """See PolicyTurns."""

    def __init__(self, port: Port, link: PolicyLink):
        self._port, self._link = port, link
        self._came = threading.Event()
        self._step_ns = self._told_ns = 0
        self._is_asked_again = False
        self._stuck_s = 0.0

    @property
    def stuck_s(self) -> float:
        return self._stuck_s

    def image_came(self) -> None:
        self._came.set()

    def is_new(self, stamp_ns: int) -> bool:
        last_ns, self._step_ns = self._step_ns, stamp_ns
        if stamp_ns != last_ns:
            return True
        # The simulator shows a step again until it is answered. The setpoint process forgets who was ready when it sees
        # that the clock went back, so it may have forgotten that we are ready for the first step after that.
        self._is_asked_again = True
        return False

    def wait(self) -> list[Progress]:
        if self._step_ns != self._told_ns:
            self._stuck_s, self._is_asked_again = 0.0, True
        if self._is_asked_again:
            self._link.send(Ready(stamp_ns=self._step_ns))
            self._told_ns, self._is_asked_again = self._step_ns, False
        began_s = time.monotonic()
        self._came.wait(_WAIT_S)
        self._came.clear()
        self._stuck_s += time.monotonic() - began_s
        return _drain(self._link)

    def look(self) -> list[Progress]:
        self._stuck_s = 0.0
        return _drain(self._link)

    def now_ns(self) -> int:
        return self._port.now_ns()

    def of_stamp(self, stamp_ns: int) -> int:
        return min(stamp_ns, self._port.now_ns())

    def to_stamp(self, at_ns: int) -> int:
        return at_ns


def _drain(link: PolicyLink) -> list[Progress]:
    reports = []
    while (report := link.receive(0.0)) is not None:
        reports.append(report)
    return reports
