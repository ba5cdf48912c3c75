"""The exact schedule against the research server's, on the same machine, engines, frames and draws, in one run.

Episodes of both alternate, so that whatever else the machine does meets both alike. Work that the session does ahead,
between segments, counts as its own. Every episode of the session starts without a remembered instruction. Actions of
both must agree; where they do not, the worst episode is flown again, untimed, to see which bit differed first.
Source: spec/world_model.md 9.3.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from worldvln_edge.runtime.bench.bench_flight import BenchConfig, synthetic_frames
from worldvln_edge.runtime.bench.full_horizon import PREVIEW_GRAPHS, PREVIEWS, FullHorizonFlight
from worldvln_edge.runtime.bench.schedule_agreement import SegmentAgreement, compare_segments
from worldvln_edge.runtime.worldvln.text_cache import TextCache
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy

TOLERANCE = 1e-3
"""Largest difference of fp32 actions: cm and deg."""


class ScheduleTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the episodes of one schedule."""

    episode_ms: float
    """All segments, and work ahead."""
    waited_ms: float
    """All segments: what a drone waits for."""
    segments_ms: list[float]
    stages_ms: list[dict[str, float]]
    """Of every segment."""
    ahead_ms: list[float]
    """Behind every segment; zeros for the full horizon."""
    previews_ms: float
    """Per episode, of what is decoded to be looked at only; 0 for the exact schedule."""
    token_steps: int
    """Per episode and guidance row."""
    calls: int
    """Of the world model, per episode."""


class ComparisonReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge bench --against full-horizon` prints."""

    model: str
    precision: str
    backend: str
    device: str
    threads: int
    episodes: int
    exact: ScheduleTimes
    full_horizon: ScheduleTimes
    ratio: float
    """Episode over episode, end to end."""
    ratio_without_previews: float
    """The same, if the research server's previews had been switched off."""
    waited_ratio: float
    token_step_ratio: float
    largest_action_difference: float
    """Over all actions of all episodes, cm or deg."""
    tolerance: float | None
    """What the difference is held to; None below fp32, where rounding may flip bits."""

    agreement: list[SegmentAgreement]
    """Of the episode with the largest difference, if that is beyond the tolerance; else empty."""

    @property
    def agrees(self) -> bool:
        """Equal actions, or first differing bits whose draw lay on the border (schedule_agreement.py)."""
        if self.tolerance is None or self.largest_action_difference <= self.tolerance:
            return True
        is_explained = any(segment.differing_bits for segment in self.agreement)
        return is_explained and all(segment.is_rounding(self.tolerance) for segment in self.agreement)


@dataclass(kw_only=True)
class _Episode:
    segments_ms: list[float] = field(default_factory=list)
    ahead_ms: list[float] = field(default_factory=list)
    stages_ms: list[dict[str, float]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    token_steps: int = 0
    calls: int = 0


def compare_with_full_horizon(
    bundle_folder: Path,
    config: BenchConfig | None = None,
    *,
    episodes: int = 5,
    on_episode: Callable[[], None] = lambda: None,
) -> ComparisonReport:
    """Fly `episodes` episodes of each schedule, alternately; the seed grows by one every episode.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        config: frames, prompt, threads and first seed; its numbers of segments do not matter here.
        episodes: of each schedule.
        on_episode: called after every episode of either.

    Raises:
        BundleError: missing or corrupt bundle.
        EngineError: a graph does not load here.
        NonFiniteActionsError: the model gave NaN.
        ValueError: no episodes.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, found {episodes}")
    config = config or BenchConfig()
    policy = load_policy(bundle_folder, backend=config.backend, threads=config.threads, side_graphs=PREVIEW_GRAPHS)
    frames = synthetic_frames(config.frame_hw, policy.info.horizon.points[-2], config.seed)
    frames = [policy.fit_frame(frame) for frame in frames]  # as a server's decoding threads do
    # Engines allocate in their first calls, which no episode should pay for.
    policy.new_session(config.prompt, seed=config.seed).observe(frames[:1])
    exact, full = [], []
    for seed in range(config.seed, config.seed + episodes):
        full.append(_fly_full_horizon(policy, frames, config.prompt, seed))
        on_episode()
        exact.append(_fly_exact(policy, frames, config.prompt, seed))
        on_episode()
    ours, theirs, info = _times(exact), _times(full), policy.info
    differences = [
        float(np.abs(np.concatenate(a.actions) - np.concatenate(b.actions)).max())
        for a, b in zip(exact, full, strict=True)
    ]
    largest = max(differences)
    tolerance = TOLERANCE if info.precision == "fp32" else None
    agreement = []
    if tolerance is not None and largest > tolerance:
        agreement = compare_segments(policy, frames, config.prompt, config.seed + differences.index(largest))
    return ComparisonReport(
        model=info.name,
        precision=info.precision,
        backend=info.backend,
        device=info.device,
        threads=config.threads,
        episodes=episodes,
        exact=ours,
        full_horizon=theirs,
        ratio=theirs.episode_ms / ours.episode_ms,
        ratio_without_previews=(theirs.episode_ms - theirs.previews_ms) / ours.episode_ms,
        waited_ratio=theirs.waited_ms / ours.waited_ms,
        token_step_ratio=theirs.token_steps / ours.token_steps,
        largest_action_difference=largest,
        tolerance=tolerance,
        agreement=agreement,
    )


def _fly_exact(policy: WorldVLNPolicy, frames: list[np.ndarray], prompt: str, seed: int) -> _Episode:
    policy.texts = TextCache()
    session = policy.new_session(prompt, seed=seed)
    episode = _fly(policy, session.observe, session.work_ahead, frames)
    episode.token_steps = session.counters["token_steps"]
    episode.calls = session.counters["world_model_calls"]
    session.close()
    return episode


def _fly_full_horizon(policy: WorldVLNPolicy, frames: list[np.ndarray], prompt: str, seed: int) -> _Episode:
    flight = FullHorizonFlight(policy, prompt, seed=seed)
    episode = _fly(policy, flight.observe, None, frames)
    episode.token_steps, episode.calls = flight.token_steps, flight.calls
    return episode


def _fly(
    policy: WorldVLNPolicy, observe: Callable, work_ahead: Callable[[], object] | None, frames: list[np.ndarray]
) -> _Episode:
    episode, observed = _Episode(), 0
    for point in policy.info.horizon.points[:-1]:
        start = time.perf_counter()
        chunk = observe(frames[observed:point])
        end = time.perf_counter()
        if work_ahead is not None:
            work_ahead()
        episode.segments_ms.append((end - start) * 1e3)
        episode.ahead_ms.append((time.perf_counter() - end) * 1e3 if work_ahead is not None else 0.0)
        episode.stages_ms.append(dict(chunk.timings_ms))
        episode.actions.append(chunk.actions)
        observed = point
    return episode


def _times(episodes: list[_Episode]) -> ScheduleTimes:
    segments, ahead = np.array([e.segments_ms for e in episodes]), np.array([e.ahead_ms for e in episodes])
    stages = [
        {
            stage: float(np.median([episode.stages_ms[s].get(stage, 0.0) for episode in episodes]))
            for stage in episodes[0].stages_ms[s]
        }
        for s in range(segments.shape[1])
    ]
    return ScheduleTimes(
        episode_ms=float(np.median((segments + ahead).sum(1))),
        waited_ms=float(np.median(segments.sum(1))),
        segments_ms=np.median(segments, axis=0).tolist(),
        stages_ms=stages,
        ahead_ms=np.median(ahead, axis=0).tolist(),
        previews_ms=float(np.median([sum(s.get(PREVIEWS, 0.0) for s in e.stages_ms) for e in episodes])),
        token_steps=episodes[0].token_steps,
        calls=episodes[0].calls,
    )
