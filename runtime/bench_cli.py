"""`worldvln-edge bench`: how long a segment of a bundle takes on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from worldvln_edge.runtime.bench import BenchReport, Quantiles


def parse_frame_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` as (rows, columns).

    Raises:
        click.BadParameter: anything else.
    """
    width, _, height = text.partition("x")
    if not all(side.isascii() and side.isdigit() and 1 <= int(side) <= 8192 for side in (width, height)):
        raise click.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, for example 640x480")
    return int(height), int(width)


@click.command("bench")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--segments", type=click.IntRange(min=1), default=12, show_default=True, help="Segments to time.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="CPU threads; 0: all cores.")
@click.option(
    "--frame-size",
    "frame_hw",
    metavar="WIDTHxHEIGHT",
    default="640x480",
    show_default=True,
    callback=lambda context, parameter, value: parse_frame_size(value),
    help="Camera frames, before the policy scales them.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the frames and the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bench_command(
    bundle: Path, segments: int, threads: int, frame_hw: tuple[int, int], seed: int, as_json: bool
) -> None:
    """Fly BUNDLE in process on synthetic frames and print how long each stage of a segment takes.

    Example: worldvln-edge bench bundle/ --segments 30 --json
    """
    # Imported here so that `worldvln-edge bench --help` needs no engine.
    import msgspec

    from worldvln_edge.runtime.bench import BenchConfig, bench_bundle

    config = BenchConfig(segments=segments, threads=threads, frame_hw=frame_hw, seed=seed)
    total = config.warm_up_segments + config.segments
    with click.progressbar(length=total, label="segments", file=sys.stderr) as progress:
        report = bench_bundle(bundle, config, on_segment=lambda: progress.update(1))
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        click.echo(bench_table(report))


def bench_table(report: BenchReport) -> str:
    """The report for a terminal."""
    threads = f"{report.threads} threads" if report.threads else "all cores"
    lines = [
        f"{report.model} {report.precision}, {report.backend} on {report.device}, {threads}",
        "",
        f"{'stage':<22}{'runs':>6}{'p50 ms':>10}{'p95 ms':>10}",
        *(_row(stage, quantiles) for stage, quantiles in report.stages.items()),
        _row("segment", report.segment),
        "",
        f"seconds per segment   {report.segment.p50_ms / 1e3:.3f} ({report.actions_per_segment} actions)",
        f"bundle                {report.bundle_bytes / 1e6:.1f} MB, loaded in {report.load_s:.2f} s",
    ]
    if report.rss_bytes is not None and report.peak_rss_bytes is not None:
        lines.append(
            f"memory (RSS)          {report.rss_bytes / 1e6:.0f} MB, peak {report.peak_rss_bytes / 1e6:.0f} MB"
        )
    return "\n".join(lines)


def _row(name: str, quantiles: Quantiles) -> str:
    return f"{name:<22}{quantiles.runs:>6}{quantiles.p50_ms:>10.1f}{quantiles.p95_ms:>10.1f}"
