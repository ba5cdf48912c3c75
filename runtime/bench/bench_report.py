"""What a benchmark reports, as JSON and as the source of its tables.

Source: spec/world_model.md 9.3 (token-steps and calls).
"""

from __future__ import annotations

import msgspec
import numpy as np

from worldvln_edge.runtime.bench.machine_peak import MachinePeak


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of what was timed `runs` times."""

    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, not how long it took: the median over the runs of a segment."""

    token_steps: int
    """Tokens per guidance row through the world model (spec/world_model.md 9.3)."""
    world_model_calls: int
    frames_encoded: int
    latents_decoded: int
    io_bytes: int
    """Arrays given to engines and outputs brought to the host (see engine_meter.py)."""
    kv_copied_bytes: int
    """Keys and values copied into and out of the cache's buffers."""


class SegmentReport(msgspec.Struct, frozen=True, kw_only=True):
    """One segment of a flight, over all flights."""

    segment: int
    """0: the first one."""
    total: Quantiles
    """One `observe` call, from its frames to its actions."""
    host: Quantiles
    """The part of it outside engine calls."""
    ahead: Quantiles
    """`work_ahead` behind it, which nobody waits for."""
    work: Work
    work_ahead: Work


class StepRate(msgspec.Struct, frozen=True, kw_only=True):
    """`world_model_step` at one scale."""

    scale_hw: tuple[int, int]
    tokens: int
    calls: int
    call_p50_ms: float
    flops: float
    """FLOP per second over all calls, counted by world_model_flops.py."""
    peak_share: float
    """Of the measured matrix product's."""


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge bench` prints."""

    model: str
    precision: str
    backend: str
    device: str
    threads: int
    bundle_bytes: int
    weight_bytes: int
    """Files of the bundle that hold weights: all but tokenizer and engines."""
    load_s: float
    """Hash every file, and load all graphs of a flight."""
    actions_per_segment: int
    fit_ms: Quantiles
    """One camera frame to the model's size, on a decoding thread; not part of a segment."""
    segment: Quantiles
    """One `observe` call, from its frames to its actions, over all segments."""
    host: Quantiles
    """The part of it outside engine calls."""
    stages: dict[str, Quantiles]
    """Parts of it, in the order in which they first ran; a stage that a segment skipped is not counted for it."""
    segments: list[SegmentReport]
    stages_by_segment: list[dict[str, float]]
    """Median milliseconds of every stage, for each entry of `segments`."""
    steps: list[StepRate]
    step_flops: float
    """FLOP per second of all `world_model_step` calls."""
    step_peak_share: float
    peak: MachinePeak
    kv_bytes: int
    """Largest keys and values that the flight held between its calls."""
    kv_workspace_bytes: int
    """The cache's buffers, which all sessions share."""
    rss_bytes: int | None
    """Resident memory after the last segment; None where the system does not tell."""
    peak_rss_bytes: int | None
    energy_j_per_segment: float | None
    """Work ahead included; None where the board does not tell."""
    energy_source: str | None


def quantiles(values_ms: list[float]) -> Quantiles:
    """Raises ValueError for an empty list."""
    if not values_ms:
        raise ValueError("quantiles of nothing")
    p50, p95, p99 = np.percentile(values_ms, [50, 95, 99])
    return Quantiles(runs=len(values_ms), p50_ms=float(p50), p95_ms=float(p95), p99_ms=float(p99))
