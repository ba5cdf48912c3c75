"""The setpoint process for a simulator that waits: one tick for every /clock, and all times are those of /clock.

A step of the world, at time t:

    simulator          publishes /clock t, odometry and image of t, and waits
    policy             takes the image in, sends a chunk if it has planned one, and then says that it is ready for t
    setpoint process   ticks: its setpoint, stamped t, lets the world go on (or `step_done`, where it is silent)

So nothing depends on how fast this machine is: while the server plans, the world stands still. What was not answered
is published again by the simulator, and answered again here. Time-outs of the fail-safe count on /clock as well; they
say nothing about the punctuality of a drone.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from worldvln_edge.ros_bridge.ports.port import OdometrySample, Port
from worldvln_edge.ros_bridge.setpoints.policy_link import Alive, FromPolicy, LinkListener, Ready
from worldvln_edge.ros_bridge.setpoints.setpoint_logic import SetpointLogic
from worldvln_edge.ros_bridge.setpoints.setpoint_process import SetpointProcess

_log = logging.getLogger(__name__)
_WAIT_S = 0.1


class LockstepSetpointProcess(SetpointProcess):
    """
    Args:
        new_logic: makes what decides; called again when the simulator starts anew.
        port: with `topics.lockstep`.
        listener: where the policy connects.
    """

    def __init__(self, new_logic: Callable[[], SetpointLogic], port: Port, listener: LinkListener):
        self._new_logic = new_logic
        self._clocks: deque[int] = deque()
        self._said: deque[FromPolicy] = deque()
        self._clock_ns = self._done_ns = self._ready_ns = self._odometry_ns = 0
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        super().__init__(new_logic(), port, listener)  # from here on odometry may come
        port.subscribe_clock(self._receive_clock)

    def run(self) -> None:
        """Tick with the simulator until `stop`."""
        while not self._is_stopping:
            self._wait()
            self._listen()
            self._take_clocks()
            if self._can_tick():
                self._step()

    def _wait(self) -> None:
        readable, _, _ = select.select([*self._listener.sockets(), self._woken], [], [], _WAIT_S)
        if self._woken in readable:
            self._woken.recv(4096)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # so many are waiting to be read that one more tells nothing
            self._waker.send(b"!")

    def _receive_clock(self, now_ns: int) -> None:
        """In the port's thread."""
        self._clocks.append(now_ns)
        self._wake()

    def _receive_odometry(self, sample: OdometrySample) -> None:
        """In the port's thread."""
        if sample.stamp_ns == self._odometry_ns:
            return  # published again
        self._odometry.append((sample, sample.stamp_ns / 1e9))
        self._odometry_ns = sample.stamp_ns
        self._wake()

    def _take(self, message: FromPolicy) -> None:
        if isinstance(message, Ready):
            self._ready_ns = message.stamp_ns
        elif not isinstance(message, Alive):  # alive is who says that he is ready
            self._said.append(message)  # until the /clock has come that it belongs to

    def _now_ns(self) -> int:
        return self._clock_ns

    def _take_clocks(self) -> None:
        is_repeated = False
        while self._clocks:
            self._clock_ns = self._clocks.popleft()
            is_repeated = self._clock_ns == self._done_ns
            if self._clock_ns < self._done_ns:
                self._start_anew()
        if is_repeated:
            self._answer()

    def _start_anew(self) -> None:
        _log.warning("the simulator's clock went back; faults and odometry are forgotten")
        self._logic = self._new_logic()
        self._done_ns = self._ready_ns = self._diagnostics_due_ns = 0
        while self._odometry and self._odometry[0][1] > self._clock_ns / 1e9:
            self._odometry.popleft()

    def _can_tick(self) -> bool:
        if self._clock_ns <= self._done_ns or self._odometry_ns < self._clock_ns:
            return False
        return not self._listener.has_policy or self._ready_ns >= self._clock_ns

    def _step(self) -> None:
        now_ns = self._clock_ns
        if self._listener.has_policy:
            self._logic.policy_alive(now_ns / 1e9, now_ns / 1e9)
        wall_ns = time.monotonic_ns()
        self.timing.add(wall_ns, wall_ns)
        self._done_ns = now_ns
        while self._said:
            super()._take(self._said.popleft())
        self._tick(now_ns)
        if self._last.mode == "silent":
            self._port.publish_step_done(now_ns)

    def _answer(self) -> None:
        """Again: the setpoint of the step that is done, or that there is none."""
        if self._last.mode == "silent":
            self._port.publish_step_done(self._done_ns)
        else:
            self._publish(self._last)
