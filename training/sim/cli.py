"""`worldvln-edge sim tasks` and `sim flights`. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from pathlib import Path

import click

_SPLITS = click.Choice(["train", "validation", "test"])


@click.command()
@click.option("--split", type=_SPLITS, default="test", show_default=True, help="Splits share neither tasks nor scenes.")
@click.option("--count", type=click.IntRange(min=1), required=True, help="Tasks in all; kinds take turns, 18 of them.")
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="Index of the first task.")
@click.option("--dynamics", type=click.Choice(["kinematic", "tracked"]), default="kinematic", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON file to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def tasks(split: str, count: int, first: int, dynamics: str, out: Path, as_json: bool) -> None:
    """Write a JSON list of tasks.

    Example: worldvln-edge sim tasks --split test --count 90 --out tasks.json
    """
    from tqdm import tqdm

    from worldvln_edge.tasks import write_task_list
    from worldvln_edge.training.sim.tasks import generate_task

    indices = tqdm(range(first, first + count), unit="task")
    made = [generate_task(split, index, dynamics=dynamics) for index in indices]
    write_task_list(made, out)
    kinds = len({task.kind for task in made})
    if as_json:
        click.echo(json.dumps({"out": str(out), "tasks": count, "kinds": kinds, "split": split}))
    else:
        click.echo(f"{out}: {count} tasks of {kinds} kinds")


@click.command()
@click.option("--split", type=_SPLITS, default="train", show_default=True)
@click.option("--count", type=click.IntRange(min=1), required=True, help="Flights in all, tasks 0 to count-1.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the shards.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes, one per core.")
@click.option("--image-size", type=click.IntRange(8, 1024), default=64, show_default=True, help="Rows and columns.")
@click.option("--shard-flights", type=click.IntRange(min=1), default=64, show_default=True, help="Flights per shard.")
@click.option("--dynamics", type=click.Choice(["kinematic", "tracked"]), default="kinematic", show_default=True)
@click.option(
    "--perturb/--no-perturb",
    default=None,
    help="Push the drone off the path in most flights, so that the data shows recovery.  [default: only for train]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def flights(
    split: str,
    count: int,
    out: Path,
    workers: int,
    image_size: int,
    shard_flights: int,
    dynamics: str,
    perturb: bool | None,
    as_json: bool,
) -> None:
    """Fly the expert and write shards of frames, actions and instructions. The same options go on after a stop.

    Example: worldvln-edge sim flights --split train --count 4096 --out flights/train --workers 2 --image-size 64
    """
    from worldvln_edge.training.sim.flights import FlightsConfig, generate_flights
    from worldvln_edge.training.sim.perturbation import PerturbationConfig

    wants_pushes = split == "train" if perturb is None else perturb
    config = FlightsConfig(
        split=split,
        image_hw=(image_size, image_size),
        shard_flights=shard_flights,
        dynamics=dynamics,
        perturbation=PerturbationConfig() if wants_pushes else None,
    )
    shards = generate_flights(config, count, out, workers=workers)
    if as_json:
        click.echo(json.dumps({"out": str(out), "flights": count, "shards": len(shards), "split": split}))
    else:
        click.echo(f"{out}: {count} flights in {len(shards)} shards")
