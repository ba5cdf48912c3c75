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
from worldvln_edge.ros_bridge.flight import FLIGHT, Flight, flown, flying
from worldvln_edge.ros_bridge.frame_clock import FrameClock
from worldvln_edge.ros_bridge.policy_turns import FlightTurns, LockstepTurns
from worldvln_edge.ros_bridge.ports.port import ImageSample, Port
from worldvln_edge.ros_bridge.progress_slots import ProgressSlots
from worldvln_edge.ros_bridge.setpoints.policy_link import Chunk, PolicyLink, Progress, Stop

_log = logging.getLogger(__name__)
_DIAGNOSTICS_S = 1.0
_STUCK_S = 10.0
_TAKEN_S = 2.0
"""A chunk that the setpoint process has not taken by then was refused."""
_IMAGES_KEPT = 64
"""Between two looks at the queue. While the server plans older ones fall out: none of them is due."""
_STOPPED, _NEXT = "the flight was stopped", "send the next instruction"
_SUPERSEDED, _IT_IS_FLOWN = "another instruction came", "wait: it is flown now"


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
        self._turns = LockstepTurns(port, link) if config.topics.lockstep else FlightTurns(port, link)
        self._intake = CameraIntake(clock, self._now_s(), config.camera)
        self._images: deque[tuple[ImageSample, float]] = deque(maxlen=_IMAGES_KEPT)
        self._waiting: deque[Flight] = deque()
        self._current: Flight | None = None
        self._is_stopping = False
        self._chunks = 0
        self._last_report: Progress | None = None
        self._faults: tuple[str, ...] = ()  # latched at any time of this flight, reset or not
        self._flight = ok(FLIGHT, "waiting for an instruction")
        self._diagnostics_due_s = 0.0
        port.subscribe_image(self._receive_image)
        port.subscribe_instruction(self._ask)
        port.subscribe_command(self._obey)

    def stop(self) -> None:
        """Return from `run` soon."""
        self._is_stopping = True

    def request(self, instruction: str) -> Flight:
        """Fly an instruction, in place of what is flown now. Thread-safe."""
        flight = Flight(instruction)
        self._waiting.append(flight)
        return flight

    def run(self) -> None:
        """Fly one instruction after another until `stop`. Raises LinkError: the setpoint process has gone."""
        try:
            while not self._is_stopping:
                self._turn()
                if self._waiting:
                    self._current = self._waiting[0]  # before it leaves the queue: a stop must not miss it
                    self._fly(self._waiting.popleft())
        finally:
            stopped = error(FLIGHT, "the policy process has ended", "start it again")
            for flight in (self._current, *self._waiting):
                if flight is not None:
                    flight.end(stopped)

    def _receive_image(self, sample: ImageSample) -> None:
        """In the port's thread."""
        self._images.append((sample, self._now_s()))
        self._turns.image_came()

    def _now_s(self) -> float:
        return self._turns.now_ns() / 1e9

    def _ask(self, instruction: str) -> None:
        """In the port's thread."""
        self.request(instruction)

    def _obey(self, command: str) -> None:
        """In the port's thread. `reset` is for the setpoint process."""
        if command == "stop":
            for flight in (self._current, *tuple(self._waiting)):
                if flight is not None:
                    flight.cancel()

    def _fly(self, flight: Flight) -> None:
        if self._waiting:
            flight.end(error(FLIGHT, _SUPERSEDED, _IT_IS_FLOWN))
            return
        if flight.is_cancelled:
            self._say(error(FLIGHT, _STOPPED, _NEXT))
            flight.end(self._flight)
            return
        _log.info("flying: %s", flight.instruction)
        self._say(flying(flight.instruction))
        flight.begin()
        try:
            with self._new_client() as client:
                self._say(self._fly_session(client, flight))
        except (ServerError, ServerUnreachableError, AnswerTimeoutError) as failure:
            self._say(error(FLIGHT, f"the server ended the flight: {failure}", "see the server's log"))
        flight.end(self._flight)
        _log.log(logging.INFO if self._flight.level == Level.OK else logging.ERROR, self._flight.text)

    def _say(self, flight: Diagnostic) -> None:
        """Of the flight, at once."""
        self._flight = flight
        self._publish_diagnostics()

    def _fly_session(self, client: SessionClient, flight: Flight) -> Diagnostic:
        """How it ended."""
        outcome = flown(flight.instruction)
        try:
            self._fly_segments(client, flight)
        except FlightEndedError as end:
            outcome = end.diagnostic
        finally:
            self._link.send(Stop())  # before anything that waits for the server
        client.end()
        return outcome

    def _fly_segments(self, client: SessionClient, flight: Flight) -> None:
        self._take_in(self._turns.look())
        self._faults = () if self._last_report is None else self._last_report.faults
        self._intake.restart()
        self._link.send(Stop())  # what was said to flights before does not concern this one
        horizons, seed = self._config.server.horizons, self._config.server.seed
        if horizons > 1:
            client.start(flight.instruction, seed=seed, chain=True, max_horizons=horizons)
        else:
            client.start(flight.instruction, seed=seed)
        welcome = client.welcome
        assert welcome is not None, "start opened a connection"
        frames = [self._first_frame()]
        while True:
            answer = client.observe([frame.image_HW3 for frame in frames], t_ns=[frame.stamp_ns for frame in frames])
            self._take_in(self._turns.look())
            self._check_flight()  # much may have happened while the server planned
            slots = self._send_chunk(answer, frames[-1], welcome.fps)
            flight.chunk_sent()
            frames = self._frames_of_chunk(slots, flight)
            if answer.done or answer.is_settled:
                return

    def _send_chunk(self, answer: ActionAnswer, newest: ModelFrame, fps: float) -> ProgressSlots:
        if not len(answer.actions):
            raise FlightEndedError(f"the server answered no actions and wants {answer.need} frames", "see its log")
        self._chunks += 1
        if answer.hold is not None:
            _log.warning("the server replaced the actions by zero motion: %s", answer.hold)
        seen_ns = self._turns.of_stamp(newest.stamp_ns)
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
            to_stamp_ns=self._turns.to_stamp,
        )

    def _first_frame(self) -> ModelFrame:
        """The frame of this moment."""
        self._intake.clock.expect(self._port.now_ns())
        give_up_s = self._now_s() + 2 * self._config.camera.missing_after_s
        while self._now_s() < give_up_s:
            self._turn()
            self._check_flight()
            frames = self._intake.take(self._now_s())
            if frames:
                return frames[0]
        raise FlightEndedError(
            "no image was taken at the time at which the flight began",
            "check that header.stamp is on the clock of this computer (or set topics.use_sim_time)",
        )

    def _frames_of_chunk(self, slots: ProgressSlots, flight: Flight) -> list[ModelFrame]:
        """One frame for each action, as they are consumed."""
        frames: list[ModelFrame] = []
        sent_s = self._now_s()
        while len(frames) < slots.actions:
            reports = self._turn()
            self._check_flight()
            for report in reports:
                slots.add(report)
                flight.flown(slots.known)
            now_s = self._now_s()
            frames += self._intake.take(now_s)
            self._check_progress(slots, now_s - sent_s)
        return frames

    def _check_flight(self) -> None:
        """Raises FlightEndedError: somebody or something has ended the flight."""
        is_cancelled = self._current is not None and self._current.is_cancelled
        if self._is_stopping or is_cancelled:
            raise FlightEndedError(_STOPPED, _NEXT)
        if self._waiting:
            raise FlightEndedError(_SUPERSEDED, _IT_IS_FLOWN)
        for check in self._intake.diagnostics(self._now_s()):
            if check.level >= Level.ERROR:
                raise FlightEndedError(f"{check.name}: {check.message}", check.what_to_do)
        if self._turns.stuck_s > _STUCK_S:
            raise FlightEndedError(
                f"the simulator has not gone on for {_STUCK_S:g} s",
                "see its log; with topics.lockstep it has to show /clock, odometry and an image at every step",
            )
        if self._faults:
            raise FlightEndedError(f"the setpoint process latched {', '.join(self._faults)}", "see its diagnostics")

    def _check_progress(self, slots: ProgressSlots, sent_ago_s: float) -> None:
        """Raises FlightEndedError: the chunk is not flown."""
        if sent_ago_s < _TAKEN_S or self._last_report is None:
            return
        if self._last_report.chunk != slots.chunk:
            why = self._last_report.reason or "it is not taken"
            raise FlightEndedError(f"the setpoint process does not fly the chunk ({why})", "see its diagnostics")
        if sent_ago_s > 2 * self._config.setpoint.stale_after_s:
            raise FlightEndedError("the chunk was not flown to its end in time", "see the setpoint process's log")

    def _turn(self) -> list[Progress]:
        """Wait shortly for reports or images; see `_take_in`."""
        return self._take_in(self._turns.wait())

    def _take_in(self, reports: list[Progress]) -> list[Progress]:
        """Take in what came, publish diagnostics; the reports."""
        if reports:
            self._last_report = reports[-1]
            self._faults = next((report.faults for report in reports if report.faults), self._faults)
        while self._images:
            sample, arrived_s = self._images.popleft()
            if self._turns.is_new(sample.stamp_ns):
                self._intake.receive(sample.image, stamp_ns=sample.stamp_ns, source=sample.source, now_s=arrived_s)
        if time.monotonic() >= self._diagnostics_due_s:
            self._publish_diagnostics()
        return reports

    def _publish_diagnostics(self) -> None:
        self._diagnostics_due_s = time.monotonic() + _DIAGNOSTICS_S
        self._port.publish_diagnostics(self.diagnostics(self._now_s()))

    def diagnostics(self, now_s: float) -> list[Diagnostic]:
        """The flight and the four checks of the camera."""
        return [self._flight, *self._intake.diagnostics(now_s)]
