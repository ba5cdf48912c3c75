"""The yardstick: the schedule of the research server, run with the engines of a bundle.

For every segment the text is encoded again, the whole observed prefix is encoded and decoded again, all scales of all
clips up to the end of the horizon run with all their repetitions (observed ones with their bits forced), everything is
decoded, and the adapter sees every frame. Draws are those of `WorldVLNSession`, so that actions agree and the two can
be timed side by side. Left out, in the yardstick's favour: pixels and debug videos, the dead observation pass, and
the simulator's round trips.

Source: spec/world_model.md 6, 6.1, 7, 9.3; spec/action_decoder.md 10.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np

from worldvln_edge.action_windows import context_frame
from worldvln_edge.images import transform
from worldvln_edge.runtime import graphs
from worldvln_edge.runtime.engine import Tensor
from worldvln_edge.runtime.kv_cache import KVCache
from worldvln_edge.runtime.multiscale import ObservedClip, encode_clip
from worldvln_edge.runtime.policy import ActionChunk
from worldvln_edge.runtime.video_stream import FeatureDecoder, FrameEncoder
from worldvln_edge.runtime.world_model import WorldModelDriver
from worldvln_edge.runtime.worldvln_policy import WorldVLNPolicy


class _FullHorizonDriver(WorldModelDriver):
    def generate_all(self, observed: Sequence[ObservedClip], seed: int) -> list[np.ndarray]:
        """Codes of every clip of the horizon, float32 [D, T, H, W] each; observed ones with forced bits."""
        schedule = self._tables.schedule
        clips = []
        for clip in schedule.clips:
            codes: Tensor = self._tables.no_codes(clip)
            referred_to = set(schedule.scales_referred_to(clip.index))
            if self._tables.config.schedule.context_from_largest_no <= 0:
                referred_to = set(range(schedule.config.scales_per_clip))
            draws = self._clip_draws(clip.index, seed)
            for step in clip.steps:
                forced = observed[clip.index].bits[step.step_in_clip] if clip.index < len(observed) else None
                fetch = ("next_codes",) if step is clip.steps[-1] else ()
                outputs = self._step(
                    step, codes, rows=self._rows, uniforms=draws[step.step_in_clip], forced_bits=forced, fetch=fetch
                )
                codes = outputs["next_codes"]
                if step.is_last_repetition and step.scale in referred_to:
                    self._cache.keep((clip.index, step.scale), step.tokens, self._rows)
            clips.append(codes[0])
        return clips


class FullHorizonFlight:
    """One flight with rule F (a segment is ready once its first frame was observed)."""

    def __init__(self, policy: WorldVLNPolicy, prompt: str, *, seed: int = 0):
        self._policy, self._prompt, self._seed = policy, prompt, seed
        self._frames: list[np.ndarray] = []
        self._timings_ms: dict[str, float] = {}
        self.emitted = -1
        self.token_steps = 0
        self.calls = 0

    def observe(self, frames: Sequence[np.ndarray]) -> ActionChunk:
        """Take the frames up to the start of the next segment and emit it.

        Args:
            frames: uint8 RGB [H, W, 3], as `WorldVLNSession.observe` takes them.

        Raises:
            ValueError: not as many frames as the segment needs.
        """
        policy, horizon = self._policy, self._policy.config.horizon
        segment = self.emitted + 1
        observed, following = horizon.points[segment], horizon.points[segment + 1]
        with policy.turn:
            with self._timed("preprocess"):
                self._frames += [transform(frame, policy.config.image_hw) for frame in frames]
            if len(self._frames) != observed:
                raise ValueError(f"segment {segment} starts at frame {observed}, {len(self._frames)} are here")
            clips = self._observed_clips()
            driver = _FullHorizonDriver(policy.engines, policy.tables, KVCache(policy.workspace))
            with self._timed("text_encoder"):
                driver.set_text(policy.encode_text(self._prompt, ""))
            with self._timed("world_model_step"):
                codes = driver.generate_all(clips, self._seed)
            actions = self._actions(np.concatenate(codes, axis=1), observed, following)
        self.token_steps += driver.token_steps
        self.calls += driver.calls
        driver.clear()
        self.emitted = segment
        timings, self._timings_ms = self._timings_ms, {}
        return ActionChunk(
            segment=segment, actions=actions, observed_frames=observed, seed=self._seed, timings_ms=timings
        )

    def _observed_clips(self) -> list[ObservedClip]:
        policy = self._policy
        encoder = FrameEncoder(policy.engines, policy.config.video_vae.temporal_stride)
        with self._timed("vae_encoder"):
            latents = np.stack(encoder.push(self._frames), axis=1)
        with self._timed("quantiser"):
            clips = [
                encode_clip(latents[:, clip.frame_slice], clip, policy.config.world_model)
                for clip in policy.tables.schedule.clips
                if clip.frame_slice.stop <= latents.shape[1]
            ]
        with self._timed("vae_decoder"):  # the server decodes the prefix and drops it
            self._decode(np.concatenate([clip.codes for clip in clips], axis=1))
        return clips

    def _decode(self, codes_DTHW: np.ndarray) -> list[Tensor]:
        """Features of all frames: the first one alone, then the others."""
        decoder = FeatureDecoder(self._policy.engines)
        features = [decoder.commit(codes_DTHW[:, :1])]
        if codes_DTHW.shape[1] > 1:
            features.append(decoder.commit(codes_DTHW[:, 1:]))
        return features

    def _actions(self, codes_DTHW: np.ndarray, observed: int, following: int) -> np.ndarray:
        engines, head = self._policy.engines, self._policy.config.action_decoder
        with self._timed("vae_decoder"):
            features = self._decode(codes_DTHW)
        with self._timed("action_decoder"):
            adapter = engines[graphs.ACTION_ADAPTER]
            tokens = np.concatenate([adapter.run({"features": part})["tokens"] for part in features])
            seen = tokens[context_frame(observed, head.left_context) - 1 : following]
            return self._policy.actions(seen, observed, following)

    @contextmanager
    def _timed(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            spent_ms = (time.perf_counter() - start) * 1e3
            self._timings_ms[stage] = self._timings_ms.get(stage, 0.0) + spent_ms
