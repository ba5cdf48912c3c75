"""Flights for benchmarks: whole trajectories on synthetic frames, every segment timed and its work counted.

What is timed is `PolicySession.observe` alone: camera, JPEG, network, and fitting frames to the model's size, which a
server does on its decoding threads, are not in it. What a server does while the actions are flown (`work_ahead`) is
done here too, after every segment, and timed apart. Every flight has a new instruction as far as caches go: its first
segment encodes the text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.engines.engine_meter import EngineMeter, Readings
from worldvln_edge.runtime.worldvln.text_cache import TextCache
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy

_TEXTURE_STEP_PX = 3  # how far the picture moves from frame to frame, right and down


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    segments: int = 12  # timed
    warm_up_segments: int = 3  # flown before, not timed: they allocate memory and fill caches
    frame_hw: tuple[int, int] = (480, 640)  # of the camera, before the policy scales it
    prompt: str = "move forward 5 meters"
    backend: BackendName = "cpu"  # what runs the graphs
    threads: int = 0  # CPU threads per engine call; 0: all cores
    seed: int = 0
    peak_seconds: float = 1.0  # to spend on the machine's best product, and on its best copy

    def __post_init__(self) -> None:
        if self.segments < 1 or self.warm_up_segments < 0:
            raise ValueError("segments must be at least 1, and warm_up_segments at least 0")
        if not 1 <= min(self.frame_hw) <= max(self.frame_hw) <= 8192:
            raise ValueError(f"frame_hw must be (rows, columns) of 1..8192 pixels, found {self.frame_hw}")


@dataclass(frozen=True, kw_only=True)
class SegmentTiming:
    """One segment as it was flown."""

    segment: int
    total_ms: float
    ahead_ms: float
    stages_ms: dict[str, float]
    readings: Readings
    ahead_readings: Readings
    counted: dict[str, int]
    ahead_counted: dict[str, int]
    kv_bytes: int

    @property
    def host_ms(self) -> float:
        return self.total_ms - self.readings.engine_ms


def fly_segments(policy: WorldVLNPolicy, config: BenchConfig) -> Iterator[SegmentTiming]:
    """Fly whole trajectories one after the other until warm-up and timed segments are done."""
    meter = EngineMeter.around(policy)
    points = policy.info.horizon.points
    frames = [policy.fit_frame(frame) for frame in synthetic_frames(config.frame_hw, points[-2], config.seed)]
    left = config.warm_up_segments + config.segments
    while left:
        policy.texts = TextCache()
        session = policy.new_session(config.prompt, seed=config.seed)
        observed = 0
        for segment, point in enumerate(points[:-1][:left]):  # segment s is ready when frame points[s] is there
            counters, _ = session.counters, meter.take()
            start = time.perf_counter()
            chunk = session.observe(frames[observed:point])
            end = time.perf_counter()
            if chunk is None:
                raise RuntimeError(f"no actions at frame {point}, although a segment starts there")
            readings, counted = meter.take(), session.counters
            kv_bytes = session.kv_bytes
            start_ahead = time.perf_counter()
            session.work_ahead()
            end_ahead = time.perf_counter()
            yield SegmentTiming(
                segment=segment,
                total_ms=(end - start) * 1e3,
                ahead_ms=(end_ahead - start_ahead) * 1e3,
                stages_ms=chunk.timings_ms,
                readings=readings,
                ahead_readings=meter.take(),
                counted=_difference(counted, counters),
                ahead_counted=_difference(session.counters, counted),
                kv_bytes=max(kv_bytes, session.kv_bytes),
            )
            observed = point
            left -= 1
        session.close()


def synthetic_frames(frame_hw: tuple[int, int], count: int, seed: int) -> list[np.ndarray]:
    """A random picture that moves a little from frame to frame: `count` arrays, uint8 RGB [H, W, 3]."""
    picture = np.random.default_rng(seed).integers(0, 256, (*frame_hw, 3), dtype=np.uint8)
    shifts = range(0, count * _TEXTURE_STEP_PX, _TEXTURE_STEP_PX)
    return [np.roll(picture, (shift, shift), axis=(0, 1)) for shift in shifts]


def _difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: value - before[name] for name, value in after.items()}
