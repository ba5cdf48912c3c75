"""One flight of WorldVLN: a prompt, its frames in order, and everything that was computed from them.

The walk of a frame: it is observed (`observed_frames.py`); then, when a segment is ready: generate its clips -> VAE
decoder -> adapter -> TimesFormer windows -> actions. What only later segments need waits for `work_ahead`.
Source: spec/world_model.md 7, 9.2; spec/video_vae.md 8; spec/action_decoder.md 4, 10; spec/session_protocol.md 2.6.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from worldvln_edge.generation_profile import find_profile
from worldvln_edge.runtime.engines.engine import Tensor
from worldvln_edge.runtime.sessions.policy import (
    ActionChunk,
    Emit,
    NonFiniteActionsError,
    TooLateError,
    check_due,
    check_restorable,
)
from worldvln_edge.runtime.worldvln.kv_cache import KVCache
from worldvln_edge.runtime.worldvln.multiscale import ObservedClip
from worldvln_edge.runtime.worldvln.observed_frames import ObservedFrames
from worldvln_edge.runtime.worldvln.prediction_preview import PredictionPreview
from worldvln_edge.runtime.worldvln.segment_generation import Basis, GeneratedSegment, generate_segment
from worldvln_edge.runtime.worldvln.session_memory import held_bytes
from worldvln_edge.runtime.worldvln.speculation import SpeculationReport, Speculator
from worldvln_edge.runtime.worldvln.stage_clock import StageClock
from worldvln_edge.runtime.worldvln.world_model import GeneratedClip, WorldModelDriver, run_to_end

if TYPE_CHECKING:
    from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy


class WorldVLNSession:
    """See `PolicySession`.

    Whatever an engine raises leaves the flight as it was before that step: every step computes first and is taken
    over when all of its engines have answered. `frames` tells whether the frames of the failed call were taken; the
    next `observe` goes on from there.
    """

    def __init__(
        self, policy: WorldVLNPolicy, prompt: str, *, seed: int, negative_prompt: str, emit: Emit, record: bool
    ):
        self._policy = policy
        self._config = policy.config
        self._prompt, self._negative_prompt = prompt, negative_prompt
        self._seed, self._emit, self._record = seed, emit, record
        self._driver = WorldModelDriver(
            policy.engines, policy.tables, KVCache(policy.workspace), step_engines=policy.step_engines
        )
        self._clock = StageClock()
        self._seen = ObservedFrames(policy, self._driver, self._clock)
        self._speculator = Speculator(policy)
        self.profile = policy.profile
        """How deep the segments still to come are generated; may be replaced by another of `policy.profiles`."""
        self.emitted = -1
        self.last_segment_s = 0.0
        """What the last segment took, from encoded frames to actions."""
        self._preview: PredictionPreview | None = None
        self._shown: tuple[tuple[GeneratedClip, ...], np.ndarray] | None = None
        """What was asked for last: clips, and their frames."""
        self.last_prediction: tuple[GeneratedClip, ...] = ()
        """The clips behind the last action chunk; their bits only with `record` (recorder, parity tests)."""

    @property
    def frames(self) -> int:
        return self._seen.count

    @property
    def observed_clips(self) -> tuple[ObservedClip, ...]:
        """Bit labels and codes of the clips that the next segment rests on (recorder, parity tests)."""
        return tuple(self._seen.clips)

    @property
    def stored_scales(self) -> tuple[tuple[int, int], ...]:
        """(clip, scale) pairs whose keys and values the session holds."""
        return self._driver.stored_scales

    @property
    def kv_bytes(self) -> int:
        """Keys and values that the session holds."""
        return self._driver.kv_bytes

    @property
    def held_bytes(self) -> int:
        """See `PolicySession.held_bytes`; with `record` there is more to hold than `WorldVLNPolicy.session_bytes`."""
        return held_bytes(self._held())

    def _held(self) -> Iterator[Tensor]:
        yield from (*self._seen.held, *self._driver.held)
        for generated in self.last_prediction:
            yield from generated.arrays
        yield from self._speculator.held
        if self._preview is not None:
            yield from self._preview.held
        if self._shown is not None:
            yield self._shown[1]

    @property
    def speculated(self) -> SpeculationReport:
        """What speculation did in this flight (`WorldVLNPolicy.speculation`)."""
        return self._speculator.report

    @property
    def counters(self) -> dict[str, int]:
        """Work done so far in this flight (spec/world_model.md 9.3)."""
        return {
            "token_steps": self._driver.token_steps,
            "row_steps": self._driver.row_steps,
            "world_model_calls": self._driver.calls,
            "frames_encoded": self._seen.encoder.frames_encoded,
            "latents_decoded": self._seen.decoder.latents_decoded,
        }

    @property
    def need(self) -> int:
        if self.done:
            return 0
        points = self._config.horizon.points
        wanted = points[self.emitted + 1] if self._emit == "ahead" else points[self.emitted + 2]
        return max(0, wanted - self.frames)

    @property
    def done(self) -> bool:
        return self.emitted + 1 >= self._config.horizon.segments

    def set_prompt(self, prompt: str) -> None:
        """Replace the prompt for the segments still to come: keys and values are made anew, bit labels stay."""
        if prompt != self._prompt:
            self._prompt = prompt
            self._forget_text()

    def set_negative_prompt(self, negative_prompt: str) -> None:
        """Replace the negative prompt, with the same effect."""
        if negative_prompt != self._negative_prompt:
            self._negative_prompt = negative_prompt
            self._forget_text()

    def set_seed(self, seed: int) -> None:
        """Replace the seed of the segments still to come; draws that were made ahead for the old one are not used."""
        self._seed = seed

    def set_profile(self, name: str) -> None:
        """See `PolicySession.set_profile`."""
        self.profile = find_profile(self._policy.profiles, name)

    def predicted_frames(self, should_stop: Callable[[], bool] = lambda: False) -> np.ndarray | None:
        """See `PolicySession.predicted_frames`; needs a policy with the graphs `PREVIEW_GRAPHS`."""
        if not self._policy.shows_predictions:
            return None
        with self._policy.turn:
            predicted = self.last_prediction
            if not predicted:
                return None
            if self._shown is not None and self._shown[0] is predicted:
                return self._shown[1]
            first = self._policy.clips_of(self.emitted)[0]
            observed = self.observed_clips[:first]
            if len(observed) < first:  # the session was closed
                return None
            self._preview = self._preview or PredictionPreview(self._policy.engines)
            frames = self._preview.frames(observed, predicted, should_stop)
            self._shown = (predicted, frames)
            if self.done:
                self._preview = None
            return frames

    def close(self) -> None:
        """Free everything but the last prediction."""
        self._free_what_follows_would_need()
        self._preview = self._shown = None
        self._driver.clear()
        self._seen.clear()

    def _free_what_follows_would_need(self) -> None:
        """Keys and values, draws, convolution states; bit labels and codes stay (recorder, parity tests)."""
        self._speculator.forget()
        self._driver.finish()
        self._seen.finish()

    def least_s(self, new_frames: int = 0, *, with_new_settings: bool = False) -> float | None:
        """See `PolicySession.least_s`; where a segment was generated ahead, it is what taking that one needs."""
        if self.done:
            return None
        frames_s = self._policy.times.frames_s(self._seen.useful(new_frames))
        if self._may_be_there and not with_new_settings:
            return frames_s + self._policy.times.guess_s
        chooser = self._policy.chooser
        least_s = None if chooser is None else chooser.least_seconds(self.profile, self.emitted + 1)
        return None if least_s is None else least_s + frames_s

    @property
    def _may_be_there(self) -> bool:
        """Was the next segment generated ahead?"""
        return self._speculator.may_answer(self.emitted + 1, seed=self._seed, profile=self.profile)

    def observe(
        self,
        frames: Sequence[np.ndarray],
        *,
        budget_s: float | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ActionChunk | None:
        """See `PolicySession.observe`."""
        start = time.perf_counter()
        with self._policy.turn:
            if not self._take_frames(frames):
                return None
            spent_s = time.perf_counter() - start
            left_s = None if budget_s is None else budget_s - spent_s
            return self._emit_segment(self.emitted + 1, left_s, should_stop)

    def pass_over(self) -> None:
        """See `PolicySession.pass_over`."""
        check_due(self)
        self.last_prediction = ()
        self._speculator.forget()
        self._count(self.emitted + 1)

    def _count(self, segment: int) -> None:
        """That segment is emitted."""
        self.emitted = segment
        if self.done:
            self._free_what_follows_would_need()

    def restore(self, frames: Sequence[np.ndarray], emitted: int) -> None:
        """See `PolicySession.restore`."""
        check_restorable(self, frames, emitted)
        points, taken = self._config.horizon.points, 0
        with self._policy.turn:
            for segment in range(emitted + 1):
                self._take_frames(frames[taken : points[segment]])
                taken = points[segment]
                if self.frames < taken:
                    raise ValueError(f"segment {emitted} cannot rest on {len(frames)} frames")
                self._count(segment)
            self._take_frames(frames[taken:])
        self._clock.take()  # nobody waited for a segment here

    def _take_frames(self, frames: Sequence[np.ndarray]) -> bool:
        """See `ObservedFrames.take`. Is the next segment ready?"""
        self._seen.take(frames, segment=self.emitted + 1)
        return not self.done and self.need == 0

    def work_ahead(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """See `PolicySession.work_ahead`."""
        if self.done:
            return False
        with self._policy.turn:
            clock, self._clock = self._clock, StageClock()  # nobody waits for this, so no segment is charged for it
            try:
                self._prepare_text()
                self._driver.work_ahead(self._policy.clips_of(self.emitted + 1), self._seed, self.profile)
            finally:
                self._clock = clock
            if self._emit == "behind" or self.need == 0:
                return False  # frames are ahead of what could be predicted
            return self._speculator.advance(
                self._driver,
                self._seen.decoder,
                observed_clips=len(self._seen.clips),
                seed=self._seed,
                profile=self.profile,
                should_stop=should_stop,
            )

    def _forget_text(self) -> None:
        self._driver.forget_text()
        self._speculator.drop()

    def _emit_segment(self, segment: int, budget_s: float | None, should_stop: Callable[[], bool]) -> ActionChunk:
        start = time.perf_counter()
        was_there = self._may_be_there
        made, reason = self._speculator.take(segment, seed=self._seed, profile=self.profile, clips=self._seen.clips)
        was_ready = made is not None
        if made is None:
            if was_there and budget_s is not None:
                self._check_time(segment, budget_s - (time.perf_counter() - start))
            made, reason = self._generated(segment, budget_s, should_stop, start)
        took_s = time.perf_counter() - start
        (self._policy.times.add_guess if was_ready else self._policy.times.add_segment)(took_s)
        chunk = ActionChunk(
            segment=segment,
            actions=made.actions,
            observed_frames=self.frames,
            seed=self._seed,
            profile=made.profile.name,
            profile_reason=reason,
            was_ready=was_ready,
            timings_ms=self._clock.take(),
        )
        if not made.is_finite:
            raise NonFiniteActionsError(chunk)
        self.last_prediction, self.last_segment_s = made.clips, took_s
        self._speculator.follow(made)
        self._count(segment)
        return chunk

    def _check_time(self, segment: int, left_s: float) -> None:
        """The request was let in because the segment might have been there; is there time for one that is not?"""
        chooser = self._policy.chooser
        least_s = None if chooser is None else chooser.least_seconds(self.profile, segment)
        needs_s = self._policy.times.segment_s if least_s is None else least_s
        if needs_s > left_s:
            raise TooLateError(needs_s)

    def _generated(
        self, segment: int, budget_s: float | None, should_stop: Callable[[], bool], start: float
    ) -> tuple[GeneratedSegment, str]:
        """The segment from the frames that were observed, and why with that profile."""
        profile, reason, chooser = self.profile, "", self._policy.chooser
        if budget_s is not None and chooser is not None:
            choice = chooser.choose(profile, segment, budget_s)
            profile, reason = choice.profile, choice.reason
        self._prepare_text()
        basis = Basis(driver=self._driver, decoder=self._seen.decoder, context_tokens=self._seen.context_tokens)
        steps = generate_segment(
            self._policy,
            basis,
            segment,
            seed=self._seed,
            profile=profile,
            record=self._record or self._speculator.is_on,
            clock=self._clock,
        )
        made = run_to_end(steps, should_stop)
        if chooser is not None:
            chooser.add(profile, segment, time.perf_counter() - start)
        return made, reason

    def _prepare_text(self) -> None:
        if self._driver.has_text:
            return
        with self._clock("text_encoder"):
            known = self._policy.texts.get(self._prompt, self._negative_prompt)
            if known is not None:
                self._driver.take_text(known)
                return
            entries = self._driver.set_text(self._policy.encode_text(self._prompt, self._negative_prompt))
            self._policy.texts.put(self._prompt, self._negative_prompt, entries)
