"""Command `make-checkpoint`."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import click

from worldvln_edge.export.progress import ProgressBar
from worldvln_edge.presets import PRESET_NAMES, preset


@click.command("make-checkpoint")
@click.option("--preset", "preset_name", type=click.Choice(PRESET_NAMES), required=True, help="Sizes of the model.")
@click.option("--random", "seed", type=click.IntRange(min=0), required=True, metavar="SEED", help="Random weights.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--shard-gb", type=click.FloatRange(min=0, min_open=True), default=4.0, show_default=True, help="Shard size, 1e9 B."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def make_checkpoint_command(preset_name: str, seed: int, out: Path, shard_gb: float, as_json: bool) -> None:
    """Write a random checkpoint in the released containers, to rehearse export and flight without the weights.

    Example: worldvln-edge make-checkpoint --preset nano --random 0 --out random-nano
    """
    from worldvln_edge.export.make_checkpoint import make_checkpoint

    start = time.perf_counter()
    with ProgressBar("make") as bar:
        made = make_checkpoint(
            preset(preset_name), out, seed=seed, shard_bytes=max(1, round(shard_gb * 1e9)), progress=bar.update
        )
    seconds = time.perf_counter() - start
    size_bytes = sum(made.part_bytes.values())
    if as_json:
        result = {
            "checkpoint": str(out),
            "preset": preset_name,
            "seed": seed,
            "parameters": made.parameters,
            "bytes": size_bytes,
            "part_bytes": made.part_bytes,
            "seconds": round(seconds, 1),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        click.echo(json.dumps(result))
    else:
        click.echo(f"{out}: {made.parameters / 1e6:.1f} M parameters, {size_bytes / 1e6:.1f} MB, {seconds:.0f} s")
