"""How long a segment takes here: one bundle, flown in process on synthetic frames, stage by stage.

What is timed is `PolicySession.observe` alone: camera, JPEG and network are not in it. A flight's first segment also
encodes the instruction; later ones also encode the frames that were flown since the segment before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from worldvln_edge.runtime.policy import Policy
from worldvln_edge.runtime.worldvln_policy import load_policy

_STATUS_FILE = Path("/proc/self/status")
_TEXTURE_STEP_PX = 3  # how far the picture moves from frame to frame, right and down


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    segments: int = 12  # timed
    warm_up_segments: int = 3  # flown before, not timed: they allocate memory and fill caches
    frame_hw: tuple[int, int] = (480, 640)  # of the camera, before the policy scales it
    prompt: str = "move forward 5 meters"
    threads: int = 0  # CPU threads per engine call; 0: all cores
    seed: int = 0

    def __post_init__(self) -> None:
        if self.segments < 1 or self.warm_up_segments < 0:
            raise ValueError("segments must be at least 1, and warm_up_segments at least 0")
        if not 1 <= min(self.frame_hw) <= max(self.frame_hw) <= 8192:
            raise ValueError(f"frame_hw must be (rows, columns) of 1..8192 pixels, found {self.frame_hw}")


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of what was timed `runs` times."""

    runs: int
    p50_ms: float
    p95_ms: float


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge bench` prints."""

    model: str
    precision: str
    backend: str
    device: str
    threads: int
    bundle_bytes: int
    load_s: float
    """Hash every file, and load all graphs of a flight."""
    actions_per_segment: int
    segment: Quantiles
    """One `observe` call, from its frames to its actions."""
    stages: dict[str, Quantiles]
    """Parts of it, in the order in which they first ran; a stage that a segment skipped is not counted for it."""
    rss_bytes: int | None
    """Resident memory after the last segment; None where the system does not tell."""
    peak_rss_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class _Timing:
    segment_ms: float
    stages_ms: dict[str, float]


def bench_bundle(
    bundle_folder: Path, config: BenchConfig | None = None, *, on_segment: Callable[[], None] | None = None
) -> BenchReport:
    """Load a bundle and fly it.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        on_segment: called after every segment, the warm-up included.

    Raises:
        BundleError: missing or corrupt bundle.
        EngineError: a graph does not load here.
        NonFiniteActionsError: the model gave NaN.
    """
    config = config or BenchConfig()
    start = time.perf_counter()
    policy = load_policy(bundle_folder, threads=config.threads)
    load_s = time.perf_counter() - start
    timings = []
    for index, timing in enumerate(fly_segments(policy, config)):
        if index >= config.warm_up_segments:
            timings.append(timing)
        if on_segment is not None:
            on_segment()
    stages = dict.fromkeys(stage for timing in timings for stage in timing.stages_ms)
    info = policy.info
    return BenchReport(
        model=info.name,
        precision=info.precision,
        backend=info.backend,
        device=info.device,
        threads=config.threads,
        bundle_bytes=sum(entry.size_bytes for entry in policy.manifest.files.values()),
        load_s=load_s,
        actions_per_segment=info.horizon.step,
        segment=_quantiles([timing.segment_ms for timing in timings]),
        stages={
            stage: _quantiles([timing.stages_ms[stage] for timing in timings if stage in timing.stages_ms])
            for stage in stages
        },
        rss_bytes=_resident_bytes("VmRSS"),
        peak_rss_bytes=_resident_bytes("VmHWM"),
    )


def fly_segments(policy: Policy, config: BenchConfig) -> Iterator[_Timing]:
    """Fly whole trajectories one after the other until warm-up and timed segments are done."""
    points = policy.info.horizon.points
    frames = synthetic_frames(config.frame_hw, points[-2], config.seed)
    left = config.warm_up_segments + config.segments
    while left:
        session = policy.new_session(config.prompt, seed=config.seed)
        observed = 0
        for point in points[:-1][:left]:  # segment s is ready when frame points[s] is there
            start = time.perf_counter()
            chunk = session.observe(frames[observed:point])
            spent_ms = (time.perf_counter() - start) * 1e3
            if chunk is None:
                raise RuntimeError(f"no actions at frame {point}, although a segment starts there")
            observed = point
            left -= 1
            yield _Timing(segment_ms=spent_ms, stages_ms=chunk.timings_ms)
        session.close()


def synthetic_frames(frame_hw: tuple[int, int], count: int, seed: int) -> list[np.ndarray]:
    """A random picture that moves a little from frame to frame: `count` arrays, uint8 RGB [H, W, 3]."""
    picture = np.random.default_rng(seed).integers(0, 256, (*frame_hw, 3), dtype=np.uint8)
    shifts = range(0, count * _TEXTURE_STEP_PX, _TEXTURE_STEP_PX)
    return [np.roll(picture, (shift, shift), axis=(0, 1)) for shift in shifts]


def _quantiles(values_ms: list[float]) -> Quantiles:
    p50, p95 = np.percentile(values_ms, [50, 95])
    return Quantiles(runs=len(values_ms), p50_ms=float(p50), p95_ms=float(p95))


def _resident_bytes(field: str) -> int | None:
    if not _STATUS_FILE.is_file():
        return None  # not Linux
    for line in _STATUS_FILE.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
