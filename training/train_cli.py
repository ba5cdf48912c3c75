"""`worldvln-edge train ...`. Heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from worldvln_edge.command_options import seed_option
from worldvln_edge.training.grpo.grpo_cli import compare_command, grpo_command

_PATH = click.Path(path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_START_FILE = click.Path(exists=True, path_type=Path)


@click.group("train")
def train() -> None:
    """Train the networks, one stage or all, from a preset or from a checkpoint.

    Example: worldvln-edge train all --preset nano --data runs/flights/train --work runs/nano-work --out runs/nano
    """


train.add_command(grpo_command)
train.add_command(compare_command)


def _start_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--preset", "preset_name", metavar="NAME", help="Start from random weights of this preset."),
            click.option("--checkpoint", type=_FOLDER, help="Start from this checkpoint, ours or with released.json."),
            click.option("--trust-pickle", is_flag=True, help="Allow torch files to run code while they are read."),
            click.option("--config", "config_file", type=_FILE, help="Recipe (TOML) over the preset's own."),
            click.option(
                "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change one value of it."
            ),
        ]
    ):
        command = option(command)
    return command


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--data", type=_PATH, help="Training flights of any kind that `data info` knows."),
            click.option("--held-out", type=_PATH, help="Flights to validate on.  [default: items_val of a manifest]"),
            click.option("--work", type=_FOLDER, help="Runs and caches; a stopped run goes on from here."),
            click.option("--out", type=_FOLDER, help="Checkpoint folder to write, with all parts."),
            seed_option("Of initial weights and all draws."),
            click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
            click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads."),
            click.option("--base-model", type=_START_FILE, help="World model whose fitting weights are the start."),
            click.option("--adapter", type=_START_FILE, help="Released adapter that the latent head starts from."),
            click.option("--timesformer", type=_START_FILE, help="Released TimesFormer that it starts from."),
        ]
    ):
        command = option(command)
    return command


@train.command("vae")
@_start_options
@_run_options
def vae_command(**options: Any) -> None:
    """Train the video VAE.

    Example: worldvln-edge train vae --preset nano --data runs/flights/train --work runs/nano-work
    """
    _train("vae", **options)


@train.command("backbone")
@_start_options
@_run_options
@click.option("--dry-run", is_flag=True, help="Print memory, tokens, FLOP and time per step, and stop.")
@click.option("--gpu", "gpu_name", default="h100", show_default=True, help="GPU that --dry-run plans for.")
@click.option("--frames", type=click.IntRange(min=1), help="Of a row, for --dry-run.  [default: the preset's]")
@click.option("--mfu", type=click.FloatRange(0.01, 1.0), default=0.4, show_default=True, help="For --dry-run.")
def backbone_command(
    dry_run: bool,
    gpu_name: str,
    frames: int | None,
    mfu: float,
    preset_name: str | None,
    checkpoint: Path | None,
    trust_pickle: bool,
    config_file: Path | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Train the world model on the latents of the VAE.

    Example: worldvln-edge train backbone --preset worldvln-8b --dry-run --gpu h100
    """
    start = (preset_name, checkpoint, trust_pickle, config_file, overrides)
    if dry_run:
        _plan(*start, gpu_name=gpu_name, frames=frames, mfu=mfu)
    else:
        _train("backbone", *start, **options)


@train.command("adapter")
@_start_options
@_run_options
def adapter_command(**options: Any) -> None:
    """Distil the adapter from the patch embedding of the RGB head.

    Example: worldvln-edge train adapter --checkpoint runs/nano --data runs/flights/train --work runs/adapter
    """
    _train("adapter", **options)


@train.command("action")
@_start_options
@_run_options
def action_command(**options: Any) -> None:
    """Train the action head on features of the VAE's decoder.

    Example: worldvln-edge train action --preset nano --data runs/flights/train --work runs/nano-work
    """
    _train("action", **options)


@train.command("rgb-head")
@_start_options
@_run_options
def rgb_head_command(**options: Any) -> None:
    """Train the action head that reads real frames.

    Example: worldvln-edge train rgb-head --preset nano --data runs/flights/train --work runs/nano-work
    """
    _train("rgb-head", **options)


@train.command("all")
@_start_options
@_run_options
def all_command(**options: Any) -> None:
    """Train every stage that the recipe names, one after the other.

    Example: worldvln-edge train all --preset nano --data runs/flights/train --work runs/nano-work --out runs/nano
    """
    _train("all", **options)


