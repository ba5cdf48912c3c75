"""The loop around the setpoint logic: the only publisher of setpoints, in a process of its own.

It waits on the policy's line until the next tick is due, takes what came, and ticks. Odometry and commands come from
the port's thread through queues, so that the logic is touched by one thread only. Nothing in here waits for the policy,
its server, or a slow subscriber of other topics for longer than the port's own bound.
"""

from __future__ import annotations

import logging
import select
import time
from collections import deque

import numpy as np

from worldvln_edge.ros_bridge.diagnostics import Diagnostic, error, ok, warning
from worldvln_edge.ros_bridge.ports.port import OdometrySample, Port
from worldvln_edge.ros_bridge.setpoints.loop_timing import LoopTiming
from worldvln_edge.ros_bridge.setpoints.policy_link import (
    Alive,
    Chunk,
    FromPolicy,
    LinkListener,
    Progress,
    Stop,
)
from worldvln_edge.ros_bridge.setpoints.setpoint_logic import Setpoint, SetpointLogic

_log = logging.getLogger(__name__)
_DIAGNOSTICS_NS = 1_000_000_000
_ODOMETRY_KEPT = 256


class SetpointProcess:
    """
    Args:
        logic: decides.
        port: odometry and commands come from it, setpoints go to it.
        listener: where the policy connects.
        publishes_poses: setpoints are poses (`topics.setpoint_kind` pose), else velocities.
    """

    def __init__(self, logic: SetpointLogic, port: Port, listener: LinkListener, *, publishes_poses: bool = False):
        self._logic, self._port, self._listener = logic, port, listener
        self._publishes_poses = publishes_poses
        self.timing = LoopTiming(logic.config.rate_hz)
        self._odometry: deque[tuple[OdometrySample, float]] = deque(maxlen=_ODOMETRY_KEPT)
        self._commands: deque[str] = deque(maxlen=16)
        self._diagnostics_due_ns = 0
        self._last = Setpoint(mode="silent", reason="starting")
        self._refused = ""
        self._is_stopping = False
        port.announce_setpoints()
        port.subscribe_odometry(self._receive_odometry)
        port.subscribe_command(self._commands.append)

    def stop(self) -> None:
        """Return from `run` at the next tick. Setpoints end with it, and the autopilot's fail-safe acts."""
        self._is_stopping = True

    def run(self) -> None:
        """Tick until `stop`."""
        period_ns = round(self._logic.config.period_s * 1e9)
        due_ns = time.monotonic_ns()
        while not self._is_stopping:
            self._listen_until(due_ns)
            now_ns = time.monotonic_ns()
            self.timing.add(due_ns, now_ns)
            self._tick(now_ns)
            due_ns += period_ns
            if due_ns <= now_ns:  # the whole machine paused: ticks are not made up for
                due_ns = now_ns + period_ns

    def _listen_until(self, due_ns: int) -> None:
        while True:
            left_s = (due_ns - time.monotonic_ns()) / 1e9
            readable, _, _ = select.select(self._listener.sockets(), [], [], max(left_s, 0.0))
            if readable:
                self._listen()
            if left_s <= 0:
                return

    def _listen(self) -> None:
        if self._listener.accept():
            _log.info("a policy has connected")
            self._logic.policy_restarted()
        had_policy = self._listener.has_policy
        for message in self._listener.receive():
            self._take(message)
        if had_policy and not self._listener.has_policy:
            _log.warning("the policy has disconnected")

    def _take(self, message: FromPolicy) -> None:
        if isinstance(message, Alive):
            self._logic.policy_alive(message.seen_ns / 1e9, self._now_ns() / 1e9)
        elif isinstance(message, Stop):
            self._logic.stop()
        elif isinstance(message, Chunk):
            self._take_chunk(message)

    def _now_ns(self) -> int:
        """The clock of everything that the policy and the odometry say."""
        return time.monotonic_ns()

    def _receive_odometry(self, sample: OdometrySample) -> None:
        """In the port's thread."""
        self._odometry.append((sample, time.monotonic()))

    def _take_chunk(self, chunk: Chunk) -> None:
        self._take_odometry()  # the chunk starts where the drone was
        why_not = self._logic.chunk(
            chunk.number,
            np.array(chunk.actions, np.float64),
            fps=chunk.fps,
            seen_s=chunk.seen_ns / 1e9,
            now_s=self._now_ns() / 1e9,
        )
        self._refused = "" if why_not is None else f"chunk {chunk.number} is not flown: {why_not}"
        if self._refused:
            _log.error(self._refused)
        path = self._logic.path
        if why_not is None and path is not None:
            self._port.publish_path(path.poses_N4)
            self._port.publish_chunk(path.poses_N4, path.fps)

    def _take_odometry(self) -> None:
        while self._odometry:
            sample, arrived_s = self._odometry.popleft()
            self._logic.odometry(sample.position_3, sample.yaw_rad, arrived_s)

    def _tick(self, now_ns: int) -> None:
        self._take_odometry()
        while self._commands:
            self._obey(self._commands.popleft())
        setpoint = self._logic.tick(now_ns / 1e9)
        # The report first: in lockstep the setpoint lets the world go on, and the policy must know by then.
        self._listener.send(
            Progress(
                at_ns=now_ns,
                mode=setpoint.mode,
                reason=setpoint.reason,
                chunk=setpoint.chunk,
                progress=setpoint.progress,
                faults=self._logic.faults.names,
            )
        )
        self._publish(setpoint)
        if (setpoint.mode, setpoint.reason) != (self._last.mode, self._last.reason):
            _log.info("%s%s", setpoint.mode, f": {setpoint.reason}" if setpoint.reason else "")
        self._last = setpoint
        if now_ns >= self._diagnostics_due_ns:
            self._diagnostics_due_ns = now_ns + _DIAGNOSTICS_NS
            self._port.publish_diagnostics(self.diagnostics())

    def _publish(self, setpoint: Setpoint) -> None:
        if setpoint.mode == "silent":
            return
        if not self._publishes_poses:
            self._port.publish_setpoint(setpoint.velocity_m_s, setpoint.yaw_rate_rad_s)
        elif setpoint.pose_4 is not None:
            self._port.publish_setpoint_pose(np.array(setpoint.pose_4))

    def _obey(self, command: str) -> None:
        if command == "stop":
            self._logic.halt()
        elif command == "reset":
            names = self._logic.reset()
            _log.warning("reset by command: %s", ", ".join(names) or "there was no fault")
        else:
            _log.warning("command %r is not known; send stop or reset", command)

    def diagnostics(self) -> list[Diagnostic]:
        """Mode, faults, refused chunks, punctuality."""
        last = self._last
        if last.mode == "silent":
            mode = error("setpoint/mode", f"no setpoints: {last.reason}", "start the policy, or look into its log")
        elif last.mode == "hold" and last.reason not in ("no chunk", "the chunk is used up"):
            mode = warning("setpoint/mode", f"hold: {last.reason}", "see the other checks for the cause")
        else:
            mode = ok("setpoint/mode", f"{last.mode}: {last.reason}" if last.reason else last.mode)
        refused = (
            error("setpoint/chunk", self._refused, "look into the policy's log, and at the odometry")
            if self._refused
            else ok("setpoint/chunk")
        )
        return [mode, self._logic.faults.diagnostic, refused, self.timing.diagnostic]
