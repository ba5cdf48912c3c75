"""`worldvln-edge missions`: flights of several instructions, longer than the model's horizon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.runtime.engines.backend_option import backend_option

if TYPE_CHECKING:
    from worldvln_edge.runtime.engines.backends import BackendName


@click.command("missions")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--legs",
    multiple=True,
    type=click.IntRange(min=1),
    default=(1, 2, 3),
    show_default=True,
    help="Instructions of a mission; may be repeated.",
)
@click.option("--missions", type=click.IntRange(min=1), default=48, show_default=True, help="Of each number of legs.")
@backend_option
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="CPU threads; 0: all cores.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the policy's draws.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def missions_command(
    bundle: Path,
    legs: tuple[int, ...],
    missions: int,
    backend: BackendName,
    threads: int,
    seed: int,
    as_json: bool,
) -> None:
    """Fly BUNDLE on missions of several instructions in the simulator, each as one chained session.

    Example: worldvln-edge missions bundle/ --legs 1 --legs 2 --missions 48
    """
    # Imported here so that `worldvln-edge missions --help` needs neither engines nor the simulator.
    import msgspec

    from worldvln_edge.runtime.bench.bench_table import render
    from worldvln_edge.training.evaluation.missions import measure_missions, mission_parts

    report = measure_missions(bundle, legs=legs, missions=missions, seed=seed, backend=backend, threads=threads)
    click.echo(msgspec.json.encode(report).decode() if as_json else render(mission_parts(report)))
