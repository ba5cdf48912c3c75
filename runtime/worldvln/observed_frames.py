"""The observing half of a flight: frames to latents, bit labels and the tokens that a segment begins with.

preprocess -> VAE encoder -> bit labels -> VAE decoder, as soon as a latent frame is complete; when a clip is, the world
model observes it. Frames go no further than the next segment needs.
Source: spec/world_model.md 7; spec/video_vae.md 8; spec/action_decoder.md 4; spec/session_protocol.md 2.6.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from worldvln_edge.images import check_rgb, transform
from worldvln_edge.runtime.engines.engine import Tensor
from worldvln_edge.runtime.worldvln import graphs
from worldvln_edge.runtime.worldvln.multiscale import ObservedClip, join_parts, quantise
from worldvln_edge.runtime.worldvln.stage_clock import StageClock
from worldvln_edge.runtime.worldvln.video_stream import FeatureDecoder, FrameEncoder
from worldvln_edge.runtime.worldvln.world_model import WorldModelDriver

if TYPE_CHECKING:
    from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy


class ObservedFrames:
    """What was seen in one flight.

    Whatever an engine raises leaves it as it was before that step; `count` tells whether the frames of the failed call
    were taken, and the next `take` goes on from there.

    Args:
        policy: engines, tables and sizes.
        driver: is told of every clip that is whole.
        clock: of the stages.
    """

    def __init__(self, policy: WorldVLNPolicy, driver: WorldModelDriver, clock: StageClock):
        self._policy, self._config = policy, policy.config
        self._driver, self._clock = driver, clock
        self.encoder = FrameEncoder(policy.engines, self._config.video_vae.temporal_stride)
        self.decoder = FeatureDecoder(policy.engines)
        self.count = 0
        """Frames taken, never above num_frames."""
        self.clips: list[ObservedClip] = []
        """Bit labels and codes of the clips that are whole."""
        head, tokens = self._config.action_decoder.latent_head, policy.input_dtype(graphs.ACTION_HEAD, "tokens")
        self.context_tokens = np.zeros((0, head.tokens_per_frame, head.width), tokens)
        """Of the last frames in front of the next segment."""
        self._latents: list[np.ndarray] = []  # encoded, not yet part of a clip
        self._parts: list[ObservedClip] = []  # of the clip that is being observed

    @property
    def held(self) -> Iterator[Tensor]:
        """Everything that takes memory."""
        yield from (*self.encoder.held, *self.decoder.held)
        yield from (*self._latents, self.context_tokens)
        for clip in (*self._parts, *self.clips):
            yield from clip.arrays

    def finish(self) -> None:
        """Nothing follows: free convolution states and latents; bit labels and codes stay."""
        self.encoder.finish()
        self.decoder.finish()
        self._latents.clear()

    def clear(self) -> None:
        """Free everything."""
        self.finish()
        self.clips.clear()
        self._parts.clear()

    def useful(self, new_frames: int) -> int:
        """How many of the next frames are encoded: those behind the last segment's start are counted only."""
        return min(new_frames, max(0, self._config.horizon.points[-2] - self.count))

    def take(self, frames: Sequence[np.ndarray], *, segment: int) -> None:
        """Encode what is new, and decode what the next segment rests on.

        Args:
            frames: uint8 RGB [H, W, 3] each, oldest first; may be empty.
            segment: that is next; the number of segments when all are emitted.

        Raises:
            ValueError: a frame is not uint8 [H, W, 3].
            Exception: whatever an engine raises.
        """
        for frame in frames:
            check_rgb(frame)
        start, encoded = time.perf_counter(), self.encoder.frames_encoded
        with self._clock("preprocess"):
            ready = [transform(frame, self._config.image_hw) for frame in frames[: self.useful(len(frames))]]
        with self._clock("vae_encoder"):
            latents = self.encoder.push(ready)
        self._latents += latents
        self.count = min(self._config.horizon.num_frames, self.count + len(frames))
        if segment < self._config.horizon.segments:
            self._take_latents(segment)
        encoded = self.encoder.frames_encoded - encoded
        if encoded:
            self._policy.times.add_frames(encoded, time.perf_counter() - start)

    def _take_latents(self, segment: int) -> None:
        """Quantise and decode what was encoded, up to where the next segment starts.

        A segment rests on the frames up to its start, even when later ones are already here.
        """
        end = self._policy.latent_end(self._config.horizon.points[segment])
        # Features are needed of the last frames in front of a segment only, so the others are decoded apart.
        tail = max(0, end - self._context_latents)
        while (taken := self._taken) < end and self._latents:
            clip = self._policy.tables.schedule.clips[len(self.clips)]
            borders = [border for border in (1, clip.frame_slice.stop, tail, end) if border > taken]
            count = min([*(border - taken for border in borders), len(self._latents)])
            self._take(count, with_tokens=taken >= tail)

    def _take(self, count: int, *, with_tokens: bool) -> None:
        schedule = self._policy.tables.schedule
        clip = schedule.clips[len(self.clips)]
        scales = schedule.scales_referred_to(clip.index)
        with self._clock("quantiser"):
            part = quantise(np.stack(self._latents[:count], 1), clip, self._config.world_model, scales=scales)
        with self._clock("vae_decoder"):
            features, decoder_state = self.decoder.decode(part.codes)
        tokens = self.context_tokens
        if with_tokens:
            with self._clock("action_decoder"):
                new = self._policy.tokens(features)
                tokens = np.concatenate([tokens, new])[-self._config.action_decoder.left_context :]
        # Everything was computed, so everything is taken over.
        del self._latents[:count]
        self._parts.append(part)
        self.decoder.go_on_from(decoder_state)
        self.context_tokens = tokens
        if sum(part.codes.shape[1] for part in self._parts) == clip.frames:
            observed = join_parts(self._parts)
            self.clips.append(observed)
            self._parts.clear()
            self._driver.observe(observed)

    @property
    def _taken(self) -> int:
        """Latent frames that were quantised and decoded."""
        whole = self._policy.tables.schedule.clips[len(self.clips)].first_frame
        return whole + sum(part.codes.shape[1] for part in self._parts)

    @property
    def _context_latents(self) -> int:
        """Latent frames that hold the context frames of a segment."""
        return -(-self._config.action_decoder.left_context // self._config.video_vae.temporal_stride)
