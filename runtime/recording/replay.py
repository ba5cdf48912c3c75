"""A recording, fed to a policy again: are the actions the same?

Frames, prompts and seeds are given in the order and in the groups in which they were flown, because another group is
another order of additions. A deadline chose the profile of a segment, and an idle device was used ahead of time:
neither happens again by itself, so the recording says what was done, and the replay does it. Compared is what the
policy gave, before the safety envelope.
Source: spec/session_protocol.md 2.6; spec/world_model.md 6.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import msgspec
import numpy as np

from worldvln_edge.images import ImageError, ImageLimits, decode_image
from worldvln_edge.poses import ACTION_ORDER, ACTION_UNITS
from worldvln_edge.runtime.recording.recording_messages import (
    Gap,
    Instruction,
    Message,
    Opening,
    Picture,
    Segment,
    Step,
)
from worldvln_edge.runtime.sessions.chained_session import ChainedSession
from worldvln_edge.runtime.sessions.policy import (
    ActionChunk,
    NonFiniteActionsError,
    Policy,
    PolicySession,
    StoppedError,
)

_ANY_SIZE = ImageLimits(max_bytes=2**40, max_pixels=2**40, max_side=2**31, max_aspect=2**31)


class ReplayError(ValueError):
    """The recording contradicts itself, or the policy cannot follow it. The message says where."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first number that is not the same."""

    segment: int
    step: int
    number: str
    """Of `poses.ACTION_ORDER`."""
    recorded: float
    replayed: float

    def __str__(self) -> str:
        unit = dict(zip(ACTION_ORDER, ACTION_UNITS, strict=True))[self.number]
        return (
            f"segment {self.segment}, step {self.step}, {self.number}: {self.recorded!r} {unit} recorded, "
            f"{self.replayed!r} {unit} replayed"
        )


class ReplayReport(msgspec.Struct, kw_only=True):
    segments: int = 0
    """Compared."""
    different: int = 0
    """Of them, beyond what was allowed."""
    first_difference: Difference | None = None
    """Of any size."""
    max_cm: float = 0.0
    max_deg: float = 0.0
    missing: str = ""
    """Why the rest, or anything, could not be compared; empty: all was."""

    @property
    def is_same(self) -> bool:
        return not self.different and not self.missing


def replay(
    opening: Opening, messages: Iterable[Message], policy: Policy, *, within_cm: float = 0.0, within_deg: float = 0.0
) -> ReplayReport:
    """Fly a recording again.

    Args:
        opening: how the session began.
        messages: everything, in order; an opening among them is passed over.
        policy: as it was flown; see `recorded_policy.load_recorded_policy`.
        within_cm, within_deg: differences that are allowed; 0: none, to the last bit.

    Raises:
        ReplayError: the recording contradicts itself, or asks for what the policy does not have.
    """
    flight = _Flight(opening, policy, ReplayReport(), within_cm, within_deg)
    try:
        for message in messages:
            flight.take(message)
            if flight.report.missing:
                break
        if not flight.report.segments and not flight.report.missing:
            flight.report.missing = "no segment is recorded"
    finally:
        flight.session.close()
    return flight.report