def _train(
    command: str,
    preset_name: str | None,
    checkpoint: Path | None,
    trust_pickle: bool,
    config_file: Path | None,
    overrides: tuple[str, ...],
    data: Path | None,
    held_out: Path | None,
    work: Path | None,
    out: Path | None,
    seed: int,
    device: Literal["cpu", "cuda"],
    threads: int,
    base_model: Path | None,
    adapter: Path | None,
    timesformer: Path | None,
) -> None:
    if data is None or work is None:
        raise click.UsageError("give --data FLIGHTS and --work FOLDER")
    if command == "all" and out is None:
        raise click.UsageError("give --out CHECKPOINT")
    config = _config_of(preset_name, checkpoint, trust_pickle)
    # What is wrong with the data or the recipe is said before the networks load, which takes seconds.
    from worldvln_edge.training.data.open_flights import kind_of_flights

    for path in (data, held_out):
        if path is not None:
            kind_of_flights(path)

    import torch

    from worldvln_edge.training.stages.flight_sources import open_held_out_flights, open_training_flights
    from worldvln_edge.training.stages.pipeline import TrainingChain
    from worldvln_edge.training.stages.released_output import read_released
    from worldvln_edge.training.stages.stage_tables import COMMANDS
    from worldvln_edge.training.stages.start_files import StartFiles
    from worldvln_edge.training.stages.training_start import Start
    from worldvln_edge.training.trainer.distributed import started_ranks

    torch.set_num_threads(threads)
    recipe = _read_recipe(config.name, config_file, overrides)
    # Of several stages those that the recipe has; where it has none, the last one says so.
    stages = [name for name in COMMANDS[command] if name in recipe.stages] or list(COMMANDS[command][-1:])
    with started_ranks(device) as ranks:
        flights = open_training_flights(data, config, recipe.tables["data"])
        validation = open_held_out_flights(held_out, data, config, recipe.tables["data"])
        chain = TrainingChain(
            Start(
                config=config,
                source=None if checkpoint is None else _open(checkpoint, trust_pickle),
                released=None if checkpoint is None else read_released(checkpoint),
                files=StartFiles(
                    base_model=base_model, adapter=adapter, timesformer=timesformer, trust_pickle=trust_pickle
                ),
            ),
            recipe,
            flights.source,
            work,
            data_fingerprint=flights.fingerprint,
            seed=seed,
            ranks=ranks,
            held_out=None if validation is None else validation.source,
            held_out_fingerprint=None if validation is None else validation.fingerprint,
        )
        chain.check(stages, out=out)
        chain.run(stages)
        if out is not None:
            chain.write_checkpoint(out)
        if ranks.is_first:
            for name in stages:
                click.echo(f"{work / name}: {name} is trained; weights/, loss_curve.jsonl and loss_curve.png")
            if out is not None:
                click.echo(f"{out}: checkpoint of {config.name}")


def _plan(
    preset_name: str | None,
    checkpoint: Path | None,
    trust_pickle: bool,
    config_file: Path | None,
    overrides: tuple[str, ...],
    *,
    gpu_name: str,
    frames: int | None,
    mfu: float,
) -> None:
    from worldvln_edge.training.trainer.gpus import gpu
    from worldvln_edge.training.trainer.plan import plan_table

    config, kind = _config_of(preset_name, checkpoint, trust_pickle), gpu(gpu_name)
    sft = _read_recipe(config.name, config_file, overrides).stage("sft")
    click.echo(
        plan_table(
            config,
            gpu_name,
            kind,
            frames=frames or config.horizon.num_frames,
            micro_rows=1 if sft.config.packed_tokens is not None else sft.config.micro_rows,
            packed_tokens=sft.config.packed_tokens,
            has_average=sft.optimiser.ema_decay > 0,
            mfu=mfu,
        )
    )


def _config_of(preset_name: str | None, checkpoint: Path | None, trust_pickle: bool) -> Any:
    """ModelConfig of a preset or of a checkpoint."""
    from worldvln_edge.presets import preset

    if (preset_name is None) == (checkpoint is None):
        raise click.UsageError("give either --preset NAME or --checkpoint FOLDER")
    if preset_name is not None:
        return preset(preset_name)
    assert checkpoint is not None
    return _open(checkpoint, trust_pickle).config


def _open(checkpoint: Path, trust_pickle: bool) -> Any:
    from worldvln_edge.models.checkpoint_source import open_any

    return open_any(checkpoint, trust_pickle=trust_pickle)


def _read_recipe(preset_name: str, config_file: Path | None, overrides: tuple[str, ...]) -> Any:
    from worldvln_edge.training.stages.stage_tables import STAGES, TABLES
    from worldvln_edge.training.trainer.recipe import file_layer, override_layer, packaged_layer, read_recipe

    packaged = packaged_layer(preset_name)
    layers = [] if packaged is None else [packaged]
    if config_file is not None:
        layers.append(file_layer(config_file))
    layers += [override_layer(text) for text in overrides]
    return read_recipe(layers, {name: stage.config for name, stage in STAGES.items()}, TABLES)
