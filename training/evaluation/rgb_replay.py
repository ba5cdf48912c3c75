"""The RGB head on the frames of the expert's own flight: how well motion can be read where nothing must be predicted.

Teacher-forced: for every segment the head sees the true frames of that segment, the future included. No policy can fly
like that; the row says what is left of an error when the world model is taken out of it.
Legend: T frames (num_frames), N = T-1 actions.
Source: spec/training.md 8.6; spec/action_decoder.md 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from worldvln_edge.action_windows import context_frame, segment_actions, window_starts
from worldvln_edge.bundle import Bundle
from worldvln_edge.images import rgb_head_input
from worldvln_edge.runtime.engines.backends import open_engines
from worldvln_edge.runtime.engines.engine import Engine
from worldvln_edge.runtime.worldvln import graphs


def has_rgb_head(bundle: Path) -> bool:
    """Whether the bundle holds the graph. Raises BundleError where there is no bundle."""
    return graphs.RGB_HEAD in Bundle.open_manifest(bundle).graphs


class RgbReplay:
    """The RGB head of a bundle."""

    def __init__(self, bundle: Bundle, engine: Engine):
        self._manifest, self._engine = bundle.manifest, engine
        entry = bundle.manifest.graphs[graphs.RGB_HEAD]
        self._input = entry.inputs[0]

    def actions(self, frames_THW3: np.ndarray, points: Sequence[int]) -> np.ndarray:
        """Actions between all frames, segment by segment: float32 [N, 6], cm and deg.

        Args:
            frames_THW3: uint8 RGB, all of a flight.
            points: segment borders, 1-based.
        """
        head = self._manifest.model.action_decoder
        parts = []
        for observed, after in pairwise(points):
            # A segment that is shorter than a window looks further back, as it has to.
            first = min(context_frame(observed, head.left_context), max(1, after - head.rgb_head.window + 1))
            seen = list(frames_THW3[first - 1 : after])
            images = rgb_head_input(seen, head.rgb_head.image_hw, head.rgb_mean, head.rgb_std)
            logits = self._engine.run({self._input.name: images.astype(np.dtype(self._input.dtype))})["logits"]
            assert len(logits) == len(window_starts(len(seen), head.rgb_head.window))
            parts.append(
                segment_actions(
                    np.asarray(logits, np.float32),
                    self._manifest.rgb_head_stats,
                    observed_frames=observed,
                    next_observed_frames=after,
                    left_context=observed - first + 1,
                    window=head.rgb_head.window,
                )
            )
        return np.concatenate(parts)


@contextmanager
def open_rgb_replay(bundle: Path, *, threads: int = 1) -> Iterator[RgbReplay]:
    """Load the RGB head of a bundle on the CPU. Its files are not hashed again: the policy's bundle was checked.

    Raises:
        BundleError: no bundle.
        EngineError: the graph does not load.
        KeyError: the bundle has no RGB head, see `has_rgb_head`.
    """
    opened = Bundle(bundle, Bundle.open_manifest(bundle))
    engines, backend = open_engines(opened, (graphs.RGB_HEAD,), backend="cpu", threads=threads)
    with closing(backend):
        yield RgbReplay(opened, engines[graphs.RGB_HEAD])
