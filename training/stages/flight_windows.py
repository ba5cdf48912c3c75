"""Which frames of a flight a head sees together: true ones, or true ones with predicted ones behind them.

In flight the windows of a segment look at up to `left_context` observed frames and at predicted ones of one segment
behind them. Training shows the head the same runs, beside runs of true frames only.

Legend: F frames of a flight, C channels, h w rows and columns; frame indices are 0-based.
Source: spec/training.md 4.2, 4.6, 8.6; spec/action_decoder.md 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worldvln_edge.action_windows import context_frame
from worldvln_edge.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class FrameRun:
    """Consecutive frames of one flight that windows slide over."""

    first: int
    count: int
    observed: int
    """The last frame that is true; those behind it are predicted."""

    @property
    def frames(self) -> Tensor:
        return torch.arange(self.first, self.first + self.count)

    @property
    def has_predictions(self) -> bool:
        return self.first + self.count - 1 > self.observed

    def cut(self, start: int, count: int) -> FrameRun:
        """`count` frames of the run, from its frame `start` on."""
        return FrameRun(first=self.first + start, count=count, observed=self.observed)


def whole_run(frames: int) -> FrameRun:
    """All frames of a flight, true."""
    return FrameRun(first=0, count=frames, observed=frames - 1)


def segment_runs(frames: int, config: ModelConfig) -> list[FrameRun]:
    """What the windows of every whole segment of a flight look at; none where a flight is shorter than a segment."""
    step, left = config.horizon.step, config.action_decoder.left_context
    runs = []
    for observed in range(0, frames - step, step):
        first = context_frame(observed + 1, left) - 1
        runs.append(FrameRun(first=first, count=observed + step - first + 1, observed=observed))
    return runs


def draw_windows(
    frames: int, config: ModelConfig, *, window: int, count: int, predicted_share: float, generator: torch.Generator
) -> list[FrameRun]:
    """`count` windows of a flight, each of `window` frames.

    Args:
        frames: F, at least `window`.
        predicted_share: probability that a window comes from a segment, rather than from true frames alone. Of a
            flight without a whole segment all windows are true.
    """
    segments, windows = segment_runs(frames, config), []
    draws = torch.rand(count, 3, generator=generator, dtype=torch.float64).tolist()
    for kind, which, where in draws:
        run = whole_run(frames)
        if segments and kind < predicted_share:
            run = segments[int(which * len(segments))]
        windows.append(run.cut(int(where * (run.count - window + 1)), window))
    return windows


def gather_run(true_CFhw: Tensor, predicted_CFhw: Tensor | None, run: FrameRun) -> Tensor:
    """The frames of a run: [C, count, h, w].

    Args:
        true_CFhw: of frames 0..F-1.
        predicted_CFhw: of frames 1..F-1; needed where the run has predictions.
    """
    true_frames = max(0, min(run.count, run.observed - run.first + 1))
    parts = [true_CFhw[:, run.first : run.first + true_frames]]
    if run.has_predictions:
        assert predicted_CFhw is not None
        start = run.first + true_frames - 1
        parts.append(predicted_CFhw[:, start : start + run.count - true_frames])
    return torch.cat(parts, 1)
