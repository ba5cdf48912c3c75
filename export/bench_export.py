"""Command `bench-export`: time, memory and size of exports at real size, on random weights.

Every step runs in a process of its own, so that the peak memory is the step's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click

_PRECISIONS = ("fp16", "int4")


@click.command("bench-export")
@click.option("--preset", default="worldvln-8b", show_default=True, help="Sizes of the random checkpoint.")
@click.option("--checkpoint", type=click.Path(file_okay=False, path_type=Path), help="Use this checkpoint instead.")
@click.option("--precision", "precisions", multiple=True, default=_PRECISIONS, show_default=True)
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/bench-export"),
    show_default=True,
    help="Takes the checkpoint and one bundle at a time (42 GB for worldvln-8b).",
)
@click.option("--keep", is_flag=True, help="Keep checkpoint and bundles.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def bench_export_command(
    preset: str, checkpoint: Path | None, precisions: tuple[str, ...], work: Path, keep: bool, as_json: bool
) -> None:
    """Measure exports at real size on random weights: minutes, peak memory, bytes.

    int4 is rounded to nearest here: random weights have no activations to calibrate on.

    Example: worldvln-edge bench-export --precision int4
    """
    rows = []
    work.mkdir(parents=True, exist_ok=True)
    made = None
    if checkpoint is None:
        made = checkpoint = work / f"random-{preset}"
        command = ["make-checkpoint", "--preset", preset, "--random", "0", "--out", str(made), "--json"]
        rows.append({"step": f"make-checkpoint {preset}"} | _run(command))
    for precision in precisions:
        out = work / precision
        command = ["export", "--checkpoint", str(checkpoint), "--out", str(out), "--precision", precision, "--json"]
        if precision == "int4":
            command += ["--int4-method", "rtn"]
        rows.append({"step": f"export {precision}"} | _run(command) | {"backbone_bytes": _backbone_bytes(out)})
        if not keep:
            shutil.rmtree(out)
    if made is not None and not keep:
        shutil.rmtree(made)
    click.echo(json.dumps(rows) if as_json else _table(rows))


def _run(command: list[str]) -> dict:
    """The command's JSON, which holds `bytes`, `seconds` and `peak_rss_bytes`."""
    done = subprocess.run([sys.executable, "-m", "worldvln_edge", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"`worldvln-edge {' '.join(command)}` failed with status {done.returncode}")
    found = json.loads(done.stdout)
    return {name: found[name] for name in ("bytes", "seconds", "peak_rss_bytes")}


def _backbone_bytes(bundle: Path) -> int:
    """Bytes of the tensors that the world model's graphs refer to, each once."""
    import onnx

    places: dict[str, int] = {}
    for name in ("world_model_step", "world_model_context", "latent_embed"):
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            entry = {item.key: item.value for item in tensor.external_data}
            if entry:
                places[entry["offset"]] = int(entry["length"])
    return sum(places.values())


def _table(rows: list[dict]) -> str:
    lines = [f"{'step':<30} {'minutes':>8} {'peak GB':>8} {'GB':>7} {'backbone GB':>12}"]
    for row in rows:
        backbone = f"{row['backbone_bytes'] / 1e9:.2f}" if "backbone_bytes" in row else ""
        lines.append(
            f"{row['step']:<30} {row['seconds'] / 60:>8.1f} {row['peak_rss_bytes'] / 1e9:>8.2f} "
            f"{row['bytes'] / 1e9:>7.2f} {backbone:>12}"
        )
    return "\n".join(lines)
