"""`worldvln-edge bench`: how long a segment of a bundle takes on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import backend_option, json_option, seed_option, threads_option

if TYPE_CHECKING:
    import msgspec

    from worldvln_edge.runtime.bench.bench_flight import BenchConfig
    from worldvln_edge.runtime.bench.bench_plot import Bar
    from worldvln_edge.runtime.bench.report_table import Part
    from worldvln_edge.runtime.engines.backends import BackendName

_FILE = click.Path(dir_okay=False, path_type=Path)


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
@click.option(
    "--against",
    type=click.Choice(["full-horizon"]),
    help="Fly the research server's schedule as well, alternately, and compare times and actions.",
)
@click.option(
    "--episodes", type=click.IntRange(min=1), default=5, show_default=True, help="Of each schedule, with --against."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: every graph alone on the GPU, at the shapes of the last segment.",
)
@backend_option
@threads_option()
@click.option(
    "--frame-size",
    "frame_hw",
    metavar="WIDTHxHEIGHT",
    default="640x480",
    show_default=True,
    callback=lambda context, parameter, value: parse_frame_size(value),
    help="Camera frames, before the policy scales them.",
)
@seed_option("Of the frames and the model.")
@json_option()
@click.option("--markdown", "markdown_file", type=_FILE, help="Write the tables to this file, too.")
@click.option("--plot", "plot_file", type=_FILE, help="Draw the stages of every segment (PNG).")
def bench_command(
    bundle: Path,
    segments: int,
    against: str | None,
    episodes: int,
    device: str,
    backend: BackendName,
    threads: int,
    frame_hw: tuple[int, int],
    seed: int,
    as_json: bool,
    markdown_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Fly BUNDLE in process on synthetic frames and print how long each stage of a segment takes.

    With --against, exit status 1 when the actions of an fp32 bundle differ by more than 1e-3 cm or deg, unless the
    first bit that differs was drawn within 1e-4 of its probability, where rounding decides.

    Example: worldvln-edge bench bundle/ --segments 30 --json
    """
    # Imported here so that `worldvln-edge bench --help` needs no engine.
    import msgspec

    from worldvln_edge.runtime.bench.bench_flight import BenchConfig
    from worldvln_edge.runtime.bench.bench_plot import write_bar_plot
    from worldvln_edge.runtime.bench.report_table import render

    if device != "cpu" and against is not None:
        raise click.UsageError("--against flies on the CPU; leave out --device cuda")
    config = BenchConfig(segments=segments, backend=backend, threads=threads, frame_hw=frame_hw, seed=seed)
    if device != "cpu":
        report, parts, bars, is_right = _on_device(bundle, device)
    elif against is not None:
        report, parts, bars, is_right = _compare(bundle, config, episodes)
    else:
        report, parts, bars, is_right = _fly(bundle, config)
    if markdown_file is not None:
        markdown_file.parent.mkdir(parents=True, exist_ok=True)
        markdown_file.write_text(render(parts, markdown=True) + "\n", encoding="utf-8")
    if plot_file is not None:
        write_bar_plot(plot_file, render(parts[:1]).splitlines()[0], bars)
    click.echo(msgspec.json.encode(report) if as_json else render(parts))
    if not is_right:
        click.echo("error: the actions of the two schedules differ by more than an fp32 bundle may", err=True)
        sys.exit(1)


_Result = tuple["msgspec.Struct", "list[Part]", "list[Bar]", bool]


def _fly(bundle: Path, config: BenchConfig) -> _Result:
    from worldvln_edge.runtime.bench.bench import bench_bundle
    from worldvln_edge.runtime.bench.bench_plot import bench_bars
    from worldvln_edge.runtime.bench.bench_table import bench_parts

    total = config.warm_up_segments + config.segments
    with click.progressbar(length=total, label="segments", file=sys.stderr) as progress:
        report = bench_bundle(bundle, config, on_segment=lambda: progress.update(1))
    return report, bench_parts(report), bench_bars(report), True


def _compare(bundle: Path, config: BenchConfig, episodes: int) -> _Result:
    from worldvln_edge.runtime.bench.bench_comparison import compare_with_full_horizon
    from worldvln_edge.runtime.bench.bench_plot import comparison_bars
    from worldvln_edge.runtime.bench.bench_table import comparison_parts

    with click.progressbar(length=2 * episodes, label="episodes", file=sys.stderr) as progress:
        report = compare_with_full_horizon(bundle, config, episodes=episodes, on_episode=lambda: progress.update(1))
    return report, comparison_parts(report), comparison_bars(report), report.agrees


def _on_device(bundle: Path, device: str) -> _Result:
    from worldvln_edge.runtime.bench.bench_device import bench_device
    from worldvln_edge.runtime.bench.bench_plot import Bar
    from worldvln_edge.runtime.bench.bench_table import device_parts

    report = bench_device(bundle, device=device)
    return report, device_parts(report), [Bar(f"segment {report.segment}", report.stages_ms)], True
