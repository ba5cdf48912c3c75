"""Command `calibrate`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from worldvln_edge.export.checkpoint_options import CheckpointChoice, checkpoint_options
from worldvln_edge.export.progress import ProgressBar

_FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)


@click.command("calibrate")
@checkpoint_options
@click.option("--flights", type=_FOLDER, help="Folder of `worldvln-edge sim flights`.")
@click.option("--routes", type=_FOLDER, help="Folder of dataset routes (meta.json, images/).")
@click.option("--simulate", is_flag=True, help="Fly training tasks in the simulator for this.")
@click.option("--count", type=click.IntRange(min=1), default=16, show_default=True, help="Flights to measure on.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picks flights.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--scratch", type=_FOLDER, help="Takes hidden states that are too many for memory.  [default: that of --out]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate_command(
    checkpoint: CheckpointChoice,
    flights: Path | None,
    routes: Path | None,
    simulate: bool,
    count: int,
    seed: int,
    out: Path,
    device: str,
    scratch: Path | None,
    as_json: bool,
) -> None:
    """Measure activations over real frames, for `export --precision int8`, `fp8` and `int4`.

    Computed in PyTorch, in float32, block by block: memory holds one block of the model. The hidden states of all
    flights lie in a temporary file (3 GB a flight at the released sizes).

    Example: worldvln-edge calibrate --checkpoint checkpoints/nano --simulate --count 16 --out nano.calibration
    """
    from worldvln_edge.export.calibrate import collect
    from worldvln_edge.export.calibration_flights import read_route_flights, read_shard_flights

    if sum((flights is not None, routes is not None, simulate)) != 1:
        raise click.UsageError("give exactly one of --flights, --routes and --simulate")
    start = time.perf_counter()
    source = checkpoint.open()
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
    out.parent.mkdir(parents=True, exist_ok=True)
    with ProgressBar("calibrate") as bar:
        calibration = collect(
            source, flown, frames_from=origin, device=device, folder=scratch or out.parent, progress=bar.update
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
