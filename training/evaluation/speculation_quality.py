"""Speculative segments in closed loop: how often a guess is taken, what it saves, costs, and does to the flights.

Every threshold flies the same tasks with the same seeds as the flight without speculation. A segment may be guessed for
as long as it takes, as if the drone flew slower than the machine computes.
Source: spec/world_model.md 9.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import numpy as np

from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.runtime.engines.backends import BackendName
from worldvln_edge.runtime.worldvln.speculation import SpeculationConfig, SpeculationReport
from worldvln_edge.runtime.worldvln.text_cache import TextCache
from worldvln_edge.runtime.worldvln.worldvln_policy import WorldVLNPolicy, WorldVLNSession, load_policy
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.closed_loop import PolicyPilot
from worldvln_edge.training.evaluation.evaluation import POLICY, evaluate
from worldvln_edge.training.evaluation.flight_statistics import (
    Difference,
    EvalFlight,
    Outcome,
    outcome,
    success_difference,
)
from worldvln_edge.training.sim.tasks import generate_task


class SpeculatingPilot(PolicyPilot):
    """A policy in this process that works ahead after every segment, and counts what that did."""

    def __init__(self, policy: WorldVLNPolicy):
        super().__init__(policy)
        self.speculated = SpeculationReport()
        self.token_steps = 0
        """Per guidance row, without the guesses."""

    def observe(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        actions = super().observe(frames)
        assert self._session is not None  # it just answered
        self._session.work_ahead()
        return actions

    def end(self) -> None:
        if isinstance(self._session, WorldVLNSession):
            self.speculated.add(self._session.speculated)
            self.token_steps += self._session.counters["token_steps"]
        super().end()


class ThresholdResult(msgspec.Struct, frozen=True, kw_only=True):
    threshold: float | None
    """None: flown without speculation."""
    speculated: SpeculationReport
    token_steps: int
    """Of all flights, per guidance row, without the guesses."""
    outcome: Outcome
    against_off: Difference | None
    """Success minus that without speculation; None for that itself."""


class SpeculationQualityReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge speculation` prints."""

    model: str
    precision: str
    device: str
    tasks: int
    seed: int
    results: tuple[ThresholdResult, ...]
    """Without speculation first."""


def measure_speculation(
    bundle_folder: Path,
    *,
    thresholds: Sequence[float],
    tasks: int = 108,
    seed: int = 0,
    backend: BackendName = "cpu",
    threads: int = 0,
    show_progress: bool = True,
) -> SpeculationQualityReport:
    """Fly held-out tasks without speculation, and with every threshold.

    Args:
        bundle_folder: what `worldvln-edge export` wrote.
        thresholds: shares of equal bit labels, 0..1.
        tasks: how many.
        seed: of the draws; mixed with each task's own.
        backend, threads: see `load_policy`.
        show_progress: bars on stderr.

    Raises:
        BundleError, EngineError: see `load_policy`.
        FlightError, RenderingUnavailableError: see `evaluate`.
        ValueError: a threshold outside 0..1.
    """
    configs = [None, *(SpeculationConfig(threshold=threshold) for threshold in thresholds)]
    held_out = [generate_task("test", index) for index in range(tasks)]
    results: list[ThresholdResult] = []
    off: Sequence[EvalFlight] = ()
    policy = load_policy(bundle_folder, backend=backend, threads=threads)
    with closing(policy):
        for config in configs:
            policy.speculation, policy.texts = config, TextCache()  # every row does the same work for its texts
            pilot = SpeculatingPilot(policy)
            label = "off" if config is None else f"{config.threshold:g}"
            flown = _fly(held_out, pilot, seed=seed, label=label, show_progress=show_progress)
            off = off or flown
            results.append(
                ThresholdResult(
                    threshold=None if config is None else config.threshold,
                    speculated=pilot.speculated,
                    token_steps=pilot.token_steps,
                    outcome=outcome(flown),
                    against_off=None if config is None else success_difference(flown, off),
                )
            )
    return SpeculationQualityReport(
        model=policy.info.name,
        precision=policy.info.precision,
        device=policy.backend.machine,
        tasks=tasks,
        seed=seed,
        results=tuple(results),
    )


def _fly(
    tasks: Sequence[Task], pilot: SpeculatingPilot, *, seed: int, label: str, show_progress: bool
) -> tuple[EvalFlight, ...]:
    @contextmanager
    def source() -> Iterator[SpeculatingPilot]:
        yield pilot

    opened: Callable = source
    return evaluate(tasks, opened, seed=seed, label=label, show_progress=show_progress).rows[POLICY]


def speculation_parts(report: SpeculationQualityReport) -> list[Part]:
    """Sentences and a table, for `report_table.render`."""
    return [
        f"{report.model} {report.precision} on {report.device}: {report.tasks} held-out tasks, the same draws in every "
        "row. Segments: all but the first of a flight. Bits: median share that came as predicted. Saved: mean time of "
        "an accepted segment, for which nobody waited. Added: token-steps of guesses that were not taken, as a share "
        "of all others. Success with 95 % intervals; `against off` in points, in pairs.",
        Table(
            (
                "threshold",
                "segments",
                "accepted",
                "bits",
                "saved ms",
                "added",
                "success",
                "95 %",
                "against off",
                "distance m",
                "yaw deg",
            ),
            tuple(_row(result) for result in report.results),
        ),
    ]


def _row(result: ThresholdResult) -> tuple[str, ...]:
    made, flown = result.speculated, result.outcome
    low, high = flown.success_interval
    accepted, bits, saved, added, against = "", "", "", "", ""
    if result.against_off is not None:
        accepted = f"{made.accepted / made.segments:.1%}"
        bits = f"{np.median(made.agreements):.1%}" if made.agreements else "-"
        saved = f"{made.saved_s / made.accepted * 1e3:.0f}" if made.accepted else "-"
        added = f"{made.added_token_steps / result.token_steps:.0%}"
        points = [100 * share for share in (result.against_off.difference, *result.against_off.interval)]
        against = f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})"
    return (
        "off" if result.threshold is None else f"{result.threshold:g}",
        str(made.segments) if made.segments else "",
        accepted,
        bits,
        saved,
        added,
        f"{flown.success_rate:.1%}",
        f"{low:.0%} to {high:.0%}",
        against,
        f"{flown.mean_distance_m:.2f}",
        f"{flown.mean_yaw_error_deg:.1f}",
    )
