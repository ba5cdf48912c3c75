"""Command `verify`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.export.checkpoint_options import CheckpointChoice, checkpoint_options

if TYPE_CHECKING:
    from worldvln_edge.export.closed_loop import ClosedLoop
    from worldvln_edge.export.parity_bounds import ParityRow
    from worldvln_edge.models.checkpoint_source import CheckpointSource

_FOLDER = click.Path(file_okay=False, path_type=Path)
_EXISTING = click.Path(file_okay=False, exists=True, path_type=Path)
_FILE = click.Path(dir_okay=False, exists=True, path_type=Path)


@click.command("verify")
@click.argument("bundle", type=_FOLDER)
@checkpoint_options
@click.option("--shards", type=_EXISTING, help="Folder of `worldvln-edge sim flights` to fly on.")
@click.option("--frames", type=_FILE, help=".npy of uint8 [F, H, W, 3] to fly on.  [default: frames of the package]")
@click.option("--flights", type=click.IntRange(min=1), default=8, show_default=True, help="Whole flights to compare.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the first flight.")
@click.option("--run/--no-run", default=True, help="--no-run compares files and weights only, in little memory.")
@click.option(
    "--calibration", type=_FILE, help="The file that an int8 or fp8 bundle was made with: scales must be its."
)
@click.option("--closed-loop", type=click.IntRange(min=1), metavar="N", help="Also fly N held-out tasks, beside fp32.")
@click.option("--reference", type=_EXISTING, help="fp32 bundle for --closed-loop.  [default: exported for this]")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="For --closed-loop.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def verify_command(
    bundle: Path,
    checkpoint: CheckpointChoice,
    shards: Path | None,
    frames: Path | None,
    flights: int,
    seed: int,
    run: bool,
    calibration: Path | None,
    closed_loop: int | None,
    reference: Path | None,
    workers: int,
    as_json: bool,
) -> None:
    """Compare a bundle with its checkpoint, stage by stage, and write the result into the manifest.

    Exit status 1 when a stage is out of bounds. Precisions that nothing here runs are checked up to their weights
    and scales and reported as "built, not run".

    Example: worldvln-edge verify bundle --checkpoint checkpoints/nano
    """
    from worldvln_edge.export.calibration import Calibration
    from worldvln_edge.export.parity_flights import flights_of
    from worldvln_edge.export.verify import record_parity, verify_bundle

    if shards is not None and frames is not None:
        raise click.UsageError("give either --shards or --frames")
    source = checkpoint.open()
    flown, origin = flights_of(shards, frames, count=flights, seed=seed)
    report = verify_bundle(
        bundle,
        source,
        flights=flown,
        frames_from=origin,
        count=flights,
        seed=seed,
        run=run,
        calibration=None if calibration is None else Calibration.load(calibration),
        progress=lambda what: click.echo(f"verify: {what}", err=True),
    )
    record_parity(bundle, report)
    failed = [row for row in report.rows if row.failures]
    loop = None
    if closed_loop is not None and report.engine:
        loop = _closed_loop(bundle, source, reference, closed_loop, seed, workers)
        record_parity(bundle, report, loop)
    elif closed_loop is not None:
        click.echo("note: no tasks were flown, because this bundle was not run here", err=True)
    if as_json:
        stages = {row.stage: {**row.measures(), "failures": row.failures} for row in report.rows}
        found = {"result": report.result, "engine": report.engine, "frames": report.frames, "stages": stages}
        click.echo(json.dumps(found if loop is None else {**found, "closed_loop": loop.to_json()}))
    else:
        click.echo(parity_table(report.rows))
        where = f" in {report.engine}, {report.flights} flights on {report.frames}" if report.engine else ""
        click.echo(f"\n{report.result}{where}")
        if loop is not None:
            click.echo(f"\n{loop.summary()}")
    if failed:
        click.echo(f"error: {len(failed)} of {len(report.rows)} stages out of bounds", err=True)
        sys.exit(1)


def _closed_loop(
    bundle: Path, source: CheckpointSource, reference: Path | None, tasks: int, seed: int, workers: int
) -> ClosedLoop:
    from worldvln_edge.bundle import Bundle
    from worldvln_edge.export.closed_loop import ClosedLoopError, fly_closed_loop
    from worldvln_edge.export.exporter import export_bundle

    with tempfile.TemporaryDirectory(prefix="worldvln-verify-") as folder:
        if reference is None:
            click.echo("verify: exporting fp32 to fly beside", err=True)
            reference = Path(folder) / "fp32"
            export_bundle(source, reference)
        manifests = [Bundle.open_manifest(one) for one in (bundle, reference)]
        if manifests[1].precision != "fp32" or manifests[1].checkpoint_sha256 != manifests[0].checkpoint_sha256:
            raise ClosedLoopError(
                f"--reference {reference} is {manifests[1].precision} of checkpoint "
                f"{manifests[1].checkpoint_sha256[:12]}; needed is fp32 of {manifests[0].checkpoint_sha256[:12]}"
            )
        click.echo(f"verify: flying {tasks} held-out tasks twice", err=True)
        return fly_closed_loop(bundle, reference, tasks=tasks, seed=seed, workers=workers)


_COLUMNS = (
    ("relative_max", "rel. max", ".1e"),
    ("relative_rms", "rel. RMS", ".1e"),
    ("mean_abs", "mean abs", ".1e"),
    ("bits_equal", "bits equal", ".6f"),
    ("observed_bits_equal", "observed", ".4f"),
    ("drawn_bits_equal", "drawn", ".4f"),
    ("action_cm_median", "cm median", ".1e"),
    ("action_cm_p95", "cm p95", ".1e"),
    ("action_cm", "cm max", ".1e"),
    ("action_deg_median", "deg median", ".1e"),
    ("action_deg_p95", "deg p95", ".1e"),
    ("action_deg", "deg max", ".1e"),
)


def parity_table(rows: list[ParityRow]) -> str:
    """Rows as aligned text, without columns that no row fills."""
    columns = [column for column in _COLUMNS if any(column[0] in row.values for row in rows)]
    lines = [["stage", *(title for _, title, _ in columns), "result"]]
    for row in rows:
        cells = [format(row.values[name], form) if name in row.values else "" for name, _, form in columns]
        result = "; ".join(row.failures) or ("skipped, " + row.note if row.note and not row.values else "ok")
        if row.note and row.values and not row.failures:
            result += f", {row.note}"
        lines.append([row.stage, *cells, result])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
