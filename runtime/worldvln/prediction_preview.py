"""Pictures of what the world model expects to see: the last segment's codes, decoded to pixels.

Nothing of a flight needs them; people do. Decoding goes on where the observed clips end, as for actions, in streaming
states of its own: the flight's are not touched.
Source: spec/video_vae.md 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from worldvln_edge.runtime.engines.engine import Engine
from worldvln_edge.runtime.sessions.policy import StoppedError
from worldvln_edge.runtime.worldvln.multiscale import ObservedClip
from worldvln_edge.runtime.worldvln.video_stream import FeatureDecoder
from worldvln_edge.runtime.worldvln.world_model import GeneratedClip


class PredictionPreview:
    """Of one flight.

    Args:
        engines: of the graphs `vae_decoder` and `vae_pixels`, both parts.
    """

    def __init__(self, engines: Mapping[str, Engine]):
        self._decoder = FeatureDecoder(engines)
        self._clips_seen = 0

    @property
    def held(self) -> tuple:
        """Streaming states."""
        return self._decoder.held

    def frames(
        self,
        observed: Sequence[ObservedClip],
        predicted: Sequence[GeneratedClip],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Predicted frames: uint8 RGB [F, H, W, 3].

        Args:
            observed: every clip in front of the predicted ones.
            predicted: the clips of a segment; at least one.
            should_stop: asked behind every observed clip, of which a flight that is looked at late has many.

        Raises:
            StoppedError: the next call goes on from there.
        """
        for clip in observed[self._clips_seen :]:
            features = self._decoder.commit(clip.codes)
            self._decoder.commit_pixels(features, clip.codes)
            self._clips_seen += 1
            if should_stop():
                raise StoppedError()
        codes = np.concatenate([clip.codes for clip in predicted], axis=1)
        pixels = self._decoder.peek_pixels(self._decoder.peek(codes), codes)
        return np.clip((pixels[0].transpose(1, 2, 3, 0) + 1.0) * 127.5 + 0.5, 0, 255).astype(np.uint8)
