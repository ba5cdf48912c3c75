"""`worldvln-edge profiles`: what every generation profile of a bundle saves, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import (
    also_option,
    backend_option,
    held_out_tasks_option,
    json_option,
    own_profiles_option,
    seed_option,
    threads_option,
)
from worldvln_edge.training.profile_options import own_profiles

if TYPE_CHECKING:
    from worldvln_edge.runtime.engines.backends import BackendName


@click.command("profiles")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--flights",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Held-out expert flights whose frames all profiles are shown: for speed and agreement with exact.",
)
@held_out_tasks_option("Held-out tasks that every profile flies in closed loop; 0: none.", least=0)
@own_profiles_option
@also_option
@backend_option
@threads_option()
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that fly tasks.")
@seed_option()
@json_option()
@click.option(
    "--markdown",
    "markdown_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the tables to this file, too.",
)
def profiles_command(
    bundle: Path,
    flights: int,
    tasks: int,
    profile_file: Path | None,
    also: tuple[Path, ...],
    backend: BackendName,
    threads: int,
    workers: int,
    seed: int,
    as_json: bool,
    markdown_file: Path | None,
) -> None:
    """Measure every generation profile of BUNDLE: time, agreement with exact, and success in the simulator.

    Example: worldvln-edge profiles bundle/ --flights 12 --tasks 108 --threads 1 --markdown profiles.md
    """
    # Imported here so that `worldvln-edge profiles --help` needs neither engines nor the simulator.
    import msgspec

    from worldvln_edge.atomic import atomic_file
    from worldvln_edge.runtime.bench.report_table import render
    from worldvln_edge.training.evaluation.profile_quality import ProfileQualityConfig, measure_profiles
    from worldvln_edge.training.evaluation.profile_tables import profile_parts

    own = own_profiles(profile_file)
    config = ProfileQualityConfig(
        flights=flights, tasks=tasks, seed=seed, backend=backend, threads=threads, workers=workers
    )
    report = measure_profiles(bundle, config, profiles=own, also=also)
    parts = profile_parts(report)
    if markdown_file is not None:
        with atomic_file(markdown_file) as building:
            building.write_text(render(parts, markdown=True) + "\n", encoding="utf-8")
    click.echo(msgspec.json.encode(report).decode() if as_json else render(parts))
