"""Statistics of a LeRobot dataset: of every column, and of the pictures' channels in [0, 1].

Shapes are those that LeRobot expects: [D] for a vector of D numbers, [1] for a number, [3, 1, 1] for pictures.
Source: the format's documentation, huggingface.co/docs/lerobot/lerobot-dataset-v3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Stats = dict[str, Any]
"""Plain lists, ready for JSON and parquet: min, max, mean, std, count, q01, q10, q50, q90, q99."""

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_PICTURES, _PIXELS_A_SIDE = 8, 32  # of an episode: enough for a mean, and nothing to wait for


def column_stats(values: np.ndarray) -> Stats:
    """Statistics of [F] or [F, D] numbers over the rows."""
    rows = np.asarray(values, np.float64).reshape(len(values), -1)
    return _stats(rows) | {"count": [len(rows)]}


def picture_stats(frames_FHW3: np.ndarray) -> Stats:
    """Statistics of some pixels of some pictures, per channel."""
    chosen = frames_FHW3[:: max(1, -(-len(frames_FHW3) // _PICTURES))]
    strides = [max(1, side // _PIXELS_A_SIDE) for side in chosen.shape[1:3]]
    pixels = chosen[:, :: strides[0], :: strides[1]].reshape(-1, 3) / 255.0
    return {name: [[[v]] for v in value] for name, value in _stats(pixels).items()} | {"count": [len(chosen)]}


def merged_image_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of all pictures from those of the episodes; quantiles are their weighted means."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    stacked = {name: np.array([part[name] for part in parts]) for name in parts[0] if name != "count"}

    def mean(values: np.ndarray) -> np.ndarray:
        return np.average(values, axis=0, weights=counts)

    total = mean(stacked["mean"])
    spread = np.sqrt(mean(stacked["std"] ** 2 + (stacked["mean"] - total) ** 2))
    merged = {name: mean(stacked[name]) for name in _QUANTILES}
    merged |= {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "mean": total, "std": spread}
    return {name: value.tolist() for name, value in merged.items()} | {"count": [int(counts.sum())]}


def _stats(rows: np.ndarray) -> Stats:
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= dict(zip(_QUANTILES, np.quantile(rows, list(_QUANTILES.values()), axis=0), strict=True))
    return {name: value.tolist() for name, value in found.items()}
