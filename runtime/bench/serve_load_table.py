"""The report of `bench-serve` as tables."""

from __future__ import annotations

from worldvln_edge.runtime.bench.bench_report import Quantiles
from worldvln_edge.runtime.bench.health_probe import HEALTH_ROUTES
from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.runtime.bench.serve_load import (
    GOAL_HEALTH_MS,
    GOAL_OVERHEAD_P50_MS,
    GOAL_OVERHEAD_P99_MS,
    LoadRow,
    ServeLoadReport,
)
from worldvln_edge.runtime.bench.serve_load_client import FRAMES_PER_REQUEST


def serve_load_parts(report: ServeLoadReport) -> list[Part]:
    """Sentences and tables: time, then memory and health, then the goals."""
    height, width = report.frame_hw
    title = (
        f"null policy, {FRAMES_PER_REQUEST} JPEG frames of {width}x{height} a request, every session sends the next "
        f"request when it has the answer, {report.seconds:g} s each; milliseconds"
    )
    times = Table(
        (
            "transport",
            "sessions",
            "requests/s",
            "total p50",
            "p95",
            "p99",
            "decode p50",
            "p99",
            "infer p50",
            "p99",
            "queue p50",
            "p99",
            "overhead p50",
            "p99",
            "lost",
        ),
        tuple(
            (
                row.transport,
                str(row.sessions),
                f"{row.requests_per_s:.1f}",
                *(f"{value:.1f}" for value in (row.total.p50_ms, row.total.p95_ms, row.total.p99_ms)),
                *_ends(row.decode),
                *_ends(row.infer),
                *_ends(row.queue),
                *_ends(row.overhead),
                str(row.lost),
            )
            for row in report.rows
        ),
    )
    health = Table(
        (
            "transport",
            "sessions",
            "RSS MB start",
            "peak",
            "end",
            *(f"{route} {column}" for route in HEALTH_ROUTES for column in ("p50", "max")),
            "while connecting, max",
            "failed",
        ),
        tuple(
            (
                row.transport,
                str(row.sessions),
                *(f"{size / 1e6:.1f}" for size in (row.rss_start_bytes, row.rss_peak_bytes, row.rss_end_bytes)),
                *(text for route in HEALTH_ROUTES for text in _route(row, route)),
                f"{row.health_connecting_ms:.1f}",
                str(len(row.health_failures)),
            )
            for row in report.rows
        ),
    )
    return [title, times, health, "\n".join(_goals(report))]


def _ends(quantiles: Quantiles) -> tuple[str, str]:
    return f"{quantiles.p50_ms:.1f}", f"{quantiles.p99_ms:.1f}"


def _route(row: LoadRow, route: str) -> tuple[str, str]:
    times = row.health.get(route)
    return ("", "") if times is None else (f"{times.p50_ms:.1f}", f"{times.max_ms:.1f}")


def _goals(report: ServeLoadReport) -> list[str]:
    lines = [
        f"overhead of one session over {row.transport}: p50 {row.overhead.p50_ms:.1f} ms "
        f"(goal {GOAL_OVERHEAD_P50_MS:g}), p99 {row.overhead.p99_ms:.1f} ms (goal {GOAL_OVERHEAD_P99_MS:g})"
        for row in report.rows
        if row.sessions == 1
    ]
    slowest = [times.max_ms for row in report.rows for times in row.health.values()]
    asked = sum(times.asked for row in report.rows for times in row.health.values())
    if slowest:
        lines.append(
            f"slowest of {asked} health answers while segments run: {max(slowest):.1f} ms (goal {GOAL_HEALTH_MS:g})"
        )
    lines.append(f"lost answers: {sum(row.lost for row in report.rows)} (goal 0)")
    return lines
