"""Measure how long every profile takes on this machine, for choosing by deadline (`latency_model.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from worldvln_edge.generation_profile import GenerationProfile
from worldvln_edge.runtime.bench.bench_flight import synthetic_frames
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.worldvln.latency_model import LatencyModel, ProfileLatency, new_model, write_model
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, load_policy


def tune_bundle(
    bundle_folder: Path,
    *,
    backend: BackendName = "cpu",
    threads: int = 0,
    flights: int = 5,
    profiles: Mapping[str, GenerationProfile] | None = None,
    also: Sequence[Path] = (),
    on_flight: Callable[[], None] | None = None,
) -> tuple[LatencyModel, Path]:
    """Fly every profile and keep the times in the bundle.

    Profiles take turns, so that a machine that slows down slows them all.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        backend, threads: as it will be flown with.
        flights: per profile, after one that warms up.
        profiles: besides the built-in ones.
        also: other exports whose precision they name, see `load_policy`.
        on_flight: called after every flight.

    Returns:
        The model and its file.

    Raises:
        BundleError, ConfigError, EngineError: see `load_policy`.
    """
    policy = load_policy(bundle_folder, backend=backend, threads=threads, profiles=profiles, also=also)
    with closing(policy):
        times = _times(policy, flights, on_flight)
    measured = tuple(
        ProfileLatency(profile=profile, segment_s=tuple(float(s) for s in np.percentile(times[name], 95, axis=0)))
        for name, profile in policy.profiles.items()
    )
    model = new_model(policy.manifest, policy.backend.machine, threads, measured)
    return model, write_model(bundle_folder, model)


def _times(policy: WorldVLNPolicy, flights: int, on_flight: Callable[[], None] | None) -> dict[str, list[list[float]]]:
    """Seconds of every segment of every flight of a profile."""
    frames = synthetic_frames((480, 640), policy.config.horizon.points[-2], seed=0)
    times: dict[str, list[list[float]]] = {name: [] for name in policy.profiles}
    for flight in range(flights + 1):
        for name, profile in policy.profiles.items():
            segments = _fly(policy, frames, profile, seed=flight)
            if flight:
                times[name].append(segments)
            if on_flight is not None:
                on_flight()
    return times


def _fly(policy: WorldVLNPolicy, frames: list[np.ndarray], profile: GenerationProfile, *, seed: int) -> list[float]:
    session = policy.new_session("fly forward 5 m", seed=seed)
    session.profile = profile
    session.work_ahead()
    seconds, sent = [], 0
    for point in policy.config.horizon.points[:-1]:
        session.observe(frames[sent:point])
        sent = point
        seconds.append(session.last_segment_s)
        session.work_ahead()
    session.close()
    return seconds
