"""Commands `export` and `verify`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from worldvln_edge.bundle import Bundle, write_manifest

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("export")
@click.option("--checkpoint", type=_FOLDER, required=True, help="Checkpoint folder.")
@click.option("--out", type=_FOLDER, required=True, help="Bundle folder; an existing bundle is replaced.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export_command(checkpoint: Path, out: Path, as_json: bool) -> None:
    """Export a checkpoint to a bundle of ONNX graphs that fly without PyTorch.

    Example: worldvln-edge export --checkpoint checkpoints/nano --out bundle
    """
    from worldvln_edge.export.exporter import export_bundle

    start = time.perf_counter()
    with click.progressbar(length=100, label="export", file=sys.stderr, item_show_func=lambda name: name) as bar:

        def progress(name: str, index: int, count: int) -> None:
            bar.update(100 * index // count - bar.pos, name)

        manifest = export_bundle(checkpoint, out, progress=progress)
        bar.update(100 - bar.pos, "done")
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    seconds = time.perf_counter() - start
    if as_json:
        result = {"bundle": str(out), "graphs": len(manifest.graphs), "bytes": size_bytes, "seconds": round(seconds, 1)}
        click.echo(json.dumps(result))
    else:
        click.echo(f"{out}: {len(manifest.graphs)} graphs, {size_bytes / 1e6:.1f} MB, {seconds:.0f} s")


@click.command("verify")
@click.argument("bundle", type=_FOLDER)
@click.option("--checkpoint", type=_FOLDER, required=True, help="The checkpoint that the bundle was made from.")
@click.option("--frames", type=click.Path(dir_okay=False, path_type=Path), help=".npy of uint8 [F, H, W, 3] to fly on.")
@click.option("--flights", type=click.IntRange(min=1), default=2, show_default=True, help="Whole flights to compare.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first flight.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def verify_command(bundle: Path, checkpoint: Path, frames: Path | None, flights: int, seed: int, as_json: bool) -> None:
    """Compare a bundle with its checkpoint, stage by stage, and write the result into the manifest.

    Exit status 1 when a stage is out of bounds. Example: worldvln-edge verify bundle --checkpoint checkpoints/nano
    """
    import msgspec

    from worldvln_edge.export.verify import verify_bundle

    video = _read_frames(frames) if frames is not None else None
    rows = verify_bundle(
        bundle,
        checkpoint,
        frames=video,
        flights=flights,
        seed=seed,
        progress=lambda stage: click.echo(f"verify: {stage}", err=True),
    )
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, msgspec.structs.replace(manifest, parity={row.stage: row.measures() for row in rows}))
    failed = [row for row in rows if row.failures]
    if as_json:
        click.echo(json.dumps({"stages": {r.stage: r.measures() | {"failures": r.failures} for r in rows}}))
    else:
        click.echo(_table(rows))
    if failed:
        click.echo(f"error: {len(failed)} of {len(rows)} stages out of bounds", err=True)
        sys.exit(1)


def _read_frames(path: Path):
    import numpy as np

    try:
        video = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path} is no .npy array ({error})", param_hint="--frames") from error
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise click.BadParameter(
            f"{path} holds {video.dtype} {video.shape}, uint8 [F, H, W, 3] is needed", param_hint="--frames"
        )
    return video


def _table(rows) -> str:
    titles = ("stage", "max abs", "rel. RMS", "bits equal", "cm", "deg", "result")

    def number(value: float | None, form: str = ".1e") -> str:
        return "" if value is None else format(value, form)

    lines = [titles]
    for row in rows:
        bits = number(row.bit_agreement, ".6f")
        result = "; ".join(row.failures) or "ok"
        if row.first_flip_margin is not None and not row.failures:
            result = f"ok, tie at {row.first_flip_margin:.1e}"
        lines.append(
            (
                row.stage,
                number(row.max_abs),
                number(row.relative_rms),
                bits,
                number(row.action_cm),
                number(row.action_deg),
                result,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
