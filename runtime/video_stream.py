"""Streaming VAE: frames in as they come, latents out; codes in, features out. Nothing is computed twice.

Legend: D latent channels, T latent frames, F frames, H W latent rows and columns.
Source: spec/video_vae.md 8.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from worldvln_edge.runtime.engine import Engine
from worldvln_edge.runtime.graphs import VAE_DECODER, VAE_ENCODER, VAE_PIXELS, first_or_next

State = dict[str, np.ndarray] | None
"""`state_i` -> array; None before the first frame."""


def _run_part(engines: Mapping[str, Engine], stem: str, inputs: dict[str, np.ndarray], state: State, result: str):
    outputs = engines[first_or_next(stem, state is None)].run({**inputs, **(state or {})})
    value = outputs.pop(result)
    return value, {name.removeprefix("next_"): array for name, array in outputs.items()}


class FrameEncoder:
    """Preprocessed frames of one flight to raw latents, each frame once."""

    def __init__(self, engines: Mapping[str, Engine], temporal_stride: int):
        self._engines = engines
        self._stride = temporal_stride
        self._state: State = None
        self._waiting: list[np.ndarray] = []
        self.frames_encoded = 0

    def push(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """Encode what is complete: the first frame alone, later ones in groups of the temporal stride.

        Args:
            frames: float32 [3, h, w] in [-1, 1] each.

        Returns:
            New latents, float32 [D, H, W] each, in order; frames of an unfinished group wait for the next call.
        """
        self._waiting.extend(frames)
        latents: list[np.ndarray] = []
        if self._state is None and self._waiting:
            latents += self._encode(self._waiting[:1])
        whole = len(self._waiting) // self._stride * self._stride
        if whole:
            latents += self._encode(self._waiting[:whole])
        return latents

    def _encode(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        video = np.stack(frames, axis=1)[None]
        latents, self._state = _run_part(self._engines, VAE_ENCODER, {"frames": video}, self._state, "latents")
        del self._waiting[: len(frames)]
        self.frames_encoded += len(frames)
        return list(latents[0].transpose(1, 0, 2, 3))


class FeatureDecoder:
    """Sums of codes to the features of the last up block; predictions branch off without being committed."""

    def __init__(self, engines: Mapping[str, Engine]):
        self._engines = engines
        self._state: State = None
        self._pixel_state: State = None
        self.latents_decoded = 0

    def commit(self, codes_DTHW: np.ndarray) -> np.ndarray:
        """Decode observed codes and go on from there: float32 [1, Cf, F, h, w]."""
        features, self._state = self._decode(codes_DTHW, self._state)
        return features

    def peek(self, codes_DTHW: np.ndarray) -> np.ndarray:
        """Decode predicted codes from the committed state and forget them: float32 [1, Cf, F, h, w]."""
        features, _ = self._decode(codes_DTHW, self._state)
        return features

    def commit_pixels(self, features: np.ndarray, codes_DTHW: np.ndarray) -> np.ndarray:
        """Pixels of committed features, in order: float32 [1, 3, F, h, w]."""
        inputs = {"features": features, "codes": codes_DTHW[None]}
        pixels, self._pixel_state = _run_part(self._engines, VAE_PIXELS, inputs, self._pixel_state, "pixels")
        return pixels

    def peek_pixels(self, features: np.ndarray, codes_DTHW: np.ndarray) -> np.ndarray:
        """Pixels of predicted features: float32 [1, 3, F, h, w]. Needs the committed pixels of the frames before."""
        inputs = {"features": features, "codes": codes_DTHW[None]}
        pixels, _ = _run_part(self._engines, VAE_PIXELS, inputs, self._pixel_state, "pixels")
        return pixels

    def _decode(self, codes_DTHW: np.ndarray, state: State):
        self.latents_decoded += codes_DTHW.shape[1]
        return _run_part(self._engines, VAE_DECODER, {"codes": codes_DTHW[None]}, state, "features")
