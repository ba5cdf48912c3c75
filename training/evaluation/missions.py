"""Fly missions of several instructions with a policy, and the expert's actions beside it.

Source: spec/training.md 8.6; spec/session_protocol.md 2.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import msgspec

from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.sessions.policy import Policy
from worldvln_edge.runtime.worldvln.worldvln_policy import load_policy
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.closed_loop import FlightError, ReplayPilot, expert_actions
from worldvln_edge.training.evaluation.evaluation import POLICY, evaluate
from worldvln_edge.training.evaluation.flight_statistics import (
    Difference,
    EvalFlight,
    Outcome,
    outcome,
    success_difference,
)
from worldvln_edge.training.evaluation.mission_pilot import MissionPilot
from worldvln_edge.training.evaluation.mission_tasks import generate_mission
from worldvln_edge.training.sim.expert import EXPERT_STEPS


class MissionFlights(msgspec.Struct, frozen=True, kw_only=True):
    """The policy's flights of one number of legs."""

    outcome: Outcome
    settled_legs: int
    """Instructions at whose end, or before, the drone had settled."""
    mean_seconds: float
    """Until the last instruction ended, at the model's frame rate."""


class MissionResult(msgspec.Struct, frozen=True, kw_only=True):
    legs: int
    seconds: float
    """That the instructions have together, at the model's frame rate."""
    policy: MissionFlights
    """Every instruction has its whole time."""
    until_settled: MissionFlights | None
    """An instruction ends when the drone has settled; None: not flown."""
    settled_gain: Difference | None
    """Success of `until_settled` minus that of `policy`."""
    expert: Outcome


class MissionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge missions` prints."""

    model: str
    precision: str
    missions: int
    seed: int
    results: tuple[MissionResult, ...]


def measure_missions(
    bundle_folder: Path,
    *,
    legs: Sequence[int] = (1, 2, 3),
    missions: int = 48,
    seed: int = 0,
    backend: BackendName = "cpu",
    threads: int = 0,
    with_settled: bool = True,
    show_progress: bool = True,
) -> MissionReport:
    """Fly missions of every number of legs, and the expert's actions beside them.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        legs: each at least 1.
        missions: of each number of legs.
        seed: of the draws; mixed with each mission's own.
        backend, threads: see `load_policy`.
        with_settled: fly them once more, with instructions that end when the drone has settled.
        show_progress: bars on stderr.

    Raises:
        BundleError, EngineError: see `load_policy`.
        FlightError: the model's horizon is not a leg; and see `evaluate`.
        RenderingUnavailableError: see `evaluate`.
        ValueError: a number of legs below 1.
    """
    policy = load_policy(bundle_folder, backend=backend, threads=threads)
    with closing(policy):
        return fly_missions(
            policy, legs=legs, missions=missions, seed=seed, with_settled=with_settled, show_progress=show_progress
        )


def fly_missions(
    policy: Policy,
    *,
    legs: Sequence[int],
    missions: int,
    seed: int = 0,
    with_settled: bool = True,
    show_progress: bool = True,
) -> MissionReport:
    """As `measure_missions`, with a policy that is loaded."""
    horizon = policy.info.horizon
    if horizon.num_frames - 1 != EXPERT_STEPS:
        raise FlightError(
            f"a leg of a mission has {EXPERT_STEPS} actions, {policy.info.name} flies {horizon.num_frames - 1} a "
            "horizon; missions need a model of 49 frames"
        )
    return MissionReport(
        model=policy.info.name,
        precision=policy.info.precision,
        missions=missions,
        seed=seed,
        results=tuple(
            _fly_legs(
                policy, count, missions=missions, seed=seed, with_settled=with_settled, show_progress=show_progress
            )
            for count in legs
        ),
    )


def _fly_legs(
    policy: Policy, legs: int, *, missions: int, seed: int, with_settled: bool, show_progress: bool
) -> MissionResult:
    tasks = [generate_mission(index, legs) for index in range(missions)]
    fly = partial(_fly, tasks, seed=seed, show_progress=show_progress)
    actions, fps = legs * EXPERT_STEPS, policy.info.horizon.fps
    by_time = MissionPilot(policy, legs)
    flown = fly(by_time)
    until_settled, gain = None, None
    if with_settled:
        pilot = MissionPilot(policy, legs, ends_when_settled=True)
        flown_until_settled = fly(pilot)
        until_settled = _flights(flown_until_settled, pilot, fps)
        gain = success_difference(flown_until_settled, flown)
    return MissionResult(
        legs=legs,
        seconds=actions / fps,
        policy=_flights(flown, by_time, fps),
        until_settled=until_settled,
        settled_gain=gain,
        expert=outcome(fly(ReplayPilot(expert_actions, num_actions=actions))),
    )


def _fly(
    tasks: Sequence[Task], pilot: MissionPilot | ReplayPilot, *, seed: int, show_progress: bool
) -> tuple[EvalFlight, ...]:
    @contextmanager
    def source() -> Iterator[MissionPilot | ReplayPilot]:
        yield pilot

    return evaluate(tasks, source, seed=seed, label="missions", show_progress=show_progress).rows[POLICY]


def _flights(flown: Sequence[EvalFlight], pilot: MissionPilot, fps: float) -> MissionFlights:
    return MissionFlights(
        outcome=outcome(flown),
        settled_legs=pilot.settled_legs,
        mean_seconds=round(pilot.steps_flown / len(flown) / fps, 3),
    )


def mission_parts(report: MissionReport) -> list[Part]:
    """Sentences and a table, for `report_table.render`."""
    rows = []
    for result in report.results:
        rows.append(_row(result, "policy", result.policy.outcome, result.policy))
        if result.until_settled is not None:
            rows.append(_row(result, "policy, until settled", result.until_settled.outcome, result.until_settled))
        rows.append(_row(result, "expert", result.expert))
    parts: list[Part] = [
        f"{report.model} {report.precision}: {report.missions} missions a row, flown as chained sessions. Success: the "
        "end lies within 1.5 m and 15 degrees of the expert's, without a collision on the whole way; 95 % intervals. "
        "Settled: instructions in which the drone moved less than 3 cm and 1 degree a step, for 10 steps. Seconds: "
        "until the last instruction ended.",
        Table(("legs", "flown by", "seconds", "settled", "success", "95 %", "distance m", "yaw deg"), tuple(rows)),
    ]
    gains = [f"{_points(result.settled_gain)} with {result.legs}" for result in report.results if result.settled_gain]
    if gains:
        parts.append(f"Success until settled, minus that with the whole time, in points by legs: {'; '.join(gains)}.")
    return parts


def _row(result: MissionResult, name: str, flown: Outcome, flights: MissionFlights | None = None) -> tuple[str, ...]:
    low, high = flown.success_interval
    return (
        str(result.legs),
        name,
        f"{result.seconds if flights is None else flights.mean_seconds:.2f}",
        "" if flights is None else f"{flights.settled_legs} of {flown.flights * result.legs}",
        f"{flown.success_rate:.1%}",
        f"{low:.0%} to {high:.0%}",
        f"{flown.mean_distance_m:.2f}",
        f"{flown.mean_yaw_error_deg:.1f}",
    )


def _points(gain: Difference) -> str:
    points = [100 * share for share in (gain.difference, *gain.interval)]
    return f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})"
