"""What a flown list of tasks leaves behind: JSON for programs, pictures and videos for people.

    summary.json            FlightSummary
    <task>_actions.json     commanded actions and the segments they came in
    <task>_poses.json       flown poses, the expert's, and the result
    <task>.png              from above, height, heading
    <task>.mp4              the camera's view with the predicted path (optional)
    index.png               one flight on one sheet

Field names follow the reference client's files where those have the same content. Every file appears whole or not at
all; the summary is written last.
Source: spec/session_protocol.md 4.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from worldvln_edge.atomic import atomic_file
from worldvln_edge.poses import ACTION_ORDER, POSE_ORDER
from worldvln_edge.training.evaluation.closed_loop import FlownFlight

_UNITS = {"translation": "cm", "angles": "deg"}


class FlightResult(msgspec.Struct, frozen=True, kw_only=True):
    """One flight in a summary."""

    task: str
    instruction: str
    kind: str
    success: bool
    final_distance_m: float
    final_yaw_error_deg: float
    segments: int
    latency_ms_p50: float
    """Over the flight's segments, wall time of a segment on the client's side."""
    latency_ms_p95: float


class FlightSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All flights of a run. What only a demo knows is left out elsewhere."""

    success_rate: float
    flights: tuple[FlightResult, ...]
    model: str
    server: str
    seed: int
    profiles: tuple[str, ...]
    """Generation profiles that were flown."""
    seconds_per_segment: float
    """Mean wall time of a segment on the client's side."""
    server_rss_mb: float | None = None
    """Resident memory of the server's process after the last flight, 10^6 bytes."""
    bundle_mb: float | None = None
    checkpoint_mb: float | None = None


def flight_result(flight: FlownFlight) -> FlightResult:
    """The flight's line in a summary."""
    p50, p95 = np.percentile(flight.latency_ms, [50, 95])
    return FlightResult(
        task=flight.task.task_id,
        instruction=flight.instruction,
        kind=flight.task.kind,
        success=flight.score.success,
        final_distance_m=round(flight.score.final_distance_m, 4),
        final_yaw_error_deg=round(flight.score.final_yaw_error_deg, 3),
        segments=flight.segments,
        latency_ms_p50=round(float(p50), 2),
        latency_ms_p95=round(float(p95), 2),
    )


def summarise(
    flights: Sequence[FlownFlight], *, model: str, server: str, seed: int, **measured: float | None
) -> FlightSummary:
    """The summary of a run.

    Args:
        flights: at least one.
        model, server: what flew and where it answered.
        seed: of the run.
        measured: further fields of FlightSummary.
    """
    results = tuple(flight_result(flight) for flight in flights)
    latencies_ms = [ms for flight in flights for ms in flight.latency_ms]
    return FlightSummary(
        success_rate=round(sum(result.success for result in results) / len(results), 4),
        flights=results,
        model=model,
        server=server,
        seed=seed,
        profiles=tuple(dict.fromkeys(profile for flight in flights for profile in flight.profiles)),
        seconds_per_segment=round(float(np.mean(latencies_ms)) / 1e3, 4),
        **measured,
    )


def write_flight_files(flight: FlownFlight, folder: Path, stem: str, *, with_video: bool) -> tuple[Path, ...]:
    """Write the JSON files, the plot and the video of one flight; returns the paths of the pictures.

    Raises:
        RenderingUnavailableError: no offscreen OpenGL on this machine.
    """
    # Imported here: plots and videos need matplotlib and av, JSON does not.
    from worldvln_edge.training.evaluation.flight_plot import write_flight_plot
    from worldvln_edge.training.evaluation.flight_view import write_flight_video

    write_json(folder / f"{stem}_actions.json", _actions_record(flight))
    write_json(folder / f"{stem}_poses.json", _poses_record(flight))
    pictures = [folder / f"{stem}.png"]
    write_flight_plot(flight, pictures[0])
    if with_video:
        pictures.append(folder / f"{stem}.mp4")
        write_flight_video(flight, pictures[1])
    return tuple(pictures)


