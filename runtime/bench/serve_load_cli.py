"""`worldvln-edge bench-serve`: the cost of the server itself, without a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import json_option

if TYPE_CHECKING:
    from worldvln_edge.runtime.bench.serve_load import LoadRow, Transport


def _read_counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    counts = value.split(",")
    if not all(count.isascii() and count.isdigit() and 0 < int(count) <= 1000 for count in counts):
        raise click.BadParameter(f"{value!r} is no list of numbers from 1 to 1000, for example 1,10,50,200")
    return tuple(int(count) for count in counts)


@click.command("bench-serve")
@click.option(
    "--sessions",
    default="1,10,50,200",
    show_default=True,
    callback=_read_counts,
    help="Numbers of concurrent sessions, each measured over every transport.",
)
@click.option(
    "--transport",
    "transports",
    type=click.Choice(["websocket", "zmq ipc", "zmq tcp"]),
    multiple=True,
    show_default="all three",
    help="May be repeated.",
)
@click.option("--seconds", type=click.FloatRange(min=0.5), default=10.0, show_default=True, help="Of every line.")
@click.option("--warm-up", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Seconds before.")
@json_option()
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the tables to this file, too.",
)
def bench_serve_command(
    sessions: tuple[int, ...],
    transports: tuple[Transport, ...],
    seconds: float,
    warm_up: float,
    as_json: bool,
    markdown_file: Path | None,
) -> None:
    """Time the server with a policy that computes nothing, over WebSocket and ZeroMQ, while health is asked for.

    Exit status 1 when an answer was lost or refused, or a health route did not answer.

    Example: worldvln-edge bench-serve --sessions 1,200 --seconds 5
    """
    # Imported here so that `worldvln-edge bench-serve --help` needs no server.
    import msgspec

    from worldvln_edge.runtime.bench.report_table import render
    from worldvln_edge.runtime.bench.serve_load import TRANSPORTS, measure_load
    from worldvln_edge.runtime.bench.serve_load_table import serve_load_parts

    def say(row: LoadRow) -> None:
        click.echo(f"{row.sessions} sessions over {row.transport}: {row.requests_per_s:.1f} requests/s", err=True)

    report = measure_load(sessions, transports=transports or TRANSPORTS, seconds=seconds, warm_up_s=warm_up, on_row=say)
    parts = serve_load_parts(report)
    if markdown_file is not None:
        markdown_file.parent.mkdir(parents=True, exist_ok=True)
        markdown_file.write_text(render(parts, markdown=True) + "\n", encoding="utf-8")
    click.echo(msgspec.json.encode(report) if as_json else render(parts))
    for fault in report.faults:
        click.echo(f"error: {fault}", err=True)
    sys.exit(1 if report.faults else 0)
