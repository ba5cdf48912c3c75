"""What a soak found: a table over time, and whether memory or latency grew.

Memory: the median of the resident memory over the last window against that over the first one; and its trend,
Theil-Sen over the medians of equal blocks of segments, which tells growth from a burst. Latency: the same trend of the
time of a segment, divided by what is usual for its kind. On a processor it is the process's processor time that is held
to the bound, because the time on the clock also holds what other programs took; on another device it is the time on the
clock.
"""

from __future__ import annotations

import msgspec
import numpy as np

from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.runtime.bench.soak_log import Clock, SoakLog
from worldvln_edge.runtime.bench.trend import FEWEST_POINTS, Trend, theil_sen
from worldvln_edge.runtime.sessions.policy import PolicyInfo

MAX_GROWTH = 0.01
"""Of memory, and of latency at the low end of its interval; over the whole run."""
_WINDOWS, _BLOCKS = 10, 20


class SoakError(RuntimeError):
    """The soak cannot be judged. The message says why, and what to do."""


class SoakWindow(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of the run: its last segment, and medians over it."""

    segments: int
    """Flown up to its end, the warm-up not counted."""
    elapsed_s: float
    sessions: int
    p50_ms: float
    p95_ms: float
    processor_p50_ms: float
    rss_bytes: int


class SoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `worldvln-edge soak` prints."""

    model: str
    precision: str
    backend: str
    device: str
    threads: int
    segments: int
    sessions: int
    windows: list[SoakWindow]
    rss_growth: float
    """Last window against the first one: 0.01 is one per cent."""
    rss_trend: float
    """From the start of the run to its end, by the slope."""
    rss_trend_low: float
    rss_trend_high: float
    """99 % interval of it."""
    latency_clock: Clock
    latency_growth: float
    """From the start of the run to its end, by the slope."""
    latency_growth_low: float
    latency_growth_high: float
    """99 % interval of it."""

    @property
    def faults(self) -> list[str]:
        """Why the soak failed; empty when it passed."""
        found = []
        if self.rss_growth > MAX_GROWTH:
            found.append(f"memory (RSS) grew by {self.rss_growth:.2%}; at most {MAX_GROWTH:.0%} is allowed")
        if self.rss_trend_low > MAX_GROWTH:
            found.append(
                f"memory (RSS) has a trend: {self.rss_trend:+.2%} over the run, and at least "
                f"{self.rss_trend_low:+.2%} at 99 %; at most {MAX_GROWTH:.0%} is allowed"
            )
        if self.latency_growth_low > MAX_GROWTH:
            found.append(
                f"segments became slower: {self.latency_growth:+.1%} over the run, and at least "
                f"{self.latency_growth_low:+.1%} at 99 %; at most {MAX_GROWTH:.0%} is allowed"
            )
        return found


def summarise(info: PolicyInfo, log: SoakLog, *, threads: int) -> SoakReport:
    """Judge a run.

    Args:
        info: of the policy.
        log: of the segments behind the warm-up.
        threads: that were asked for.

    Raises:
        SoakError: too few segments.
    """
    if len(log) < FEWEST_POINTS:
        raise SoakError(f"a soak of {len(log)} segments shows nothing; fly {FEWEST_POINTS} or more")
    clock: Clock = "processor" if info.device == "cpu" else "wall"
    latency, memory = _trend(log.relative_ms(clock)), _trend(log.rss_bytes / log.rss_bytes[0])
    windows = _windows(log)
    return SoakReport(
        model=info.name,
        precision=info.precision,
        backend=info.backend,
        device=info.device,
        threads=threads,
        segments=len(log),
        sessions=int(log.sessions[-1]),
        windows=windows,
        rss_growth=windows[-1].rss_bytes / windows[0].rss_bytes - 1,
        rss_trend=memory.slope,
        rss_trend_low=memory.low,
        rss_trend_high=memory.high,
        latency_clock=clock,
        latency_growth=latency.slope,
        latency_growth_low=latency.low,
        latency_growth_high=latency.high,
    )


def _trend(values_N: np.ndarray) -> Trend:
    """Of the medians of equal blocks; over the whole run, not per step."""
    blocks = np.array_split(values_N, min(_BLOCKS, len(values_N)))
    trend, steps = theil_sen([float(np.median(block)) for block in blocks]), len(blocks) - 1
    return Trend(slope=trend.slope * steps, low=trend.low * steps, high=trend.high * steps)


def soak_parts(report: SoakReport) -> list[Part]:
    """The report as sentences and a table."""
    threads = f"{report.threads} threads" if report.threads else "all cores"
    table = Table(
        ("segments", "minutes", "sessions", "p50 ms", "p95 ms", "processor p50 ms", "RSS MB"),
        tuple(
            (
                f"{window.segments:,}",
                f"{window.elapsed_s / 60:.1f}",
                f"{window.sessions:,}",
                f"{window.p50_ms:.1f}",
                f"{window.p95_ms:.1f}",
                f"{window.processor_p50_ms:.1f}",
                f"{window.rss_bytes / 1e6:.1f}",
            )
            for window in report.windows
        ),
    )
    verdict = (
        f"memory (RSS), last window against the first: {report.rss_growth:+.2%} (allowed {MAX_GROWTH:+.0%})\n"
        f"memory (RSS), trend over the run: {report.rss_trend:+.2%}, 99 % interval {report.rss_trend_low:+.2%} to "
        f"{report.rss_trend_high:+.2%} (its low end may reach {MAX_GROWTH:+.0%})\n"
        f"latency ({report.latency_clock} time) over the run: {report.latency_growth:+.1%}, 99 % interval "
        f"{report.latency_growth_low:+.1%} to {report.latency_growth_high:+.1%} (its low end may reach "
        f"{MAX_GROWTH:+.0%})"
    )
    title = f"{report.model} {report.precision}, {report.backend} on {report.device}, {threads}"
    return [title, table, verdict]


def _windows(log: SoakLog) -> list[SoakWindow]:
    windows = []
    for part in np.array_split(np.arange(len(log)), min(_WINDOWS, len(log))):
        p50, p95 = np.percentile(log.wall_ms[part], [50, 95])
        windows.append(
            SoakWindow(
                segments=int(part[-1]) + 1,
                elapsed_s=float(log.elapsed_s[part[-1]]),
                sessions=int(log.sessions[part[-1]]),
                p50_ms=float(p50),
                p95_ms=float(p95),
                processor_p50_ms=float(np.median(log.processor_ms[part])),
                rss_bytes=int(np.median(log.rss_bytes[part])),
            )
        )
    return windows
