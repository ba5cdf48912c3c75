"""One flight of WorldVLN: a prompt, its frames in order, and everything that was computed from them.

The walk of a frame: preprocess -> VAE encoder -> bit labels -> VAE decoder, as soon as a latent frame is complete; when
a clip is: its keys and values; then, when a segment is ready: generate its clips -> VAE decoder -> adapter ->
TimesFormer windows -> actions. What only later segments need waits for `work_ahead`.
Source: spec/world_model.md 7, 9.2; spec/video_vae.md 8; spec/action_decoder.md 4, 10; spec/session_protocol.md 2.6.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from worldvln_edge.images import check_rgb, transform
from worldvln_edge.runtime import graphs
from worldvln_edge.runtime.engine import Tensor
from worldvln_edge.runtime.kv_cache import KVCache
from worldvln_edge.runtime.multiscale import ObservedClip, join_parts, quantise
from worldvln_edge.runtime.policy import ActionChunk, Emit, NonFiniteActionsError
from worldvln_edge.runtime.video_stream import FeatureDecoder, FrameEncoder
from worldvln_edge.runtime.world_model import GeneratedClip, WorldModelDriver

if TYPE_CHECKING:
    from worldvln_edge.runtime.worldvln_policy import WorldVLNPolicy


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
        self._encoder = FrameEncoder(policy.engines, self._config.video_vae.temporal_stride)
        self._decoder = FeatureDecoder(policy.engines)
        self._driver = WorldModelDriver(policy.engines, policy.tables, KVCache(policy.workspace))
        self._latents: list[np.ndarray] = []  # encoded, not yet part of an observed clip
        self._parts: list[ObservedClip] = []  # of the clip that is being observed
        self._clips: list[ObservedClip] = []
        tokens = policy.input_dtype(graphs.ACTION_HEAD, "tokens")
        self._context_tokens = np.zeros((0, *self._token_shape), tokens)
        self._timings_ms: dict[str, float] = {}
        self.profile = policy.profile
        """How deep the segments still to come are generated; may be replaced by another of `policy.profiles`."""
        self.frames = 0
        self.emitted = -1
        self.last_segment_s = 0.0
        """What the last segment took, from encoded frames to actions."""
        self.last_prediction: tuple[GeneratedClip, ...] = ()
        """The clips behind the last action chunk; their bits only with `record` (recorder, parity tests)."""

    @property
    def _token_shape(self) -> tuple[int, int]:
        head = self._config.action_decoder.latent_head
        return head.tokens_per_frame, head.width

    @property
    def observed_clips(self) -> tuple[ObservedClip, ...]:
        """Bit labels and codes of the clips that the next segment rests on (recorder, parity tests)."""
        return tuple(self._clips)

    @property
    def stored_scales(self) -> tuple[tuple[int, int], ...]:
        """(clip, scale) pairs whose keys and values the session holds."""
        return self._driver.stored_scales

    @property
    def kv_bytes(self) -> int:
        """Keys and values that the session holds."""
        return self._driver.kv_bytes

    @property
    def counters(self) -> dict[str, int]:
        """Work done so far in this flight (spec/world_model.md 9.3)."""
        return {
            "token_steps": self._driver.token_steps,
            "world_model_calls": self._driver.calls,
            "frames_encoded": self._encoder.frames_encoded,
            "latents_decoded": self._decoder.latents_decoded,
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
            self._driver.forget_text()

    def close(self) -> None:
        self._driver.clear()
        self._clips.clear()
        self._parts.clear()
        self._latents.clear()

    @property
    def least_s(self) -> float | None:
        """See `PolicySession.least_s`."""
        chooser = self._policy.chooser
        return None if chooser is None or self.done else chooser.least_seconds(self.profile, self.emitted + 1)

    def observe(self, frames: Sequence[np.ndarray], *, budget_s: float | None = None) -> ActionChunk | None:
        """See `PolicySession.observe`."""
        start = time.perf_counter()
        with self._policy.turn:
            if not self._take_frames(frames):
                return None
            spent_s = time.perf_counter() - start
            return self._emit_segment(self.emitted + 1, None if budget_s is None else budget_s - spent_s)

    def _take_frames(self, frames: Sequence[np.ndarray]) -> bool:
        """Encode what is new. Is the next segment ready?"""
        horizon = self._config.horizon
        for frame in frames:
            check_rgb(frame)
        # Frames behind the last segment's start are counted, not encoded: nothing that comes later could use them.
        useful = max(0, horizon.points[-2] - self.frames)
        with self._timed("preprocess"):
            ready = [transform(frame, self._config.image_hw) for frame in frames[:useful]]
        with self._timed("vae_encoder"):
            latents = self._encoder.push(ready)
        self._latents += latents
        self.frames = min(horizon.num_frames, self.frames + len(frames))
        self._take_latents()
        return not self.done and self.need == 0

    def work_ahead(self) -> None:
        """See `PolicySession.work_ahead`."""
        if self.done:
            return
        with self._policy.turn:
            timings, self._timings_ms = self._timings_ms, {}  # nobody waited for this, so no segment is charged for it
            try:
                self._prepare_text()
                self._driver.work_ahead(self._clips_of(self.emitted + 1), self._seed, self.profile)
            finally:
                self._timings_ms = timings

    def _take_latents(self) -> None:
        """Quantise and decode what was encoded, up to where the next segment starts.

        A segment rests on the frames up to its start, even when later ones are already here.
        """
        while not self.done:
            end = self._latent_end(self._config.horizon.points[self.emitted + 1])
            taken = self._taken
            clip = self._policy.tables.schedule.clips[len(self._clips)]
            # Features are needed of the last frames in front of a segment only, so the others are decoded apart.
            tail = max(0, end - self._context_latents)
            borders = [border for border in (1, clip.frame_slice.stop, tail, end) if border > taken]
            count = min([*(border - taken for border in borders), len(self._latents)]) if taken < end else 0
            if count == 0:
                return
            self._take(count, with_tokens=taken >= tail)

    def _take(self, count: int, *, with_tokens: bool) -> None:
        clip = self._policy.tables.schedule.clips[len(self._clips)]
        with self._timed("quantiser"):
            part = quantise(np.stack(self._latents[:count], 1), clip, self._config.world_model)
        with self._timed("vae_decoder"):
            features, decoder_state = self._decoder.decode(part.codes)
        tokens = self._context_tokens
        if with_tokens:
            with self._timed("action_decoder"):
                tokens = np.concatenate([tokens, self._adapter(features)])[-self._config.action_decoder.left_context :]
        # Everything was computed, so everything is taken over.
        del self._latents[:count]
        self._parts.append(part)
        self._decoder.go_on_from(decoder_state)
        self._context_tokens = tokens
        if sum(part.codes.shape[1] for part in self._parts) == clip.frames:
            observed = join_parts(self._parts)
            self._clips.append(observed)
            self._parts.clear()
            self._driver.observe(observed)

    @property
    def _taken(self) -> int:
        """Latent frames that were quantised and decoded."""
        whole = self._policy.tables.schedule.clips[len(self._clips)].first_frame
        return whole + sum(part.codes.shape[1] for part in self._parts)

    @property
    def _context_latents(self) -> int:
        """Latent frames that hold the context frames of a segment."""
        return -(-self._config.action_decoder.left_context // self._config.video_vae.temporal_stride)

    def _latent_end(self, frames: int) -> int:
        """Latent frames of that many frames."""
        return 1 + (frames - 1) // self._config.video_vae.temporal_stride

    def _emit_segment(self, segment: int, budget_s: float | None) -> ActionChunk:
        points = self._config.horizon.points
        observed, following = points[segment], points[segment + 1]
        start, chooser = time.perf_counter(), self._policy.chooser
        profile, reason = self.profile, ""
        if budget_s is not None and chooser is not None:
            choice = chooser.choose(profile, segment, budget_s)
            profile, reason = choice.profile, choice.reason
        self._prepare_text()
        indices = self._clips_of(segment)
        with self._timed("world_model_context"):
            self._driver.prepare(indices[0], profile)
        with self._timed("world_model_step"):
            generated = tuple(
                self._driver.generate(
                    index, self._seed, more_follow=index != indices[-1], record=self._record, profile=profile
                )
                for index in indices
            )
        with self._timed("vae_decoder"):
            features = self._decoder.peek(np.concatenate([clip.codes for clip in generated], axis=1))
        with self._timed("action_decoder"):
            tokens = np.concatenate([self._context_tokens, self._adapter(features)])
            actions = self._policy.actions(tokens, observed, following)
        timings, self._timings_ms = self._timings_ms, {}
        if not np.isfinite(actions).all():
            raise NonFiniteActionsError(f"segment {segment}: the action decoder gave NaN or infinity")
        self.emitted, self.last_prediction = segment, generated
        self.last_segment_s = time.perf_counter() - start
        if chooser is not None:
            chooser.add(profile, segment, self.last_segment_s)
        if self.done:
            self._driver.forget_text()  # and with it all keys and values
        return ActionChunk(
            segment=segment,
            actions=actions,
            observed_frames=self.frames,
            seed=self._seed,
            profile=profile.name,
            profile_reason=reason,
            timings_ms=timings,
        )

    def _prepare_text(self) -> None:
        if self._driver.has_text:
            return
        with self._timed("text_encoder"):
            known = self._policy.texts.get(self._prompt, self._negative_prompt)
            if known is not None:
                self._driver.take_text(known)
                return
            entries = self._driver.set_text(self._policy.encode_text(self._prompt, self._negative_prompt))
            self._policy.texts.put(self._prompt, self._negative_prompt, entries)

    def _clips_of(self, segment: int) -> list[int]:
        """Clips that a segment generates."""
        points = self._config.horizon.points
        first, end = self._latent_end(points[segment]), self._latent_end(points[segment + 1])
        return [clip.index for clip in self._policy.tables.schedule.clips if first <= clip.first_frame < end]

    def _adapter(self, features: Tensor) -> np.ndarray:
        return self._policy.engines[graphs.ACTION_ADAPTER].run({"features": features})["tokens"]

    @contextmanager
    def _timed(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            spent_ms = (time.perf_counter() - start) * 1e3
            self._timings_ms[stage] = self._timings_ms.get(stage, 0.0) + spent_ms
