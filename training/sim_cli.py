"""`worldvln-edge sim`: what the simulator offers by itself, and the environments that are served from it."""

from __future__ import annotations

import click

from worldvln_edge.training.environments.environments_cli import bench, serve
from worldvln_edge.training.sim.cli import flights, tasks


@click.group()
def sim() -> None:
    """Simulator: generate tasks and expert flights, serve environments over HTTP.

    Example: worldvln-edge sim tasks --split test --count 90 --out tasks.json
    """


for command in (tasks, serve, bench, flights):
    sim.add_command(command)
