"""`worldvln-edge doctor`: what keeps this computer from flying, and what to do."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from worldvln_edge.command_options import json_option
from worldvln_edge.runtime.cli import parse_address
from worldvln_edge.runtime.doctor.examination import examine
from worldvln_edge.runtime.doctor.finding import report_text


def _read_addresses(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    return tuple(parse_address(value) for value in values)


@click.command("doctor")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--port",
    "addresses",
    metavar="HOST:PORT",
    multiple=True,
    default=("127.0.0.1:8001",),
    show_default=True,
    callback=_read_addresses,
    help="Address that the server will listen on; may be repeated.",
)
@json_option()
@click.pass_context
def doctor_command(
    context: click.Context, bundle: Path | None, addresses: tuple[tuple[str, int], ...], as_json: bool
) -> None:
    """Look at this computer, and at BUNDLE on it. Ends with 1 when something keeps it from flying.

    \b
    Example:
      worldvln-edge doctor runs/bundle --port 0.0.0.0:8001
    """
    report = examine(bundle, addresses=addresses)
    click.echo(msgspec.json.encode(report).decode() if as_json else report_text(report))
    if report.result == "problem":
        context.exit(1)
