"""`worldvln-edge speculation`: what generating segments before their frames are there saves, costs and risks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import (
    backend_option,
    held_out_tasks_option,
    json_option,
    seed_option,
    threads_option,
)

if TYPE_CHECKING:
    from worldvln_edge.runtime.engines.backends import BackendName


@click.command("speculation")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    type=click.FloatRange(0, 1),
    default=(0.9, 0.8, 0.7),
    show_default=True,
    help="Share of bit labels that must come as predicted; may be repeated.",
)
@held_out_tasks_option("Held-out tasks a row.")
@backend_option
@threads_option()
@seed_option()
@json_option()
def speculation_command(
    bundle: Path,
    thresholds: tuple[float, ...],
    tasks: int,
    backend: BackendName,
    threads: int,
    seed: int,
    as_json: bool,
) -> None:
    """Fly BUNDLE in the simulator with speculative segments: accept rate, time saved, work added, success.

    Example: worldvln-edge speculation bundle/ --threshold 0.9 --threshold 0.8 --tasks 108
    """
    # Imported here so that `worldvln-edge speculation --help` needs neither engines nor the simulator.
    import msgspec

    from worldvln_edge.runtime.bench.report_table import render
    from worldvln_edge.training.evaluation.speculation_quality import measure_speculation, speculation_parts

    report = measure_speculation(
        bundle, thresholds=thresholds, tasks=tasks, seed=seed, backend=backend, threads=threads
    )
    click.echo(msgspec.json.encode(report).decode() if as_json else render(speculation_parts(report)))
