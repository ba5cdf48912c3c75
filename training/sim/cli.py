"""`worldvln-edge sim`: tasks and expert flights from the simulator. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from worldvln_edge.poses import BodyOrder

_SPLITS = click.Choice(["train", "validation", "test"])


@click.group()
def sim() -> None:
    """Simulator: generate tasks and expert flights, serve it over HTTP.

    Example: worldvln-edge sim tasks --split test --count 90 --out tasks.json
    """


@sim.command()
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


@sim.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0 takes a free one.")
@click.option(
    "--tasks",
    "task_root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of task files, one a task, that requests name by task_id.",
)
@click.option("--family", type=click.Choice(["city", "rooms"]), default="city", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Scene of tasks that name none.")
@click.option("--image-size", type=click.IntRange(8, 1024), default=256, show_default=True, help="Rows and columns.")
@click.option(
    "--order",
    type=click.Choice(["trans_first", "yaw_first", "midpoint"]),
    default="trans_first",
    show_default=True,
    help="Heading of an action's translation; the research simulator uses yaw_first.",
)
@click.option("--allow-remote", is_flag=True, help="Listen beyond this machine; the service asks for no key.")
def serve(
    host: str,
    port: int,
    task_root: Path | None,
    family: str,
    seed: int,
    image_size: int,
    order: BodyOrder,
    allow_remote: bool,
) -> None:
    """Serve the simulator over HTTP to rollouts and evaluators, one session at a time, until SIGTERM.

    Example: worldvln-edge sim serve --port 8765 --tasks runs/tasks
    """
    import signal

    from worldvln_edge.tasks import SceneRef
    from worldvln_edge.training.sim.http_service import SimulatorServer
    from worldvln_edge.training.sim.service import SimulatorServiceConfig

    config = SimulatorServiceConfig(
        image_hw=(image_size, image_size),
        scene=SceneRef(family=family, seed=seed),
        task_root=task_root,
        order=order,
    )
    with SimulatorServer(config, host, port, allow_remote=allow_remote) as server:
        click.echo(f"the simulator is ready at http://{host}:{server.server_port}", err=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@sim.command()
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
