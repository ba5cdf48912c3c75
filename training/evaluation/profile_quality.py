"""Generation profiles of a bundle: what each saves, what it changes, and what that costs in flights.

Speed and agreement are measured on held-out expert flights (`runtime/bench/profile_comparison.py`), success in
closed loop on held-out tasks, every profile with the same tasks and seeds.
Source: spec/world_model.md 9.5; spec/training.md 8.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tqdm import tqdm

from worldvln_edge.generation_profile import EXACT, GenerationProfile
from worldvln_edge.runtime.bench.profile_comparison import (
    ObservedFlight,
    ProfileAgreement,
    ProfileMeasurement,
    compare_profiles,
    flights_in_comparison,
)
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy
from worldvln_edge.tasks import Task
from worldvln_edge.training.demo import demo_tasks
from worldvln_edge.training.evaluation.closed_loop import SceneSimulators, flight_seed
from worldvln_edge.training.evaluation.evaluation import evaluate
from worldvln_edge.training.evaluation.flight_statistics import (
    Difference,
    EvalFlight,
    Outcome,
    Pairing,
    outcome,
    pairing,
    success_difference,
)
from worldvln_edge.training.evaluation.pilot_sources import BundlePilot
from worldvln_edge.training.evaluation.row_flights import POLICY
from worldvln_edge.training.sim.flights import fly_expert
from worldvln_edge.training.sim.tasks import generate_task

SPEED_GOALS = {"balanced": 2.0, "fast": 5.0}
"""How many times faster than `exact` a built-in profile is meant to be."""


@dataclass(frozen=True, kw_only=True)
class ProfileQualityConfig:
    flights: int = 12  # expert flights, for speed and agreement
    tasks: int = 108  # in closed loop; 0: none
    seed: int = 0  # of the draws; mixed with each task's own
    backend: BackendName = "cpu"
    threads: int = 0  # CPU threads per engine call; 0: all cores
    workers: int = 1  # processes that fly tasks


class ProfileClosedLoop(msgspec.Struct, frozen=True, kw_only=True):
    """How the tasks ended under one profile."""

    outcome: Outcome
    against_exact: Difference | None
    """Success minus that of `exact`; None for `exact` itself."""
    paired: Pairing | None
    """This profile (in the place of the policy) against `exact`."""


class ProfileQuality(msgspec.Struct, frozen=True, kw_only=True):
    measured: ProfileMeasurement
    speed_goal: float | None
    closed_loop: ProfileClosedLoop | None
    """None when no tasks were flown."""


class ProfileQualityReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge profiles` prints."""

    model: str
    precision: str
    backend: str
    """ONNX Runtime or TensorRT, as `PolicyInfo` has it."""
    device: str
    """The processor or GPU, as the system names it."""
    threads: int
    flights: int
    segments: int
    """Of all flights."""
    tasks: int
    seed: int
    profiles: tuple[ProfileQuality, ...]
    """`exact` first."""
    other_draws: ProfileAgreement
    """`exact` with other random draws, against `exact`."""


def measure_profiles(
    bundle_folder: Path,
    config: ProfileQualityConfig,
    *,
    profiles: Mapping[str, GenerationProfile] | None = None,
    also: Sequence[Path] = (),
    show_progress: bool = True,
) -> ProfileQualityReport:
    """Measure the built-in profiles and `profiles`.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        config: how much is flown.
        profiles: besides the built-in ones.
        also: other exports of the same checkpoint, for profiles that name their precision.
        show_progress: bars on stderr.

    Raises:
        BundleError, ConfigError, EngineError: see `load_policy`.
        FlightError, RenderingUnavailableError: see `evaluate`.
    """
    own = dict(profiles or {})
    policy = load_policy(bundle_folder, backend=config.backend, threads=config.threads, profiles=own, also=also)
    with closing(policy):
        info, machine, names = policy.info, policy.backend.machine, list(policy.profiles)
        shown, frames = demo_tasks(config.flights), info.horizon.points[-2]
        flights = observed_flights(shown, info.image_hw, frames, seed=config.seed, show_progress=show_progress)
        total = flights_in_comparison(len(names), len(flights))
        with tqdm(total=total, desc="compare", unit="flight", disable=not show_progress, smoothing=0.1) as bar:
            comparison = compare_profiles(policy, flights, on_flight=bar.update)
    tasks = [generate_task("test", index) for index in range(config.tasks)]
    flown: dict[str, tuple[EvalFlight, ...]] = {}
    for name in names if tasks else ():
        source = BundlePilot(
            folder=bundle_folder,
            backend=config.backend,
            threads=config.threads,
            profile=name,
            profiles=own,
            also=tuple(also),
        )
        evaluation = evaluate(
            tasks, source, seed=config.seed, workers=config.workers, show_progress=show_progress, label=name
        )
        flown[name] = evaluation.rows[POLICY]
    return ProfileQualityReport(
        model=info.name,
        precision=info.precision,
        backend=info.backend,
        device=machine,
        threads=config.threads,
        flights=len(flights),
        segments=len(flights) * info.horizon.segments,
        tasks=len(tasks),
        seed=config.seed,
        profiles=tuple(
            ProfileQuality(
                measured=measured,
                speed_goal=SPEED_GOALS.get(measured.profile.name),
                closed_loop=_closed_loop(flown, measured.profile.name) if flown else None,
            )
            for measured in comparison.profiles
        ),
        other_draws=comparison.other_draws,
    )


def observed_flights(
    tasks: Sequence[Task], image_hw: tuple[int, int], frames: int, *, seed: int, show_progress: bool = False
) -> list[ObservedFlight]:
    """What the camera sees when experts fly.

    Args:
        tasks: with reference paths.
        image_hw: rows and columns of a frame.
        frames: kept of every flight.
        seed: of the draws; mixed with each task's own.
        show_progress: a bar on stderr.

    Raises:
        FlightDataError: a task without a reference path.
        FlightError, RenderingUnavailableError: see `SceneSimulators`.
    """
    flights = []
    with SceneSimulators(image_hw) as simulators:
        for task in tqdm(tasks, desc="frames", unit="flight", disable=not show_progress):
            seen = fly_expert(task, simulator=simulators.for_task(task), seed=task.seed)
            flights.append(
                ObservedFlight(prompt=task.instruction, frames=list(seen.frames[:frames]), seed=flight_seed(task, seed))
            )
    return flights


def _closed_loop(flown: Mapping[str, Sequence[EvalFlight]], name: str) -> ProfileClosedLoop:
    is_exact = name == EXACT
    return ProfileClosedLoop(
        outcome=outcome(flown[name]),
        against_exact=None if is_exact else success_difference(flown[name], flown[EXACT]),
        paired=None if is_exact else pairing(flown[name], flown[EXACT]),
    )
