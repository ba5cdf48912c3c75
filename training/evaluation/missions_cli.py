"""`worldvln-edge missions`: flights of several instructions, longer than the model's horizon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import backend_option, json_option, seed_option, threads_option

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
@click.option(
    "--settled/--no-settled",
    "with_settled",
    default=True,
    show_default=True,
    help="Fly them once more, with instructions that end when the drone has settled (3 cm, 1 degree, 10 steps).",
)
@backend_option
@threads_option()
@seed_option()
@json_option()
def missions_command(
    bundle: Path,
    legs: tuple[int, ...],
    missions: int,
    with_settled: bool,
    backend: BackendName,
    threads: int,
    seed: int,
    as_json: bool,
) -> None:
    """Fly BUNDLE on missions of several instructions in the simulator, as chained sessions.

    Example: worldvln-edge missions bundle/ --legs 1 --legs 2 --missions 48
    """
    # Imported here so that `worldvln-edge missions --help` needs neither engines nor the simulator.
    import msgspec

    from worldvln_edge.runtime.bench.report_table import render
    from worldvln_edge.training.evaluation.missions import measure_missions, mission_parts

    report = measure_missions(
        bundle,
        legs=legs,
        missions=missions,
        seed=seed,
        backend=backend,
        threads=threads,
        with_settled=with_settled,
    )
    click.echo(msgspec.json.encode(report).decode() if as_json else render(mission_parts(report)))
