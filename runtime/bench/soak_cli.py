"""`worldvln-edge soak`: many sessions for long, in one process or against a server, to see that nothing grows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldvln_edge.command_options import backend_option, json_option, seed_option, threads_option

if TYPE_CHECKING:
    from worldvln_edge.runtime.bench.report_table import Part
    from worldvln_edge.runtime.bench.server_soak import ServerSoakReport
    from worldvln_edge.runtime.bench.soak_report import SoakReport
    from worldvln_edge.runtime.engines.backends import BackendName


@click.command("soak")
@click.argument("bundle", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--server", "is_server", is_flag=True, help="A server's process and its clients, without a model.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="With --server: after the warm-up.",
)
@click.option(
    "--warm-up-minutes",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="With --server: flown before.",
)
@click.option("--segments", type=click.IntRange(min=5), default=1000, show_default=True, help="After the warm-up.")
@click.option("--warm-up", type=click.IntRange(min=0), default=200, show_default=True, help="Segments flown before.")
@click.option(
    "--sessions",
    type=click.IntRange(min=1),
    show_default="4, with --server 12",
    help="That live at once.",
)
@backend_option
@threads_option()
@seed_option("Of frames, prompts and order.")
@json_option()
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table to this file, too.",
)
def soak_command(
    bundle: Path | None,
    is_server: bool,
    minutes: float,
    warm_up_minutes: float,
    segments: int,
    warm_up: int,
    sessions: int | None,
    backend: BackendName,
    threads: int,
    seed: int,
    as_json: bool,
    markdown_file: Path | None,
) -> None:
    """Fly BUNDLE for long in one process, or a server of the null policy with --server; watch memory and latency.

    Exit status 1 when resident memory grew by more than 1 % after the warm-up (last tenth of the run against the
    first), or when memory or the time of a segment has a trend of more than 1 %, noise considered (99 % interval of a
    median slope); with --server also when an answer was lost.

    Example: worldvln-edge soak bundle/ --segments 1000 --threads 1

    Example: worldvln-edge soak --server --minutes 30
    """
    if is_server == (bundle is not None):
        raise click.UsageError("give either a BUNDLE, or --server to soak a server without a model")
    # Imported here so that `worldvln-edge soak --help` needs no engine.
    import msgspec

    from worldvln_edge.runtime.bench.report_table import render

    report: Any
    if bundle is None:
        report, parts = _soak_server(minutes, warm_up_minutes, sessions or 12, seed)
    else:
        report, parts = _soak_bundle(bundle, segments, warm_up, sessions or 4, backend, threads, seed)
    if markdown_file is not None:
        markdown_file.parent.mkdir(parents=True, exist_ok=True)
        markdown_file.write_text(render(parts, markdown=True) + "\n", encoding="utf-8")
    click.echo(msgspec.json.encode(report) if as_json else render(parts))
    for fault in report.faults:
        click.echo(f"error: {fault}", err=True)
    sys.exit(1 if report.faults else 0)


def _soak_bundle(
    bundle: Path, segments: int, warm_up: int, sessions: int, backend: BackendName, threads: int, seed: int
) -> tuple[SoakReport, list[Part]]:
    from worldvln_edge.runtime.bench.soak import SoakConfig, soak_bundle
    from worldvln_edge.runtime.bench.soak_report import soak_parts

    config = SoakConfig(
        segments=segments,
        warm_up_segments=warm_up,
        sessions_at_once=sessions,
        backend=backend,
        threads=threads,
        seed=seed,
    )
    with click.progressbar(length=warm_up + segments, label="segments", file=sys.stderr) as progress:
        report = soak_bundle(bundle, config, on_segment=lambda: progress.update(1))
    return report, soak_parts(report)


def _soak_server(minutes: float, warm_up_minutes: float, drones: int, seed: int) -> tuple[ServerSoakReport, list[Part]]:
    from worldvln_edge.runtime.bench.server_soak import ServerSoakConfig, server_soak_parts, soak_server

    config = ServerSoakConfig(minutes=minutes, warm_up_minutes=warm_up_minutes, drones=drones, seed=seed)
    seconds = round((minutes + warm_up_minutes) * 60)
    with click.progressbar(length=seconds, label="seconds", file=sys.stderr) as progress:
        report = soak_server(config, on_segment=lambda elapsed_s: progress.update(int(elapsed_s) - progress.pos))
    return report, server_soak_parts(report)
