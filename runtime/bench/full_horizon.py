"""The yardstick: the schedule of the research server, run with the engines of a bundle.

For every segment the text is encoded again, the whole observed prefix is encoded and decoded again, all scales of all
clips up to the end of the horizon run with all their repetitions (observed ones with their bits forced), everything is
decoded, and the adapter sees every frame. The previews that the server makes by default are decoded too: all frames,
and the new clip once more with the latent in front of it. Draws are those of `WorldVLNSession`, so that actions agree
and the two can be timed side by side. Left out, in the yardstick's favour: writing the previews as videos, pixels of
the prefix, a second new clip, the dead observation pass, and the simulator's round trips.

Source: spec/world_model.md 6, 6.1, 7, 9.3; spec/action_decoder.md 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from worldvln_edge.action_windows import context_frame
from worldvln_edge.images import predicted_to_uint8, transform
from worldvln_edge.runtime.engines.engine import Tensor
from worldvln_edge.runtime.sessions.policy import ActionChunk
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.kv_cache import KVCache
from worldvln_edge.runtime.worldvln.multiscale import ObservedClip, encode_clip
from worldvln_edge.runtime.worldvln.stage_clock import StageClock
from worldvln_edge.runtime.worldvln.video_stream import FeatureDecoder, FrameEncoder
from worldvln_edge.runtime.worldvln.world_model import WorldModelDriver
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy

PREVIEWS = "previews"
"""Stage of what the server decodes to look at."""
PREVIEW_GRAPHS = tuple(graphs.first_or_next(graphs.VAE_PIXELS, first) for first in (True, False))


class _FullHorizonDriver(WorldModelDriver):
    def generate_all(self, forced_bits: Mapping[int, Sequence[np.ndarray]], seed: int) -> list[np.ndarray]:
        """Codes of every clip of the horizon, float32 [D, T, H, W] each.

        Args:
            forced_bits: clip -> its bits, per step bool [T, h, w, d]; the other clips are drawn.
            seed: of the draws.
        """
        schedule = self._tables.schedule
        clips = []
        for clip in schedule.clips:
            codes: Tensor = self._tables.no_codes(clip)
            referred_to = set(schedule.scales_referred_to(clip.index))
            if self._tables.config.schedule.context_from_largest_no <= 0:
                referred_to = set(range(schedule.config.scales_per_clip))
            draws = self._clip_draws(clip.index, seed)
            for step in clip.steps:
                forced = forced_bits[clip.index][step.step_in_clip] if clip.index in forced_bits else None
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
    """One flight with rule F (a segment is ready once its first frame was observed).

    Previews are decoded where the policy has the engines for it (`load_policy(side_graphs=PREVIEW_GRAPHS)`).
    """

    def __init__(self, policy: WorldVLNPolicy, prompt: str, *, seed: int = 0):
        self._policy, self._prompt, self._seed = policy, prompt, seed
        self._frames: list[np.ndarray] = []
        self._clock = StageClock()
        self._has_previews = graphs.first_or_next(graphs.VAE_PIXELS, True) in policy.engines
        self.emitted = -1
        self.token_steps = 0
        self.calls = 0

    def observe(
        self, frames: Sequence[np.ndarray], *, forced_bits: Mapping[int, Sequence[np.ndarray]] | None = None
    ) -> ActionChunk:
        """Take the frames up to the start of the next segment and emit it.

        Args:
            frames: uint8 RGB [H, W, 3], as `WorldVLNSession.observe` takes them.
            forced_bits: clip -> bits in place of the draws, per step bool [T, h, w, d].

        Raises:
            ValueError: not as many frames as the segment needs.
        """
        policy, horizon = self._policy, self._policy.config.horizon
        segment = self.emitted + 1
        observed, following = horizon.points[segment], horizon.points[segment + 1]
        with policy.turn:
            with self._clock("preprocess"):
                self._frames += [transform(frame, policy.config.image_hw) for frame in frames]
            if len(self._frames) != observed:
                raise ValueError(f"segment {segment} starts at frame {observed}, {len(self._frames)} are here")
            clips = self._observed_clips()
            driver = _FullHorizonDriver(policy.engines, policy.tables, KVCache(policy.workspace))
            with self._clock("text_encoder"):
                driver.set_text(policy.encode_text(self._prompt, ""))
            with self._clock("world_model_step"):
                bits = {**(forced_bits or {}), **{index: clip.bits for index, clip in enumerate(clips)}}
                codes = driver.generate_all(bits, self._seed)
            horizon_codes = np.concatenate(codes, axis=1)
            actions = self._actions(horizon_codes, observed, following)
            if self._has_previews:
                with self._clock(PREVIEWS):
                    end = policy.latent_end(following)
                    for part in (horizon_codes, horizon_codes[:, max(0, policy.latent_end(observed) - 1) : end]):
                        self._decode_pixels(part)
        self.token_steps += driver.token_steps
        self.calls += driver.calls
        driver.clear()
        self.emitted = segment
        return ActionChunk(
            segment=segment, actions=actions, observed_frames=observed, seed=self._seed, timings_ms=self._clock.take()
        )

    def _observed_clips(self) -> list[ObservedClip]:
        policy = self._policy
        encoder = FrameEncoder(policy.engines, policy.config.video_vae.temporal_stride)
        with self._clock("vae_encoder"):
            latents = np.stack(encoder.push(self._frames), axis=1)
        with self._clock("quantiser"):
            clips = [
                encode_clip(latents[:, clip.frame_slice], clip, policy.config.world_model)
                for clip in policy.tables.schedule.clips
                if clip.frame_slice.stop <= latents.shape[1]
            ]
        with self._clock("vae_decoder"):  # the server decodes the prefix and drops it
            self._decode(np.concatenate([clip.codes for clip in clips], axis=1))
        return clips

    def _decode(self, codes_DTHW: np.ndarray) -> list[Tensor]:
        """Features of all frames: the first one alone, then the others."""
        decoder = FeatureDecoder(self._policy.engines)
        features = [decoder.commit(codes_DTHW[:, :1])]
        if codes_DTHW.shape[1] > 1:
            features.append(decoder.commit(codes_DTHW[:, 1:]))
        return features

    def _decode_pixels(self, codes_DTHW: np.ndarray) -> list[np.ndarray]:
        decoder = FeatureDecoder(self._policy.engines)
        parts = [part for part in (codes_DTHW[:, :1], codes_DTHW[:, 1:]) if part.shape[1]]
        return [predicted_to_uint8(decoder.commit_pixels(decoder.commit(part), part)[0]) for part in parts]

    def _actions(self, codes_DTHW: np.ndarray, observed: int, following: int) -> np.ndarray:
        head = self._policy.config.action_decoder
        with self._clock("vae_decoder"):
            features = self._decode(codes_DTHW)
        with self._clock("action_decoder"):
            tokens = np.concatenate([self._policy.tokens(part) for part in features])
            seen = tokens[context_frame(observed, head.left_context) - 1 : following]
            return self._policy.actions(seen, observed, following)
