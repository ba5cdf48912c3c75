"""The policy process: flies an instruction, chunk by chunk, from the frames of the camera.

One chunk after another: the server plans from the newest frame, the setpoint process flies the chunk and reports what
was consumed, and for every consumed action one frame goes back to the server. Whatever breaks the chain of frames ends
the flight, and the drone holds until the next instruction.

The port's thread only fills queues; all else happens in the thread that calls `run`.
Source: spec/session_protocol.md 7.3.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from worldvln_edge.client import (
    ActionAnswer,
    AnswerTimeoutError,
    ServerError,
    ServerUnreachableError,
    SessionClient,
)
from worldvln_edge.ros_bridge.bridge_config import BridgeConfig
from worldvln_edge.ros_bridge.camera_intake import CameraIntake, ImageMessage, ModelFrame
from worldvln_edge.ros_bridge.diagnostics import Diagnostic, Level, error, ok
from worldvln_edge.ros_bridge.frame_clock import FrameClock
from worldvln_edge.ros_bridge.ports.port import ImageSample, Port
from worldvln_edge.ros_bridge.progress_slots import ProgressSlots
from worldvln_edge.ros_bridge.setpoints.policy_link import Chunk, PolicyLink, Progress, Stop

_log = logging.getLogger(__name__)
_REPORT_WAIT_S = 0.05
_DIAGNOSTICS_S = 1.0
_IMAGES_KEPT = 64
"""Between two looks at the queue. While the server plans older ones fall out: none of them is due."""
FLIGHT = "policy/flight"


class FlightEndedError(RuntimeError):
    """A flight that cannot go on. `diagnostic` says why and what to do."""

    def __init__(self, message: str, what_to_do: str):
        super().__init__(f"{message}; {what_to_do}")
        self.diagnostic = error(FLIGHT, message, what_to_do)


class PolicyNode:
    """
    Args:
        config: see `bridge_config`.
        port: images, instructions and commands come from it.
        link: to the setpoint process.
        new_client: opens a connection to the server.
    """

    def __init__(self, config: BridgeConfig, port: Port, link: PolicyLink, new_client: Callable[[], SessionClient]):
        self._config, self._port, self._link, self._new_client = config, port, link, new_client
        clock: FrameClock[ImageMessage] = FrameClock(config.frame_clock)
        self._intake = CameraIntake(clock, time.monotonic(), config.camera)
        self._images: deque[tuple[ImageSample, float]] = deque(maxlen=_IMAGES_KEPT)
        self._instructions: deque[str] = deque(maxlen=1)
        self._stop_asked = False
        self._is_stopping = False
        self._chunks = 0
        self._last_report: Progress | None = None
        self._flight = ok(FLIGHT, "waiting for an instruction")
        self._diagnostics_due_s = 0.0
        port.subscribe_image(lambda sample: self._images.append((sample, time.monotonic())))
        port.subscribe_instruction(self._instructions.append)
        port.subscribe_command(self._obey)

    def stop(self) -> None:
        """Return from `run` soon."""
        self._is_stopping = True

    def run(self) -> None:
        """Fly one instruction after another until `stop`. Raises LinkError: the setpoint process has gone."""
        while not self._is_stopping:
            self._turn()
            if self._instructions:
                self._fly(self._instructions.popleft())

    def _obey(self, command: str) -> None:
        """In the port's thread. `reset` is for the setpoint process."""
        if command == "stop":
            self._stop_asked = True

    def _fly(self, instruction: str) -> None:
        _log.info("flying: %s", instruction)
        self._flight, self._stop_asked = ok(FLIGHT, f"flying: {instruction}"), False
        try:
            with self._new_client() as client:
                self._flight = self._fly_session(client, instruction)
        except (ServerError, ServerUnreachableError, AnswerTimeoutError) as failure:
            self._flight = error(FLIGHT, f"the server ended the flight: {failure}", "see the server's log")
        _log.log(logging.INFO if self._flight.level == Level.OK else logging.ERROR, self._flight.text)

    def _fly_session(self, client: SessionClient, instruction: str) -> Diagnostic:
        """How it ended."""
        outcome = ok(FLIGHT, f"flown: {instruction}")
        try:
            self._fly_segments(client, instruction)
        except FlightEndedError as end:
            outcome = end.diagnostic
        finally:
            self._link.send(Stop())  # before anything that waits for the server
        client.end()
        return outcome

    def _fly_segments(self, client: SessionClient, instruction: str) -> None:
        self._intake.restart()
        horizons, seed = self._config.server.horizons, self._config.server.seed
        if horizons > 1:
            client.start(instruction, seed=seed, chain=True, max_horizons=horizons)
        else:
            client.start(instruction, seed=seed)
        welcome = client.welcome
        assert welcome is not None, "start opened a connection"
        frames = [self._first_frame()]
        while True:
            answer = client.observe([frame.image_HW3 for frame in frames], t_ns=[frame.stamp_ns for frame in frames])
            self._turn()
            self._check_flight()  # much may have happened while the server planned
            slots = self._send_chunk(answer, frames[-1], welcome.fps)
            frames = self._frames_of_chunk(slots)
            if answer.done or answer.is_settled:
                return

    def _send_chunk(self, answer: ActionAnswer, newest: ModelFrame, fps: float) -> ProgressSlots:
        if not len(answer.actions):
            raise FlightEndedError(f"the server answered no actions and wants {answer.need} frames", "see its log")
        self._chunks += 1
        if answer.hold is not None:
            _log.warning("the server replaced the actions by zero motion: %s", answer.hold)
        now_ns = time.monotonic_ns()
        # A camera's clock may run a little ahead, and that is no frame from the future.
        seen_ns = min(newest.stamp_ns - self._port.now_ns() + now_ns, now_ns)
        actions = [tuple(float(value) for value in action) for action in answer.actions]
        self._link.send(
            Chunk(number=self._chunks, actions=actions, fps=fps, seen_ns=seen_ns)  # type: ignore[arg-type]
        )
        return ProgressSlots(
            self._chunks,
            len(actions),
            after_ns=self._intake.clock.last_slot_ns,
            begun_ns=seen_ns,
            expect=self._intake.clock.expect,
            to_stamp_ns=lambda at_ns: self._port.now_ns() - time.monotonic_ns() + at_ns,
        )

    def _first_frame(self) -> ModelFrame:
        """The frame of this moment."""
        self._intake.clock.expect(self._port.now_ns())
        give_up_s = time.monotonic() + 2 * self._config.camera.missing_after_s
        while time.monotonic() < give_up_s:
            self._turn()
            self._check_flight()
            frames = self._intake.take(time.monotonic())
            if frames:
                return frames[0]
        raise FlightEndedError(
            "no image was taken at the time at which the flight began",
            "check that header.stamp is on the clock of this computer (or set topics.use_sim_time)",
        )

    def _frames_of_chunk(self, slots: ProgressSlots) -> list[ModelFrame]:
        """One frame for each action, as they are consumed."""
        frames: list[ModelFrame] = []
        sent_s = time.monotonic()
        while len(frames) < slots.actions:
            report = self._turn()
            self._check_flight()
            if report is not None:
                slots.add(report)
            now_s = time.monotonic()
            frames += self._intake.take(now_s)
            self._check_progress(slots, now_s - sent_s)
        return frames

    def _check_flight(self) -> None:
        """Raises FlightEndedError: somebody or something has ended the flight."""
        if self._is_stopping or self._stop_asked:
            raise FlightEndedError("the flight was stopped", "send the next instruction")
        if self._instructions:
            raise FlightEndedError("another instruction came", "wait: it is flown now")
        for check in self._intake.diagnostics(time.monotonic()):
            if check.level >= Level.ERROR:
                raise FlightEndedError(f"{check.name}: {check.message}", check.what_to_do)
        if self._last_report is not None and self._last_report.faults:
            raise FlightEndedError(
                f"the setpoint process latched {', '.join(self._last_report.faults)}", "see its diagnostics"
            )

    def _check_progress(self, slots: ProgressSlots, sent_ago_s: float) -> None:
        """Raises FlightEndedError: the chunk is not flown."""
        if sent_ago_s < 0.5 or self._last_report is None:
            return
        if self._last_report.chunk != slots.chunk:
            why = self._last_report.reason or "it is not taken"
            raise FlightEndedError(f"the setpoint process does not fly the chunk ({why})", "see its diagnostics")
        if sent_ago_s > 2 * self._config.setpoint.stale_after_s:
            raise FlightEndedError("the chunk was not flown to its end in time", "see the setpoint process's log")

    def _turn(self) -> Progress | None:
        """Wait shortly for a report; take images in, publish diagnostics."""
        report = self._link.receive(_REPORT_WAIT_S)
        if report is not None:
            self._last_report = report
        while self._images:
            sample, arrived_s = self._images.popleft()
            self._intake.receive(sample.image, stamp_ns=sample.stamp_ns, source=sample.source, now_s=arrived_s)
        now_s = time.monotonic()
        if now_s >= self._diagnostics_due_s:
            self._diagnostics_due_s = now_s + _DIAGNOSTICS_S
            self._port.publish_diagnostics(self.diagnostics(now_s))
        return report

    def diagnostics(self, now_s: float) -> list[Diagnostic]:
        """The flight and the four checks of the camera."""
        return [self._flight, *self._intake.diagnostics(now_s)]
