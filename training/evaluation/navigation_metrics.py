"""Navigation metrics of one flight, exactly as the field defines them.

    NE     distance of the last position to the goal
    SR     1 if the agent stopped nearer than the radius, else 0
    OSR    1 if any position was nearer than the radius
    ONE    least distance of any position
    PL     length of the flown path
    SPL    SR * l / max(l, PL), l the distance from start to goal; SR where both are 0
    nDTW   exp(-DTW / (rows of the reference * radius)), repeated positions removed
    sDTW   SR * nDTW

Distances are straight lines unless the caller knows the geodesic ones. A position that is not finite makes a flight
invalid: it failed (SR, OSR, SPL, nDTW and sDTW are 0) and has no NE.
Legend: T positions of a flight, G positions of the reference, 3 coordinates in m.
Source: spec/seed_systems.md 2.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

RADIUS_M = 3.0

Dtw = Literal["exact", "fast"]
"""`fast`: fastdtw with radius 1, an upper bound, for parity with published numbers."""

_FAST_RADIUS = 1
_Window = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class NavigationMetrics:
    """One flight; distances in m. `math.inf` stands for an error that is not known (`is_valid` is False)."""

    success: float
    oracle_success: float
    navigation_error_m: float
    oracle_error_m: float
    spl: float
    path_length_m: float
    ndtw: float
    sdtw: float
    steps: int
    """Actions, the stop included."""
    is_valid: bool


@dataclass(frozen=True, kw_only=True)
class NavigationMeans:
    """Means over flights; those of errors and lengths over the valid flights alone (NaN where there is none)."""

    flights: int
    n_invalid: int
    success: float
    oracle_success: float
    navigation_error_m: float
    oracle_error_m: float
    spl: float
    path_length_m: float
    ndtw: float
    sdtw: float
    steps: float


def navigation_metrics(
    positions_T3: np.ndarray,
    reference_G3: np.ndarray,
    goal_3: np.ndarray,
    *,
    has_stopped: bool = True,
    radius_m: float = RADIUS_M,
    goal_distances_T: np.ndarray | None = None,
    succeeded: bool | None = None,
    dtw: Dtw = "exact",
) -> NavigationMetrics:
    """Score one flight.

    Args:
        positions_T3: where the agent was, the start first; at least one row.
        reference_G3: positions of the reference path; at least one row.
        goal_3: the goal.
        has_stopped: whether the agent said that it was done; running out of steps is failure.
        radius_m: of success, and the scale of nDTW.
        goal_distances_T: geodesic distance of every position to the goal; None: straight lines.
        succeeded: another rule's verdict (with a heading, without collision) in the place of SR.
        dtw: exact, or fast for parity.

    Raises:
        ValueError: no positions, no reference, a wrong shape, or a radius that is not above 0.
    """
    positions, reference = _rows(positions_T3, "positions"), _rows(reference_G3, "reference")
    goal = np.asarray(goal_3, np.float64)
    if goal.shape != (3,):
        raise ValueError(f"the goal must be 3 numbers in m, found an array {list(goal.shape)}")
    if not (math.isfinite(radius_m) and radius_m > 0):
        raise ValueError(f"the radius must be a finite number of m above 0, found {radius_m}")
    if not np.isfinite(reference).all():
        raise ValueError("the reference path holds positions that are not finite")
    if goal_distances_T is None:
        distances = np.linalg.norm(positions - goal, axis=1)
    else:
        distances = np.asarray(goal_distances_T, np.float64)
        if distances.shape != (len(positions),):
            raise ValueError(f"expected {len(positions)} goal distances, found an array {list(distances.shape)}")
    steps = len(positions) - 1 + int(has_stopped)
    if not (np.isfinite(positions).all() and np.isfinite(distances).all()):
        return _invalid(steps)
    nearest, last = float(distances.min()), float(distances[-1])
    success = float(has_stopped and last < radius_m) if succeeded is None else float(succeeded)
    length = path_length(positions)
    shortest = float(distances[0])
    longest = max(shortest, length)
    similarity = ndtw(positions, reference, radius_m=radius_m, dtw=dtw)
    return NavigationMetrics(
        success=success,
        oracle_success=float(nearest < radius_m),
        navigation_error_m=last,
        oracle_error_m=nearest,
        spl=success * (shortest / longest if longest > 0 else 1.0),
        path_length_m=length,
        ndtw=similarity,
        sdtw=success * similarity,
        steps=steps,
        is_valid=True,
    )


def navigation_means(flights: Sequence[NavigationMetrics]) -> NavigationMeans:
    """Plain means. An invalid flight counts as a failure and is left out of errors and lengths.

    Raises:
        ValueError: no flights.
    """
    if not flights:
        raise ValueError("no flights to average")
    valid = [asdict(flight) for flight in flights if flight.is_valid]

    def of_valid(name: str) -> float:
        return float(np.mean([row[name] for row in valid])) if valid else math.nan

    def of_all(name: str) -> float:
        return float(np.mean([getattr(flight, name) for flight in flights]))

    shares = ("success", "oracle_success", "spl", "ndtw", "sdtw")
    lengths = ("navigation_error_m", "oracle_error_m", "path_length_m")
    return NavigationMeans(
        flights=len(flights),
        n_invalid=len(flights) - len(valid),
        steps=of_all("steps"),
        **{name: of_all(name) for name in shares},
        **{name: of_valid(name) for name in lengths},
    )


def path_length(positions_T3: np.ndarray) -> float:
    """Sum of the straight lines between neighbours, m."""
    return float(np.linalg.norm(np.diff(np.asarray(positions_T3, np.float64), axis=0), axis=1).sum())


def ndtw(
    positions_T3: np.ndarray, reference_G3: np.ndarray, *, radius_m: float = RADIUS_M, dtw: Dtw = "exact"
) -> float:
    """Likeness of a path to a reference, 0 to 1; positions that repeat the one before are left out."""
    positions, reference = _rows(positions_T3, "positions"), _rows(reference_G3, "reference")
    has_moved = np.ones(len(positions), bool)
    has_moved[1:] = (np.diff(positions, axis=0) != 0).any(1)
    distance = (fast_dtw if dtw == "fast" else dtw_distance)(positions[has_moved], reference)
    return math.exp(-distance / (len(reference) * radius_m))


def dtw_distance(path_T3: np.ndarray, reference_G3: np.ndarray) -> float:
    """Dynamic time warping with Euclidean cost: the least sum of costs of any monotonous matching of all rows.

    Raises:
        ValueError: no rows, or a wrong shape.
    """
    cost = _costs(_rows(path_T3, "path"), _rows(reference_G3, "reference"))
    total = np.cumsum(cost[0])
    for row in cost[1:]:
        # least[j] = min(total[j], total[j-1]) is known beforehand; what is left is a recurrence along the row.
        least = np.minimum(total, np.concatenate([[np.inf], total[:-1]]))
        total = np.empty_like(row)
        best = np.inf
        for j, (here, step) in enumerate(zip(row.tolist(), least.tolist(), strict=True)):
            best = here + (best if best < step else step)
            total[j] = best
    return float(total[-1])


def fast_dtw(path_T3: np.ndarray, reference_G3: np.ndarray) -> float:
    """The published approximation (fastdtw, radius 1): an upper bound of `dtw_distance`.

    Both paths are halved until they are short, matched exactly, and the match is refined in a band around it.
    Ties are broken as there: first a step along the path, then along the reference, then along both.
    """
    return _fast(_rows(path_T3, "path"), _rows(reference_G3, "reference"), _FAST_RADIUS)[0]


def _fast(path: np.ndarray, reference: np.ndarray, radius: int) -> tuple[float, _Window]:
    if min(len(path), len(reference)) < radius + 2:
        return _windowed(path, reference, [(0, len(reference))] * len(path))
    _, coarse = _fast(_halved(path), _halved(reference), radius)
    return _windowed(path, reference, _band(coarse, len(path), len(reference), radius))


def _halved(rows: np.ndarray) -> np.ndarray:
    """Means of neighbours; the last of an odd number is dropped."""
    even = len(rows) // 2 * 2
    return (rows[0:even:2] + rows[1:even:2]) / 2


def _band(coarse: _Window, rows: int, columns: int, radius: int) -> list[tuple[int, int]]:
    """Columns from..to of every row that lie within `radius` coarse cells of a match, in one run."""
    near = {(i + a, j + b) for i, j in coarse for a in range(-radius, radius + 1) for b in range(-radius, radius + 1)}
    fine = {(2 * i + a, 2 * j + b) for i, j in near for a in (0, 1) for b in (0, 1)}
    band, start = [], 0
    for i in range(rows):
        inside = [j for j in range(start, columns) if (i, j) in fine]
        if not inside:
            band.append((start, start))
            continue
        start, stop = inside[0], inside[0]
        while stop < columns and (i, stop) in fine:
            stop += 1
        band.append((start, stop))
    return band


def _windowed(path: np.ndarray, reference: np.ndarray, band: list[tuple[int, int]]) -> tuple[float, _Window]:
    cost = _costs(path, reference)
    total: dict[tuple[int, int], float] = {(-1, -1): 0.0}
    came_from: dict[tuple[int, int], tuple[int, int]] = {}
    for i, (start, stop) in enumerate(band):
        for j in range(start, stop):
            before = min(((i - 1, j), (i, j - 1), (i - 1, j - 1)), key=lambda cell: total.get(cell, np.inf))
            total[i, j], came_from[i, j] = float(cost[i, j]) + total.get(before, np.inf), before
    end = (len(path) - 1, len(reference) - 1)
    matched, cell = [], end
    while cell != (-1, -1):
        matched.append(cell)
        cell = came_from[cell]
    return total[end], matched[::-1]


def _costs(path: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.linalg.norm(path[:, None] - reference[None], axis=2)


def _rows(array: np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(array, np.float64)
    if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
        raise ValueError(f"{what} must be at least one row of 3 numbers in m, found an array {list(rows.shape)}")
    return rows


def _invalid(steps: int) -> NavigationMetrics:
    return NavigationMetrics(
        success=0.0,
        oracle_success=0.0,
        navigation_error_m=math.inf,
        oracle_error_m=math.inf,
        spl=0.0,
        path_length_m=math.inf,
        ndtw=0.0,
        sdtw=0.0,
        steps=steps,
        is_valid=False,
    )
