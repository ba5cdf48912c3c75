"""Command `export`."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Literal

import click

from worldvln_edge.export.checkpoint_options import CheckpointChoice, checkpoint_options
from worldvln_edge.export.progress import ProgressBar

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("export")
@checkpoint_options
@click.option("--out", type=_FOLDER, required=True, help="Bundle folder; an existing bundle is replaced.")
@click.option("--precision", default="fp32", show_default=True, help="fp32, fp16, bf16, int8, int4 or fp8.")
@click.option("--compute", default="", help="fp32, fp16 or bf16: dtype of what is not quantised. [default: fp16]")
@click.option("--int4-method", default="awq", show_default=True, help="awq (calibrated) or rtn (round to nearest).")
@click.option("--int4-block", type=int, default=64, show_default=True, help="Weights that share a scale: 32, 64, 128.")
@click.option(
    "--kv",
    type=click.Choice(["inplace", "portable"]),
    default="inplace",
    show_default=True,
    help="inplace: opset 24 (ONNX Runtime, TensorRT 11, TensorRT-RTX); portable: plain operators (TensorRT 10).",
)
@click.option("--calibration", type=_FILE, help="File of `worldvln-edge calibrate`, for int8, fp8 and int4 awq.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export_command(
    checkpoint: CheckpointChoice,
    out: Path,
    precision: str,
    compute: str,
    int4_method: str,
    int4_block: int,
    kv: Literal["inplace", "portable"],
    calibration: Path | None,
    as_json: bool,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs that fly without PyTorch.

    Weights stream from the checkpoint into the bundle, so memory does not grow with the model; an export that was
    stopped goes on where it was.

    Example: worldvln-edge export --checkpoint checkpoints/nano --out bundle

    Released files: worldvln-edge export --preset worldvln-8b --backbone gpt --vae vae.pth --text flan-t5-xl --action
    stage2.pt --out bundle --precision fp16
    """
    from worldvln_edge.export.calibration import Calibration
    from worldvln_edge.export.exporter import export_bundle
    from worldvln_edge.export.precision import Precision

    start = time.perf_counter()
    wanted = Precision(name=precision, compute=compute, block=int4_block, int4_method=int4_method)
    ranges = Calibration.load(calibration) if calibration is not None else None
    source = checkpoint.open()
    with ProgressBar("export") as bar:
        manifest = export_bundle(
            source, out, precision=wanted, kv=kv, calibration=ranges, progress=bar.update, note=_say
        )
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    seconds = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for loss in manifest.cast_losses:
        _say(f"{loss.tensor}: {loss.flushed} values became zero in {loss.dtype}")
    if as_json:
        result = {
            "bundle": str(out),
            "precision": precision,
            "graphs": len(manifest.graphs),
            "bytes": size_bytes,
            "seconds": round(seconds, 1),
            "peak_rss_bytes": peak_bytes,
            "cast_losses": len(manifest.cast_losses),
        }
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"{out}: {precision}, {len(manifest.graphs)} graphs, {size_bytes / 1e6:.1f} MB, {seconds:.0f} s, "
            f"peak memory {peak_bytes / 1e9:.2f} GB"
        )


def _say(text: str) -> None:
    click.echo(f"note: {text}", err=True)