class _Flight:
    def __init__(self, opening: Opening, policy: Policy, report: ReplayReport, within_cm: float, within_deg: float):
        self.report = report
        self._opening, self._policy = opening, policy
        self._within = np.array([within_cm] * 3 + [within_deg] * 3)
        open_session = policy.new_session
        if opening.horizons is not None:
            open_session = partial(ChainedSession, policy, horizons=opening.horizons)
        self.session: PolicySession = open_session(
            opening.prompt, seed=opening.seed, negative_prompt=opening.negative_prompt, emit=opening.emit
        )
        self._is_restored = opening.restored_frames == 0
        self._frames: list[np.ndarray] = []
        self._settings: Instruction | None = None

    def take(self, message: Message) -> None:
        """What happened next."""
        if isinstance(message, Picture):
            self._take_picture(message)
        elif isinstance(message, Instruction):
            self._settings = message
        elif isinstance(message, Step):
            self._step(message)
        elif isinstance(message, Segment):
            self._compare(message)
        elif isinstance(message, Gap):
            self.report.missing = str(message)

    def _take_picture(self, picture: Picture) -> None:
        expected = len(self._frames) + 1
        if picture.index != expected:
            self.report.missing = f"frame {expected} is not in the recording; the next one in it is {picture.index}"
            return
        try:
            if picture.raw_hw is None:
                frame = decode_image(picture.data, _ANY_SIZE)
            else:
                frame = np.frombuffer(picture.data, np.uint8).reshape(*picture.raw_hw, 3)
            self._frames.append(self._policy.fit_frame(frame))
        except (ImageError, ValueError) as error:
            raise ReplayError(f"frame {picture.index} cannot be decoded: {error}") from error
        if not self._is_restored and len(self._frames) == self._opening.restored_frames:
            try:
                self.session.restore(self._frames, self._opening.restored_emitted)
            except ValueError as error:
                raise ReplayError(f"the session cannot be taken up where its journal left it: {error}") from error
            self._is_restored = True

    def _compare(self, segment: Segment) -> None:
        if segment.segment != self.session.emitted + 1:
            raise ReplayError(f"segment {segment.segment} is recorded behind segment {self.session.emitted}")
        chunk = self._fly(segment)
        try:
            recorded = segment.made_actions()
        except ValueError as error:
            raise ReplayError(f"segment {segment.segment}: its actions are cut ({error})") from error
        self._count(segment.segment, recorded, chunk.actions)

    def _step(self, step: Step) -> None:
        """What gave no segment: either none was due, or it was given up; so it is now."""
        if step.did == "worked_ahead":
            self.session.work_ahead(lambda: step.has_more)
            return
        new = self._told(step.frames)
        try:
            chunk = self.session.observe(new, should_stop=lambda: True)
        except (StoppedError, NonFiniteActionsError):
            return
        if chunk is not None:
            raise ReplayError(f"segment {chunk.segment} is emitted with {step.frames} frames; it was not when it flew")

    def _told(self, frames: int) -> list[np.ndarray]:
        """The frames that make it so many, after the session was told the new settings."""
        if not self.session.frames <= frames <= len(self._frames):
            raise ReplayError(
                f"the session had {frames} frames; here it has {self.session.frames}, and {len(self._frames)} are "
                "recorded so far"
            )
        if self._settings is not None:
            self.session.set_prompt(self._settings.prompt)
            self.session.set_negative_prompt(self._settings.negative_prompt)
            self.session.set_seed(self._settings.seed)
            self._settings = None
        return self._frames[self.session.frames : frames]

    def _fly(self, segment: Segment) -> ActionChunk:
        new = self._told(segment.observed_frames)
        self.session.set_profile(segment.profile)
        chunk: ActionChunk | None
        try:
            chunk = self.session.observe(new)
        except NonFiniteActionsError as error:
            self.session.pass_over()
            chunk = error.chunk
        finally:
            self.session.set_profile(self._opening.settings.profile)
        if chunk is None:
            raise ReplayError(
                f"segment {segment.segment} is not ready with {segment.observed_frames} frames, as it was when it flew"
            )
        return chunk

    def _count(self, segment: int, recorded: np.ndarray, replayed: np.ndarray) -> None:
        if recorded.shape != replayed.shape:
            raise ReplayError(f"segment {segment} has {len(recorded)} steps in the recording, and {len(replayed)} here")
        report = self.report
        report.segments += 1
        is_same = (recorded == replayed) | (np.isnan(recorded) & np.isnan(replayed))
        if is_same.all():
            return
        if report.first_difference is None:
            step, number = (int(at) for at in np.argwhere(~is_same)[0])
            report.first_difference = Difference(
                segment=segment,
                step=step,
                number=ACTION_ORDER[number],
                recorded=float(recorded[step, number]),
                replayed=float(replayed[step, number]),
            )
        with np.errstate(invalid="ignore"):  # infinity less infinity
            apart = np.where(is_same, 0.0, np.abs(recorded.astype(np.float64) - replayed))
        report.max_cm = max(report.max_cm, _largest(apart[:, :3]))
        report.max_deg = max(report.max_deg, _largest(apart[:, 3:]))
        report.different += not bool((apart <= self._within).all())


def _largest(apart: np.ndarray) -> float:
    """Infinity where a number was compared with none."""
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))
