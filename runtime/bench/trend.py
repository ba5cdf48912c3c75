"""Does a noisy series grow? A median of slopes that outliers do not move, with an interval that no distribution is
assumed for.

Source: Theil (1950), Sen (1968): the slope is the median over all pairs; its interval follows from the variance of
Kendall's tau.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FEWEST_POINTS = 5
"""With fewer, no slope is significant at 99 %."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Change per step of the series."""

    slope: float
    low: float
    high: float
    """Interval of the slope."""


def theil_sen(values: Sequence[float], *, confidence: float = 0.99) -> Trend:
    """Trend of values at equal distances.

    Args:
        values: at least FEWEST_POINTS.
        confidence: of the two-sided interval, 0..1.

    Raises:
        ValueError: too few values.
    """
    count = len(values)
    if count < FEWEST_POINTS:
        raise ValueError(f"a trend needs at least {FEWEST_POINTS} values, found {count}")
    first, second = np.triu_indices(count, 1)
    series = np.asarray(values, np.float64)
    slopes = np.sort((series[second] - series[first]) / (second - first))
    variance = count * (count - 1) * (2 * count + 5) / 18
    spread = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    low = max(0, math.floor((len(slopes) - spread) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))
    return Trend(slope=float(np.median(slopes)), low=float(slopes[low]), high=float(slopes[high]))
