"""The next segment ahead of its frames: generated while the drone flies, from the predicted frames instead of the real.

When the real frames are there, their bit labels are compared with the predicted ones. Where enough of them agree the
segment is taken as it is and nobody waits; else it is generated anew, and the work was for nothing. An accepted segment
rests on predicted frames, so its actions are not those of `exact`: an opt-in, whose threshold says how much is risked.
Source: spec/world_model.md 9.5.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from worldvln_edge.generation_profile import GenerationProfile
from worldvln_edge.runtime.engines.engine import Tensor
from worldvln_edge.runtime.worldvln.multiscale import ObservedClip, clip_of_bits, quantise
from worldvln_edge.runtime.worldvln.segment_generation import Basis, GeneratedSegment, generate_segment
from worldvln_edge.runtime.worldvln.stage_clock import StageClock
from worldvln_edge.runtime.worldvln.video_stream import FeatureDecoder
from worldvln_edge.runtime.worldvln.world_model import GeneratedClip, WorldModelDriver

if TYPE_CHECKING:
    from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy


class SpeculationReport(msgspec.Struct, kw_only=True):
    """What speculation did in one flight, or in many."""

    segments: int = 0
    """That could have been speculated: all but the first of a flight."""
    finished: int = 0
    """Generated before their frames were there."""
    accepted: int = 0
    saved_s: float = 0.0
    """Time of the accepted segments, for which nobody waited."""
    added_s: float = 0.0
    """Time of all others, finished or not."""
    added_token_steps: int = 0
    """Per guidance row, of all others."""
    agreements: list[float] = msgspec.field(default_factory=list)
    """Of every finished one."""

    def add(self, other: SpeculationReport) -> None:
        """Count another flight's in."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """When a segment that was generated ahead is taken."""

    threshold: float = 0.7
    """Share of equal bit labels, 0..1."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"the speculation threshold must be within 0..1, found {self.threshold}")


class Speculation:
    """One segment on its way. The basis is a branch: nothing of it reaches the flight unless it is accepted."""

    def __init__(
        self,
        policy: WorldVLNPolicy,
        before: GeneratedSegment,
        driver: WorldModelDriver,
        decoder: FeatureDecoder,
        *,
        seed: int,
        profile: GenerationProfile,
        first_clip: int,
        record: bool,
    ):
        """
        Args:
            before: the segment whose frames are predicted.
            driver: a branch of the flight's: text, and every clip before that segment.
            decoder: of the flight; it is branched where the predicted frames end.
            seed, profile: of the new segment.
            first_clip: of the segment before.
            record: keep bits and probabilities of the new one.
        """
        self.segment, self.seed, self.profile = before.segment + 1, seed, profile
        self.predicted = _as_observed(policy, before.clips, first_clip)
        for clip in self.predicted:
            driver.observe(clip)
        basis = Basis(
            driver=driver,
            decoder=decoder.branch(before.decoder_state),
            context_tokens=before.tokens[-policy.config.action_decoder.left_context :],
        )
        self._driver, self._clock = driver, StageClock()
        self._steps: Generator[None, None, GeneratedSegment] | None = generate_segment(
            policy, basis, self.segment, seed=seed, profile=profile, record=record, clock=self._clock
        )
        self.result: GeneratedSegment | None = None
        self.spent_s = 0.0

    @property
    def held(self) -> Iterator[Tensor]:
        """What the branch holds, and its result; what a generation that pauses has so far is not seen."""
        yield from self._driver.held
        for clip in self.predicted:
            yield from clip.arrays
        if self.result is not None:
            yield from self.result.held

    @property
    def is_done(self) -> bool:
        return self._steps is None

    def advance(self, should_stop: Callable[[], bool]) -> None:
        """Go on until the segment is there, or until somebody else wants the device."""
        while self._steps is not None and not should_stop():
            try:
                next(self._steps)
            except StopIteration as end:
                self.result, self._steps = end.value, None
            finally:
                self.spent_s += sum(self._clock.take().values()) / 1e3

    @property
    def token_steps(self) -> int:
        """Computed so far, per guidance row."""
        return self._driver.token_steps

    def agreement(self, observed: Sequence[ObservedClip]) -> float:
        """Share of bit labels of the observed clips that are the predicted ones: 0..1."""
        pairs = [
            (found, expected)
            for real, predicted in zip(observed, self.predicted, strict=True)
            for found, expected in zip(real.bits, predicted.bits, strict=True)
        ]
        equal = sum(int((found == expected).sum()) for found, expected in pairs)
        return equal / sum(found.size for found, _ in pairs)


class Speculator:
    """Speculation of one flight: goes on from the segment emitted last, and answers for the next one if it may."""

    def __init__(self, policy: WorldVLNPolicy):
        self._policy = policy
        self._before: GeneratedSegment | None = None  # what the next guess would go on from
        self._guess: Speculation | None = None
        self.report = SpeculationReport()

    @property
    def is_on(self) -> bool:
        return self._policy.speculation is not None

    @property
    def held(self) -> Iterator[Tensor]:
        """What a guess holds, and what the next one would need."""
        for each in (self._before, self._guess):
            if each is not None:
                yield from each.held

    def follow(self, made: GeneratedSegment) -> None:
        """This segment was emitted."""
        if self.is_on and made.segment > 0:
            self.report.segments += 1
        self._before = made if self.is_on else None

    def advance(
        self,
        driver: WorldModelDriver,
        decoder: FeatureDecoder,
        *,
        observed_clips: int,
        seed: int,
        profile: GenerationProfile,
        should_stop: Callable[[], bool],
    ) -> bool:
        """Go on with the next segment. Is there more to do?

        Args:
            driver, decoder: of the flight, which they do not touch; the driver has the text.
            observed_clips: that are whole.
            seed, profile: of the next segment.
            should_stop: asked between two steps.
        """
        if self._guess is None:
            if self._before is None:
                return False
            first_clip = self._policy.clips_of(self._before.segment)[0]
            if observed_clips > first_clip:
                return False  # real frames are ahead of the predicted ones
            self._guess = Speculation(
                self._policy,
                self._before,
                driver.branch(),
                decoder,
                seed=seed,
                profile=profile,
                first_clip=first_clip,
                record=True,  # the next guess wants its bits
            )
            self._before = None
        try:
            self._guess.advance(should_stop)
        except BaseException:
            self.drop()
            raise
        if self._guess.result is not None and not self._guess.result.is_finite:
            self.drop()
            return False
        return not self._guess.is_done

    def may_answer(self, segment: int, *, seed: int, profile: GenerationProfile) -> bool:
        """Is a guess for this segment finished? Only its frames can tell whether it will be taken."""
        guess = self._guess
        return (
            guess is not None
            and guess.result is not None
            and (guess.segment, guess.seed, guess.profile) == (segment, seed, profile)
        )

    def take(
        self, segment: int, *, seed: int, profile: GenerationProfile, clips: Sequence[ObservedClip]
    ) -> tuple[GeneratedSegment | None, str]:
        """The segment as it was guessed, if the frames came as predicted; and why it is taken.

        Args:
            segment: that is due.
            seed, profile: that it should be generated with.
            clips: all that were observed.
        """
        guess, config = self._guess, self._policy.speculation
        if guess is None or config is None or guess.result is None or guess.segment != segment:
            self.drop()
            return None, ""
        agreement = guess.agreement(clips[-len(guess.predicted) :])
        self.report.finished += 1
        self.report.agreements.append(agreement)
        if agreement < config.threshold or (guess.seed, guess.profile) != (seed, profile):
            self.drop()
            return None, ""
        self._guess = None
        self.report.accepted += 1
        self.report.saved_s += guess.spent_s
        return guess.result, f"generated ahead; {agreement:.1%} of the frames' bits came as predicted"

    def drop(self) -> None:
        """What was guessed is for nothing."""
        dropped, self._guess = self._guess, None
        if dropped is not None:
            self.report.added_s += dropped.spent_s
            self.report.added_token_steps += dropped.token_steps

    def forget(self) -> None:
        """Nothing follows from what was emitted last."""
        self.drop()
        self._before = None


def _as_observed(policy: WorldVLNPolicy, clips: Sequence[GeneratedClip], first: int) -> tuple[ObservedClip, ...]:
    """Predicted clips as the world model would see them if they came true."""
    config, schedule = policy.config, policy.tables.schedule
    found = []
    for index, generated in enumerate(clips, start=first):
        clip, scales = schedule.clips[index], schedule.scales_referred_to(index)
        if len(generated.bits) == len(clip.steps):
            latent_hw = config.schedule.latent_hw
            found.append(clip_of_bits(generated.bits, clip, config.world_model, latent_hw, scales=scales))
        else:  # a profile left steps out, so the labels come from what it left as codes
            found.append(quantise(np.asarray(generated.codes), clip, config.world_model, scales=scales))
    return tuple(found)
