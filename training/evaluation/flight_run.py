"""Fly a list of tasks against a server, one after the other, and write what there is to see.

Source: spec/session_protocol.md 7.3; `flight_report.py` says which files are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from worldvln_edge.client import SessionClient
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.closed_loop import (
    FlightError,
    FlownFlight,
    SceneSimulators,
    ServerPilot,
    check_task,
    flight_seed,
    fly_task,
)
from worldvln_edge.training.evaluation.flight_report import (
    FlightSummary,
    file_stems,
    summarise,
    write_flight_files,
    write_index,
    write_json,
)

SUMMARY_FILE, INDEX_FILE = "summary.json", "index.png"


@dataclass(frozen=True, kw_only=True)
class FlightRunConfig:
    server: str  # ws://host:port
    key: str | None = None  # API key
    ca_file: Path | None = None  # authorities to trust behind wss://; None: those of this system
    seed: int = 0
    frame_format: Literal["rgb8", "jpeg"] = "rgb8"  # rgb8 sends what the camera saw; jpeg is what a radio link needs
    with_video: bool = True


@dataclass(frozen=True, kw_only=True)
class FlightRun:
    """What was flown and where it lies."""

    summary: FlightSummary
    summary_file: Path
    pictures: tuple[Path, ...]  # index first, then plots and videos in the order of the flights


def fly_tasks(
    tasks: Sequence[Task],
    out: Path,
    config: FlightRunConfig,
    *,
    measure: Callable[[], dict[str, float | None]] | None = None,
) -> FlightRun:
    """Fly every task through the WebSocket and write `out`. Progress is shown on stderr.

    Args:
        tasks: at least one; all are checked before the first is flown.
        out: folder; files of the same names are replaced.
        config: server, seed, what to write.
        measure: called after the last flight, while the server still runs: further fields of the summary.

    Raises:
        FlightError: a task that cannot be flown, or frames of a size that the camera cannot give.
        ServerUnreachableError, ServerError, AnswerTimeoutError: no server, or one that refuses.
        RenderingUnavailableError: no offscreen OpenGL on this machine.
    """
    if not tasks:
        raise FlightError("no tasks to fly")
    for task in tasks:
        check_task(task)
    flights: list[FlownFlight] = []
    with SessionClient(config.server, config.key, ca_file=config.ca_file, frame_format=config.frame_format) as client:
        pilot, welcome = ServerPilot(client), client.welcome
        assert welcome is not None  # ServerPilot checked it
        with (
            SceneSimulators(pilot.image_hw) as simulators,
            tqdm(total=len(tasks) * (len(pilot.points) - 1), desc="fly", unit="segment") as bar,
        ):
            for task in tasks:
                flight = fly_task(
                    task,
                    pilot,
                    simulators.for_task(task),
                    seed=flight_seed(task, config.seed),
                    on_segment=lambda segment: bar.update(),
                )
                flights.append(flight)
                bar.set_postfix_str(f"{sum(f.score.success for f in flights)} of {len(flights)} succeeded")
    measured = measure() if measure is not None else {}
    pictures = [out / INDEX_FILE]
    stems = file_stems([task.task_id for task in tasks])
    for flight, stem in tqdm(list(zip(flights, stems, strict=True)), desc="draw", unit="flight"):
        pictures += write_flight_files(flight, out, stem, with_video=config.with_video)
    write_index(flights, pictures[0])
    summary = summarise(flights, model=welcome.model.name, server=config.server, seed=config.seed, **measured)
    write_json(out / SUMMARY_FILE, summary)
    return FlightRun(summary=summary, summary_file=out / SUMMARY_FILE, pictures=tuple(pictures))