def write_index(flights: Sequence[FlownFlight], path: Path) -> None:
    """The sheet of one flight: the first success at a landmark, else the first success, else the first flight."""
    from worldvln_edge.training.evaluation.flight_plot import write_flight_sheet

    shown = min(flights, key=lambda flight: (not flight.score.success, flight.task.landmark is None))
    write_flight_sheet(shown, path)


def file_stems(task_ids: Sequence[str]) -> list[str]:
    """A file name for each task: letters, digits, dot, dash and underscore only, all different, never hidden."""
    stems: list[str] = []
    for task_id in task_ids:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", task_id).lstrip(".")[:100] or "task"
        stem, number = plain, 1
        while stem in stems:
            number += 1
            stem = f"{plain}-{number}"
        stems.append(stem)
    return stems


def summary_table(summary: FlightSummary) -> str:
    """The summary as lines for a terminal."""
    header = ("task", "instruction", "kind", "result", "distance m", "yaw deg", "ms p50", "ms p95")
    rows = [
        (
            flight.task,
            flight.instruction,
            flight.kind,
            "success" if flight.success else "fail",
            f"{flight.final_distance_m:.2f}",
            f"{flight.final_yaw_error_deg:.1f}",
            f"{flight.latency_ms_p50:.0f}",
            f"{flight.latency_ms_p95:.0f}",
        )
        for flight in summary.flights
    ]
    succeeded = sum(flight.success for flight in summary.flights)
    return text_table(header, rows, numbers_from=4) + (
        f"\n{succeeded} of {len(summary.flights)} flights succeeded ({summary.success_rate:.0%}); "
        f"{summary.seconds_per_segment:.2f} s per segment"
        + (f", profile {', '.join(summary.profiles)}" if summary.profiles else "")
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    """Aligned columns; those from index `numbers_from` on are numbers and stand at the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if i < numbers_from else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def write_json(path: Path, record: Any) -> None:
    """Write JSON, atomically."""
    with atomic_file(path) as building:
        building.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def _actions_record(flight: FlownFlight) -> dict[str, Any]:
    lengths = np.diff(flight.points)
    return {
        "task_json": flight.task.task_id,
        "instruction": flight.instruction,
        "seed": flight.seed,
        "units": _UNITS,
        "action_order_server": ACTION_ORDER,
        "body_apply_order": "trans_first",
        "num_actions": len(flight.actions),
        "actions_server_order": _rows(flight.actions),
        "cumsum_server_order": _rows(np.cumsum(flight.actions, axis=0)),
        "segments": [
            {
                "segment_index": segment,
                "call_index": segment,
                "frames_in_call": 1 if segment == 0 else int(lengths[segment - 1]),
                "num_received_frames": flight.points[segment],
                "num_actions": int(lengths[segment]),
                "latency_ms": round(latency_ms, 2),
            }
            for segment, latency_ms in enumerate(flight.latency_ms)
        ],
    }


def _poses_record(flight: FlownFlight) -> dict[str, Any]:
    task = flight.task
    return {
        "task_json": task.task_id,
        "instruction": flight.instruction,
        "units": _UNITS,
        "pose_order": POSE_ORDER,
        "points": _rows(flight.poses),
        "reference_path_raw": [list(pose) for pose in task.reference_path_raw],
        "end_pos": task.end_pos,
        "scene": task.scene,
        "final": {
            "frames_captured": len(flight.poses),
            "actions_executed": len(flight.actions),
            "success": flight.score.success,
            "collided": flight.score.collided,
            "final_distance_m": round(flight.score.final_distance_m, 4),
            "final_yaw_error_deg": round(flight.score.final_yaw_error_deg, 3),
        },
    }


def _rows(array: np.ndarray) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in array]
