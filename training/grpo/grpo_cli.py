"""`worldvln-edge train grpo` and `train grpo-compare`. Heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click

from worldvln_edge.command_options import json_option, key_file_option, seed_option

if TYPE_CHECKING:
    from worldvln_edge.training.grpo.grpo_config import GrpoConfig
    from worldvln_edge.training.grpo.run_collections import MakeFlier

_PATH = click.Path(exists=True, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _flying_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--environments", "url", metavar="URL", help="Fly on an environment server (`sim serve`)."),
            key_file_option("the first is sent to --environments"),
            click.option(
                "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Simulators started here."
            ),
            click.option(
                "--ray",
                "ray_workers",
                type=click.IntRange(min=1),
                help="Fly in so many Ray actors, each with --processes.",
            ),
            click.option("--ray-address", metavar="ADDRESS", help="Of a running cluster.  [default: one is started]"),
            click.option("--trust-pickle", is_flag=True, help="Allow torch files to run code while they are read."),
            click.option("--config", "config_file", type=_FILE, help="Recipe (TOML) over the preset's own."),
            click.option(
                "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change one value of it."
            ),
            click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
            click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads."),
        ]
    ):
        command = option(command)
    return command


@click.command("grpo")
@click.option("--checkpoint", type=_FOLDER, required=True, help="Trained policy, ours or with released.json.")
@click.option("--data", type=_PATH, help="Flights of the SFT loss that every step adds.")
@click.option("--held-out", type=_PATH, help="Flights to measure that loss on.")
@click.option("--tasks", "tasks_path", type=_PATH, help="Tasks to learn from.  [default: the simulator's train split]")
@click.option("--held-out-tasks", type=_PATH, help="Tasks to evaluate on.  [default: the simulator's validation split]")
@click.option("--work", type=_FOLDER, required=True, help="The run; a stopped one goes on from here.")
@click.option("--out", type=_FOLDER, required=True, help="Checkpoint folder to write.")
@click.option(
    "--objective",
    type=click.Choice(["product", "published"]),
    help="published: as the paper's code, for comparison.  [default: the recipe's]",
)
@seed_option("Of all draws.")
@_flying_options
def grpo_command(
    checkpoint: Path,
    data: Path | None,
    held_out: Path | None,
    tasks_path: Path | None,
    held_out_tasks: Path | None,
    work: Path,
    out: Path,
    objective: Literal["product", "published"] | None,
    seed: int,
    url: str | None,
    key_file: Path | None,
    processes: int,
    ray_workers: int | None,
    ray_address: str | None,
    trust_pickle: bool,
    config_file: Path | None,
    overrides: tuple[str, ...],
    device: Literal["cpu", "cuda"],
    threads: int,
) -> None:
    """Improve a trained policy on flights in the simulator (stage 2).

    Example: worldvln-edge train grpo --checkpoint runs/nano --data runs/flights/train --work runs/grpo-work --out
    runs/nano-grpo --processes 2
    """
    import torch

    from worldvln_edge.models.checkpoint_source import open_any
    from worldvln_edge.training.grpo.grpo_setup import (
        GrpoInputs,
        GrpoSetup,
        check_start,
        read_held_out_tasks,
        read_tasks,
    )
    from worldvln_edge.training.stages.flight_sources import open_held_out_flights, open_training_flights
    from worldvln_edge.training.stages.released_output import read_released
    from worldvln_edge.training.stages.training_start import Start
    from worldvln_edge.training.trainer.distributed import started_ranks

    torch.set_num_threads(threads)
    flying = _Flying(url, key_file, processes, ray_workers, ray_address, device)
    source = open_any(checkpoint, trust_pickle=trust_pickle)
    recipe = _read_recipe(source.config.name, config_file, overrides, objective)
    config: GrpoConfig = recipe.tables["grpo"]
    start = Start(config=source.config, source=source, released=read_released(checkpoint))
    check_start(start, config, out, has_flights=data is not None)
    pool = read_tasks(tasks_path, seed=seed)
    evaluated = read_held_out_tasks(held_out_tasks, config.evaluation.tasks)
    reading = recipe.tables["data"]
    has_data = data is not None and config.anchor > 0
    with started_ranks(device) as ranks:
        inputs = GrpoInputs(
            start=start,
            recipe=recipe,
            flights=open_training_flights(data, source.config, reading) if data is not None and has_data else None,
            held_out_flights=(
                open_held_out_flights(held_out, data, source.config, reading) if data is not None and has_data else None
            ),
            tasks=pool,
            held_out_tasks=evaluated,
            work=work,
            seed=seed,
        )
        with _fliers(flying, config, flies=ranks.is_first) as make_flier:
            setup = GrpoSetup(inputs, make_flier, out, ranks, show=_say if ranks.is_first else None)
            result = setup.run()
        setup.write_checkpoint()
        if ranks.is_first:
            if result.stopped_by:
                click.echo(f"ended after collection {result.collections} of {config.collections}: {result.stopped_by}")
            click.echo(f"{setup.folder}: {result.steps} steps; collections.jsonl and collections.png")
            click.echo(f"{out}: checkpoint of {source.config.name}, of step {result.best_step} (best held-out reward)")


@click.command("grpo-compare")
@click.argument("checkpoints", nargs=-1, required=True, type=_FOLDER)
@click.option("--tasks", "tasks_path", type=_PATH, help="Tasks to fly.  [default: the simulator's validation split]")
@click.option("--count", type=click.IntRange(min=1), default=200, show_default=True, help="Tasks.")
@click.option("--rollouts", type=click.IntRange(min=1), default=16, show_default=True, help="Flights of a task.")
@click.option(
    "--work",
    type=_FOLDER,
    required=True,
    help="Flights and comparison.json; a broken one goes on from here.",
)
@_flying_options
@json_option("Print the comparison as JSON.")
def compare_command(
    checkpoints: tuple[Path, ...],
    tasks_path: Path | None,
    count: int,
    rollouts: int,
    work: Path,
    url: str | None,
    key_file: Path | None,
    processes: int,
    ray_workers: int | None,
    ray_address: str | None,
    trust_pickle: bool,
    config_file: Path | None,
    overrides: tuple[str, ...],
    device: Literal["cpu", "cuda"],
    threads: int,
    as_json: bool,
) -> None:
    """Fly checkpoints on the same tasks with the same seeds, and compare them with the first.

    Example: worldvln-edge train grpo-compare runs/nano runs/nano-grpo runs/nano-published --work runs/compare
    """
    import msgspec
    import torch

    from worldvln_edge.models.checkpoint_source import open_any
    from worldvln_edge.runtime.bench.report_table import render
    from worldvln_edge.training.grpo.compare import compare_checkpoints
    from worldvln_edge.training.grpo.comparison import comparison_parts, write_comparison
    from worldvln_edge.training.grpo.grpo_setup import read_held_out_tasks
    from worldvln_edge.training.trainer.distributed import find_device

    torch.set_num_threads(threads)
    flying = _Flying(url, key_file, processes, ray_workers, ray_address, device)
    name = open_any(checkpoints[0], trust_pickle=trust_pickle).config.name
    overrides = (*overrides, f"grpo.evaluation.tasks={count}", f"grpo.evaluation.rollouts={rollouts}")
    config = _read_recipe(name, config_file, overrides, None).tables["grpo"]
    tasks = read_held_out_tasks(tasks_path, count)
    with _fliers(flying, config, flies=True) as make_flier:
        found = compare_checkpoints(
            checkpoints,
            tasks,
            config,
            make_flier,
            work,
            device=find_device(device),
            trust_pickle=trust_pickle,
            show=_say,
        )
    write_comparison(found, work)
    click.echo(msgspec.json.encode(found).decode() if as_json else render(comparison_parts(found)))


def _say(line: str) -> None:
    click.echo(line, err=True)


class _Flying(NamedTuple):
    """Options that say where policies fly."""

    url: str | None
    key_file: Path | None
    processes: int
    ray_workers: int | None
    ray_address: str | None
    device: str


@contextmanager
def _fliers(flying: _Flying, config: GrpoConfig, *, flies: bool) -> Iterator[MakeFlier]:
    """Simulators of this machine, behind HTTP, or of Ray's actors; on ranks that do not fly, none."""
    if not flies:
        yield _never
        return
    if flying.url is not None:
        from worldvln_edge.runtime.doors.access import read_key_file
        from worldvln_edge.training.environments.client import RemoteEnvironments

        token = None if flying.key_file is None else read_key_file(flying.key_file)[0]
        open_environments: partial[Any] = partial(RemoteEnvironments, flying.url, token)
    else:
        from worldvln_edge.training.environments.pool import LocalEnvironments

        open_environments = partial(LocalEnvironments, flying.processes)
    if flying.ray_workers is not None:
        from worldvln_edge.training.grpo.ray_rollout import RayConfig, RayFlier, RayWorkers

        gpus = 1.0 if flying.device == "cuda" else 0.0
        ray = RayConfig(workers=flying.ray_workers, address=flying.ray_address, gpus_per_worker=gpus)
        with RayWorkers(open_environments, ray) as workers:
            yield lambda policy: RayFlier(policy, workers, rules=config.early_stopping)
        return
    from worldvln_edge.training.grpo.rollout import LocalFlier

    with open_environments() as environments:
        yield lambda policy: LocalFlier(policy, environments, rules=config.early_stopping)


def _never(policy: Any) -> Any:
    raise RuntimeError("only the first process of a run flies")


def _read_recipe(preset_name: str, config_file: Path | None, overrides: tuple[str, ...], objective: str | None) -> Any:
    from worldvln_edge.training.grpo.grpo_config import objective_overrides
    from worldvln_edge.training.stages.stage_tables import STAGES, TABLES
    from worldvln_edge.training.trainer.recipe import Layer, file_layer, override_layer, packaged_layer, read_recipe

    packaged = packaged_layer(preset_name)
    layers = [] if packaged is None else [packaged]
    if objective is not None:
        layers.append(Layer(f"--objective {objective}", objective_overrides(objective)))
    if config_file is not None:
        layers.append(file_layer(config_file))
    layers += [override_layer(text) for text in overrides]
    return read_recipe(layers, {name: stage.config for name, stage in STAGES.items()}, TABLES)
