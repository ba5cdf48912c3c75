"""Command `calibrate`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)


@click.command("calibrate")
@click.option("--checkpoint", type=_FOLDER, required=True, help="Checkpoint folder: ours, or one with released.json.")
@click.option("--flights", type=_FOLDER, help="Folder of `worldvln-edge sim flights`.")
@click.option("--routes", type=_FOLDER, help="Folder of dataset routes (meta.json, images/).")
@click.option("--simulate", is_flag=True, help="Fly training tasks in the simulator for this.")
@click.option("--count", type=click.IntRange(min=1), default=16, show_default=True, help="Flights to measure on.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picks flights, draws bits.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
@click.option("--trust-pickle", is_flag=True, help="Allow torch files to run code while they are read.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate_command(
    checkpoint: Path,
    flights: Path | None,
    routes: Path | None,
    simulate: bool,
    count: int,
    seed: int,
    out: Path,
    trust_pickle: bool,
    as_json: bool,
) -> None:
    """Measure activations over real frames, for `export --precision int8`, `fp8` and `int4`.

    The checkpoint is flown in PyTorch, in float32: that needs the memory of the whole model, twice its bf16 size.

    Example: worldvln-edge calibrate --checkpoint checkpoints/nano --simulate --count 16 --out nano.calibration
    """
    from worldvln_edge.export.calibrate import collect
    from worldvln_edge.export.calibration_flights import read_route_flights, read_shard_flights
    from worldvln_edge.models.checkpoint_source import load_source, open_any

    if sum((flights is not None, routes is not None, simulate)) != 1:
        raise click.UsageError("give exactly one of --flights, --routes and --simulate")
    start = time.perf_counter()
    source = open_any(checkpoint, trust_pickle=trust_pickle)
    config = source.config
    if routes is not None:
        origin = f"routes {routes}"
        flown = read_route_flights(routes, count, seed, frames=config.horizon.num_frames)
    elif flights is not None:
        origin = f"flights {flights}"
        flown = read_shard_flights(flights, count, seed)
    else:
        with tempfile.TemporaryDirectory(prefix="worldvln-calibration-") as folder:
            command = _simulate(Path(folder) / "flights", count, max(config.image_hw))
            flown = read_shard_flights(Path(folder) / "flights", count, seed)
        origin = f"worldvln-edge {command}"
    loaded = load_source(source)
    with click.progressbar(length=count, label="calibrate", file=sys.stderr) as bar:
        calibration = collect(
            loaded,
            flown,
            checkpoint_sha256=source.fingerprint(),
            source=origin,
            seed=seed,
            progress=lambda done: bar.update(done - bar.pos),
        )
    calibration.save(out)
    seconds = time.perf_counter() - start
    entry = calibration.description
    if as_json:
        result = {
            "calibration": str(out),
            "source": entry.source,
            "flights": entry.flights,
            "frames": entry.frames,
            "inputs": len(calibration.inputs),
            "sha256": calibration.sha256,
            "seconds": round(seconds, 1),
        }
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"{out}: {len(calibration.inputs)} inputs over {entry.flights} flights, {entry.frames} frames of "
            f"{entry.source}, {seconds:.0f} s"
        )


def _simulate(folder: Path, count: int, side: int) -> str:
    """Fly `count` training tasks into a folder of shards, in a process of its own: this room knows no simulator.

    Returns:
        The command, without its output folder.
    """
    from worldvln_edge.export.calibration import CalibrationError

    arguments = ["sim", "flights", "--split", "train", "--count", str(count), "--image-size", str(side)]
    command = [sys.executable, "-m", "worldvln_edge", *arguments, "--out", str(folder)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CalibrationError(f"the simulator did not fly ({reason}); give --flights or --routes")
    return " ".join(arguments)
