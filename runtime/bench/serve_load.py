"""What a server costs beyond decoding and inference, and whether it holds under load.

Three processes: a server of the null policy, the clients (serve_load_client.py), and this one, which asks for health
meanwhile. Every line of the report has a server of its own, so its memory starts from the same place.
Overhead is what the client waited, without the server's decoding (with resizing) and inference.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.bench.bench_report import Quantiles
from worldvln_edge.runtime.bench.health_probe import HealthProbe
from worldvln_edge.runtime.bench.null_server import NullServerConfig, NullServerProcess
from worldvln_edge.runtime.bench.serve_load_client import LoadConfig, LoadResult

Transport = Literal["websocket", "zmq ipc", "zmq tcp"]
TRANSPORTS: tuple[Transport, ...] = ("websocket", "zmq ipc", "zmq tcp")
GOAL_OVERHEAD_P50_MS, GOAL_OVERHEAD_P99_MS, GOAL_HEALTH_MS = 3.0, 8.0, 50.0
"""Overhead of one session; health with any number of them."""
_ENDS_WITHIN_S = 300.0
_SETTLE_S = 0.5


class ServeLoadError(RuntimeError):
    """The load could not be measured. The message says why."""


class RouteTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Answers of one health route, those asked for while sessions flew."""

    asked: int
    p50_ms: float
    max_ms: float


class LoadRow(msgspec.Struct, frozen=True, kw_only=True):
    """One transport with one number of sessions."""

    transport: Transport
    sessions: int
    requests: int
    requests_per_s: float
    total: Quantiles
    decode: Quantiles
    infer: Quantiles
    queue: Quantiles
    overhead: Quantiles
    lost: int
    refused: dict[str, int]
    rss_start_bytes: int
    rss_peak_bytes: int
    rss_end_bytes: int
    """After all clients have left."""
    health: dict[str, RouteTimes]
    health_connecting_ms: float
    """Slowest answer of all routes while the clients came, all at once; 0 where none was asked for."""
    health_failures: list[str]


class ServeLoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge bench-serve` prints."""

    seconds: float
    frame_hw: tuple[int, int]
    rows: list[LoadRow]

    @property
    def faults(self) -> list[str]:
        """Why the run failed: answers that were lost, health that did not answer. Times are no fault."""
        found = []
        for row in self.rows:
            where = f"{row.sessions} sessions over {row.transport}"
            if row.lost:
                found.append(f"{where}: {row.lost} answers were lost")
            if row.refused:
                found.append(f"{where}: requests were refused: {row.refused}")
            if row.health_failures:
                found.append(
                    f"{where}: health did not answer {len(row.health_failures)} times, {row.health_failures[0]}"
                )
        return found


def measure_load(
    sessions: tuple[int, ...],
    *,
    transports: tuple[Transport, ...] = TRANSPORTS,
    seconds: float = 10.0,
    warm_up_s: float = 2.0,
    frame_hw: tuple[int, int] = (256, 256),
    on_row: Callable[[LoadRow], None] = lambda row: None,
) -> ServeLoadReport:
    """Measure every transport with every number of sessions.

    Args:
        sessions: numbers of concurrent sessions.
        seconds, warm_up_s: of every row.
        frame_hw: of the JPEG frames, 16 a request.
        on_row: called with every row when it is measured.

    Raises:
        ServeLoadError: the clients failed, or nothing was answered.
        NullServerError: the server did not start, or this system is not Linux.
    """
    rows = []
    for transport in transports:
        for count in sessions:
            load = LoadConfig(url="", sessions=count, seconds=seconds, warm_up_s=warm_up_s, frame_hw=frame_hw)
            rows.append(_measure(transport, load))
            on_row(rows[-1])
    return ServeLoadReport(seconds=seconds, frame_hw=frame_hw, rows=rows)


def _measure(transport: Transport, load: LoadConfig) -> LoadRow:
    defaults = Limits()
    # Every client has a request on the way at all times; a server that refuses some is another measurement.
    limits = msgspec.structs.replace(
        defaults,
        max_queue=max(defaults.max_queue, 2 * load.sessions),
        max_sessions=max(defaults.max_sessions, 2 * load.sessions),
        max_connections=max(defaults.max_connections, 2 * load.sessions),
    )
    with tempfile.TemporaryDirectory(prefix="worldvln-") as folder:
        endpoints = {"websocket": (), "zmq ipc": (f"ipc://{Path(folder) / 'load'}",), "zmq tcp": ("tcp://127.0.0.1:*",)}
        config = NullServerConfig(limits=limits, zmq_endpoints=endpoints[transport])
        with NullServerProcess(config) as server:
            url = server.url if transport == "websocket" else server.zmq_urls[0]
            start_bytes = server.resident_bytes()
            with HealthProbe("127.0.0.1", server.port) as probe:
                result = _run_clients(msgspec.structs.replace(load, url=url))
            time.sleep(_SETTLE_S)
            peak_bytes, end_bytes = server.resident_bytes("VmHWM"), server.resident_bytes()
    if not result.total_ms:
        raise ServeLoadError(
            f"no request of {load.sessions} sessions over {transport} was answered within {load.seconds:g} s; "
            "measure for longer (--seconds), or with fewer sessions (--sessions)"
        )
    total, decode, infer = (np.array(each) for each in (result.total_ms, result.decode_ms, result.infer_ms))
    return LoadRow(
        transport=transport,
        sessions=load.sessions,
        requests=len(total),
        requests_per_s=len(total) / result.seconds,
        total=_quantiles(total),
        decode=_quantiles(decode),
        infer=_quantiles(infer),
        queue=_quantiles(np.array(result.queue_ms)),
        overhead=_quantiles(total - decode - infer),
        lost=result.lost,
        refused=result.refused,
        rss_start_bytes=start_bytes,
        rss_peak_bytes=peak_bytes,
        rss_end_bytes=end_bytes,
        health=_route_times(probe, result.connected_s),
        health_connecting_ms=max(
            (took_ms for asked_s, took_ms in _all_answers(probe) if asked_s < result.connected_s), default=0.0
        ),
        health_failures=probe.failures,
    )


def _route_times(probe: HealthProbe, since_s: float) -> dict[str, RouteTimes]:
    found = {}
    for route, times in probe.took_ms.items():
        took_ms = [each for asked_s, each in zip(probe.asked_s[route], times, strict=True) if asked_s >= since_s]
        if took_ms:
            found[route] = RouteTimes(asked=len(took_ms), p50_ms=float(np.median(took_ms)), max_ms=max(took_ms))
    return found


def _all_answers(probe: HealthProbe) -> Iterator[tuple[float, float]]:
    """(when it was asked for, milliseconds)."""
    for route, times in probe.took_ms.items():
        yield from zip(probe.asked_s[route], times, strict=True)


def _run_clients(load: LoadConfig) -> LoadResult:
    command = [
        sys.executable,
        "-m",
        "worldvln_edge.runtime.bench.serve_load_client",
        msgspec.json.encode(load).decode(),
    ]
    within_s = load.seconds + load.warm_up_s + _ENDS_WITHIN_S
    try:
        done = subprocess.run(command, capture_output=True, timeout=within_s)
    except subprocess.TimeoutExpired:
        raise ServeLoadError(f"{load.sessions} clients of {load.url} did not end within {within_s:g} s") from None
    if done.returncode:
        last_line = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise ServeLoadError(f"{load.sessions} clients of {load.url} failed: {last_line}")
    return msgspec.json.decode(done.stdout, type=LoadResult)


def _quantiles(values_ms: np.ndarray) -> Quantiles:
    p50, p95, p99 = (float(value) for value in np.percentile(values_ms, [50, 95, 99]))
    return Quantiles(runs=len(values_ms), p50_ms=p50, p95_ms=p95, p99_ms=p99)
