"""Held-out flights of an action head: whole flights, their segments, a control, and segments as they are in flight.

Source: spec/training.md 4.7, 8.4 (row `action`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from worldvln_edge.action_windows import LabelStats
from worldvln_edge.config import ModelConfig
from worldvln_edge.training.stages.flight_windows import segment_runs
from worldvln_edge.training.stages.motion_metrics import COLUMNS, column_errors, route_metrics


class MotionValidation:
    """Collects motions (rad, m) of held-out flights and reports on them.

    Args:
        config: says where segments begin.
        stats: of the training labels.
    """

    def __init__(self, config: ModelConfig, stats: LabelStats):
        self._config, self._stats = config, stats
        self._true: list[np.ndarray] = []
        self._found: list[np.ndarray] = []
        self._shuffled: list[tuple[np.ndarray, np.ndarray]] = []
        self._segments: list[tuple[np.ndarray, np.ndarray]] = []
        self._ahead: list[tuple[np.ndarray, np.ndarray]] = []

    def add(
        self,
        true_N6: np.ndarray,
        found_N6: np.ndarray,
        *,
        shuffled_N6: np.ndarray | None = None,
        ahead: Sequence[np.ndarray] | None = None,
    ) -> None:
        """One flight.

        Args:
            true_N6: labels.
            found_N6: what the head says of the true frames.
            shuffled_N6: what it says of a video of the same frames in the order of `shuffled_frames`.
            ahead: what it says of every whole segment [step, 6] from predicted frames.
        """
        self._true.append(true_N6)
        self._found.append(found_N6)
        if shuffled_N6 is not None:
            self._shuffled.append((shuffled_N6, true_N6))
        for index, run in enumerate(segment_runs(len(true_N6) + 1, self._config)):
            span = slice(run.observed, run.observed + self._config.horizon.step)
            self._segments.append((found_N6[span], true_N6[span]))
            if ahead is not None:
                self._ahead.append((ahead[index], true_N6[span]))

    def metrics(self) -> dict[str, float]:
        """All of `route_metrics`: without prefix over whole flights, `segment_` over segments of the same predictions.

        `predicted_` over segments from predicted frames, if there are any. `shuffled_` holds `nmse_*` only, of videos
        whose frames were put into a random order before any network saw them; nothing can be known there, so a number
        below 1 means that the head has learnt something else than motion. Empty without a flight.
        """
        if not self._true:
            return {}
        metrics = route_metrics(self._found, self._true, self._stats)
        if self._shuffled:
            control = column_errors(*zip(*self._shuffled, strict=True), self._stats)
            names = [f"nmse_{name}" for name in COLUMNS]
            metrics |= {f"shuffled_{name}": control[name] for name in names if name in control}
        for prefix, pairs in (("segment", self._segments), ("predicted", self._ahead)):
            if pairs:
                found, true = zip(*pairs, strict=True)
                metrics |= {f"{prefix}_{name}": v for name, v in route_metrics(found, true, self._stats).items()}
        return metrics
