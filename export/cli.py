"""Command `export`."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("export")
@click.option("--checkpoint", type=_FOLDER, required=True, help="Checkpoint folder: ours, or one with released.json.")
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
@click.option("--trust-pickle", is_flag=True, help="Allow torch files to run code while they are read.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export_command(
    checkpoint: Path,
    out: Path,
    precision: str,
    compute: str,
    int4_method: str,
    int4_block: int,
    kv: Literal["inplace", "portable"],
    calibration: Path | None,
    trust_pickle: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs that fly without PyTorch.

    Weights stream from the checkpoint into the bundle, so memory does not grow with the model; an export that was
    stopped goes on where it was.

    Example: worldvln-edge export --checkpoint checkpoints/nano --out bundle
    """
    from worldvln_edge.export.calibration import Calibration
    from worldvln_edge.export.exporter import export_bundle
    from worldvln_edge.export.precision import Precision
    from worldvln_edge.models.checkpoint_source import open_any

    start = time.perf_counter()
    wanted = Precision(name=precision, compute=compute, block=int4_block, int4_method=int4_method)
    ranges = Calibration.load(calibration) if calibration is not None else None
    source = open_any(checkpoint, trust_pickle=trust_pickle)
    with _ByteBar("export") as bar:
        manifest = export_bundle(source, out, precision=wanted, kv=kv, calibration=ranges, progress=bar.update)
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    seconds = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for loss in manifest.cast_losses:
        click.echo(f"note: {loss.tensor}: {loss.flushed} values became zero in {loss.dtype}", err=True)
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


class _ByteBar:
    """Progress bar over bytes, whose length is known only after tracing."""

    def __init__(self, label: str):
        self._label = label
        self._bar = click.progressbar(length=1000, label=label, file=sys.stderr, item_show_func=lambda name: name)

    def __enter__(self) -> _ByteBar:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(None, None, None)

    def update(self, what: str, done: int, total: int) -> None:
        at = 1000 * done // total if total else 0
        self._bar.update(max(0, at - self._bar.pos), what)
