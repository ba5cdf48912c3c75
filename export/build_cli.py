"""Command `build`: TensorRT engines into a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from worldvln_edge.export.tensorrt_build import BuildResult, build_engines, parse_targets


@click.command("build")
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--target",
    required=True,
    help="Kinds of GPU to build for ahead of time (sm89,sm120), or `local` for the GPU of this machine.",
)
@click.option("--graphs", help="Graphs to build, separated by commas; all of the bundle if left out.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Builds at once.")
@click.option(
    "--profiles",
    "style",
    type=click.Choice(["exact", "range"]),
    default="exact",
    show_default=True,
    help="One optimisation profile per shape of a flight, or one that spans them all (smaller, faster to build).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the engines as JSON.")
def build_command(bundle: Path, target: str, graphs: str | None, jobs: int, style: str, as_json: bool) -> None:
    """Build TensorRT engines into a bundle and record them in its manifest.

    Engines that are there already are kept. Exit status 1 when a graph does not build; the others are recorded.
    Engines are built and not run: compare the actions on the device before you fly them.

    Example: worldvln-edge build bundle --target sm89,sm120
    """
    names = [name.strip() for name in graphs.split(",") if name.strip()] if graphs else None

    def progress(result: BuildResult, done: int, count: int) -> None:
        click.echo(f"build: {done}/{count} {_line(result)}", err=True)

    results = build_engines(
        bundle,
        parse_targets(target),
        graphs=names,
        jobs=jobs,
        style="exact" if style == "exact" else "range",
        progress=progress,
    )
    failed = [result for result in results if result.entry is None]
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "engines": [_as_json(result) for result in results]}))
    else:
        for result in results:
            click.echo(_line(result))
    if failed:
        click.echo(f"error: {len(failed)} of {len(results)} engines were not built", err=True)
        sys.exit(1)


def _line(result: BuildResult) -> str:
    head = f"{result.target.compute_capability} {result.graph}"
    if result.entry is None:
        return f"{head}: not built: {result.error}"
    entry = result.entry
    how = "kept" if result.is_kept else f"{entry.build_seconds:.1f} s, {entry.peak_memory_bytes / 1e9:.2f} GB of memory"
    return f"{head}: {entry.precision}, {entry.profiles} profiles, {entry.content.size_bytes / 1e6:.1f} MB, {how}" + (
        "" if entry.parity else ", built, not run"
    )


def _as_json(result: BuildResult) -> dict[str, object]:
    head: dict[str, object] = {"graph": result.graph, "target": result.target.compute_capability}
    if result.entry is None:
        return head | {"error": result.error}
    entry = result.entry
    return head | {
        "file": entry.file,
        "backend": entry.backend,
        "version": entry.version,
        "precision": entry.precision,
        "profiles": entry.profiles,
        "bytes": entry.content.size_bytes,
        "seconds": entry.build_seconds,
        "peak_memory_bytes": entry.peak_memory_bytes,
        "kept": result.is_kept,
        "parity": entry.parity,
    }
