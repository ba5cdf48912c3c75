"""Streaming VAE: frames in as they come, latents out; codes in, features out. Nothing is computed twice.

Convolution states and features stay where the engine computed them: at the released size they are gigabytes.

Legend: D latent channels, T latent frames, F frames, H W latent rows and columns.
Source: spec/video_vae.md 8.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from worldvln_edge.runtime.engines.engine import Engine, Tensor
from worldvln_edge.runtime.worldvln.graphs import VAE_DECODER, VAE_ENCODER, VAE_PIXELS, first_or_next

State = dict[str, Tensor] | None
"""`state_i` -> what the engine kept; None before the first frame."""


def _run_part(
    engines: Mapping[str, Engine], stem: str, inputs: dict[str, Tensor], state: State, result: str, *, fetch: bool
) -> tuple[Tensor, State]:
    engine = engines[first_or_next(stem, state is None)]
    outputs = engine.run({**inputs, **(state or {})}, fetch=(result,) if fetch else ())
    value = outputs.pop(result)
    return value, {name.removeprefix("next_"): kept for name, kept in outputs.items()}


class FrameEncoder:
    """Preprocessed frames of one flight to raw latents, each frame once. A call that fails changes nothing."""

    def __init__(self, engines: Mapping[str, Engine], temporal_stride: int):
        self._engines = engines
        self._stride = temporal_stride
        self._state: State = None
        self._waiting: list[np.ndarray] = []
        self.frames_encoded = 0

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Convolution states, and frames of an unfinished group."""
        return (*(self._state or {}).values(), *self._waiting)

    def finish(self) -> None:
        """Nothing follows: free the states, and frames that wait."""
        self._waiting, self._state = [], None

    def push(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """Encode what is complete: the first frame alone, later ones in groups of the temporal stride.

        Args:
            frames: float32 [3, h, w] in [-1, 1] each.

        Returns:
            New latents, float32 [D, H, W] each, in order; frames of an unfinished group wait for the next call.
        """
        waiting, state = [*self._waiting, *frames], self._state
        latents: list[np.ndarray] = []
        encoded = 0
        if state is None and waiting:
            new, state = self._encode(waiting[:1], state)
            latents += new
            encoded = 1
        whole = (len(waiting) - encoded) // self._stride * self._stride
        if whole:
            new, state = self._encode(waiting[encoded : encoded + whole], state)
            latents += new
            encoded += whole
        # Last, because an engine may have failed above: the same frames may then be pushed again.
        self._waiting, self._state = waiting[encoded:], state
        self.frames_encoded += encoded
        return latents

    def _encode(self, frames: list[np.ndarray], state: State) -> tuple[list[np.ndarray], State]:
        video = np.stack(frames, axis=1)[None]
        latents, state = _run_part(self._engines, VAE_ENCODER, {"frames": video}, state, "latents", fetch=True)
        return list(latents[0].transpose(1, 0, 2, 3)), state


class FeatureDecoder:
    """Sums of codes to the features of the last up block; predictions branch off without being committed.

    Features, [1, Cf, F, h, w], stay with the decoder's engine, for other engines to read, unless they are fetched:
    then they are an array. A call that fails changes nothing.
    """

    def __init__(self, engines: Mapping[str, Engine]):
        self._engines = engines
        self._state: State = None
        self._pixel_state: State = None
        self.latents_decoded = 0

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Convolution states."""
        return (*(self._state or {}).values(), *(self._pixel_state or {}).values())

    def finish(self) -> None:
        """Nothing follows: free the states."""
        self._state = self._pixel_state = None

    def decode(self, codes_DTHW: np.ndarray, *, fetch: bool = False) -> tuple[Tensor, State]:
        """Decode the codes that follow the committed ones: features, and the state after them.

        Nothing is committed until that state is given to `go_on_from`.

        Args:
            codes_DTHW: float32.
            fetch: bring the features to the host.
        """
        features, after = _run_part(
            self._engines, VAE_DECODER, {"codes": codes_DTHW[None]}, self._state, "features", fetch=fetch
        )
        self.latents_decoded += codes_DTHW.shape[1]
        return features, after

    def branch(self, state: State) -> FeatureDecoder:
        """A decoder that goes on from a state by itself."""
        other = FeatureDecoder(self._engines)
        other._state = state
        return other

    def go_on_from(self, state: State) -> None:
        """Commit what `decode` returned that state for."""
        self._state = state

    def commit(self, codes_DTHW: np.ndarray, *, fetch: bool = False) -> Tensor:
        """Decode observed codes and go on from there."""
        features, self._state = self.decode(codes_DTHW, fetch=fetch)
        return features

    def peek(self, codes_DTHW: np.ndarray, *, fetch: bool = False) -> Tensor:
        """Decode predicted codes from the committed state and forget them."""
        features, _ = self.decode(codes_DTHW, fetch=fetch)
        return features

    def commit_pixels(self, features: Tensor, codes_DTHW: np.ndarray) -> np.ndarray:
        """Pixels of committed features, in order: float32 [1, 3, F, h, w]."""
        pixels, self._pixel_state = self._pixels(features, codes_DTHW)
        return pixels

    def peek_pixels(self, features: Tensor, codes_DTHW: np.ndarray) -> np.ndarray:
        """Pixels of predicted features: float32 [1, 3, F, h, w]. Needs the committed pixels of the frames before."""
        return self._pixels(features, codes_DTHW)[0]

    def _pixels(self, features: Tensor, codes_DTHW: np.ndarray) -> tuple[np.ndarray, State]:
        inputs = {"features": features, "codes": codes_DTHW[None]}
        return _run_part(self._engines, VAE_PIXELS, inputs, self._pixel_state, "pixels", fetch=True)
