"""`worldvln-edge eval acceptance`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from worldvln_edge.command_options import json_option, seed_option

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("acceptance")
@click.argument("checkpoints", type=_FOLDER, nargs=-1, required=True)
@click.option(
    "--flights",
    type=_FOLDER,
    default=Path("runs/flights/validation"),
    show_default=True,
    help="Shards of held-out flights.",
)
@click.option("--limit", type=click.IntRange(min=2), help="Use at most that many of them.")
@click.option(
    "--limits",
    "limits_of",
    type=click.Choice(["nano", "mini"]),
    help="Whose limits.  [default: those of the checkpoints' preset]",
)
@click.option("--overfit", "with_overfit", is_flag=True, help="Also train fresh weights on 8 of the flights, by heart.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@seed_option("Of the world model's draws, and of --overfit.")
@click.option(
    "--out", type=_FOLDER, default=Path("runs/acceptance"), show_default=True, help="For acceptance.json, .md."
)
@json_option("Print acceptance.json instead of the tables.")
def acceptance_command(
    checkpoints: tuple[Path, ...],
    flights: Path,
    limit: int | None,
    limits_of: Literal["nano", "mini"] | None,
    with_overfit: bool,
    threads: int,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Hold CHECKPOINTS of one preset, one per seed, against the acceptance list; ends with 1 unless accepted.

    Example: worldvln-edge eval acceptance runs/nano-0 runs/nano-1 runs/nano-2 --overfit
    """
    import msgspec
    import torch

    from worldvln_edge.training.evaluation.acceptance_run import AcceptanceConfig, run_acceptance

    torch.set_num_threads(threads)
    config = AcceptanceConfig(
        out=out, flights=flights, limits_of=limits_of, limit=limit, seed=seed, with_overfit=with_overfit
    )
    record, text = run_acceptance(checkpoints, config)
    click.echo(msgspec.json.encode(record).decode() if as_json else text)
    if not record.is_accepted:
        raise click.exceptions.Exit(1)
