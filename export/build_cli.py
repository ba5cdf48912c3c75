"""Command `build`: TensorRT engines into a bundle, and whether they compute what its graphs do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click
import msgspec

from worldvln_edge.bundle import EngineEntry
from worldvln_edge.export.engine_checks import CheckResult, EngineChecker, check_engines
from worldvln_edge.export.tensorrt_build import BuildResult, build_engines, parse_targets


@click.command("build")
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--target",
    help="Kinds of GPU to build for ahead of time (sm89,sm120), or `local` for the GPU of this machine.",
)
@click.option(
    "--check-engines",
    "only_check",
    is_flag=True,
    help="Build nothing; run the engines that fit this machine against their graphs.",
)
@click.option("--graphs", help="Graphs to build or check, separated by commas; all of the bundle if left out.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Builds at once.")
@click.option(
    "--profiles",
    "style",
    type=click.Choice(["exact", "range"]),
    default="exact",
    show_default=True,
    help="One optimisation profile per shape of a flight, or one that spans them all (smaller, faster to build).",
)
@click.option(
    "--parity/--no-parity",
    "has_parity",
    default=True,
    show_default=True,
    help="With `--target local`: run every engine against its graph.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the engines as JSON.")
def build_command(
    bundle: Path,
    target: str | None,
    only_check: bool,
    graphs: str | None,
    jobs: int,
    style: Literal["exact", "range"],
    has_parity: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines into a bundle and record them in its manifest.

    Engines that are there already are kept. Those built for the GPU of this machine are run at once, at every shape of
    a flight, and compared with ONNX Runtime; for those built ahead of time, copy the bundle to the device and run this
    command there with --check-engines. Exit status 1 when a graph does not build or an engine is out of bounds; the
    others are recorded.

    \b
    Examples:
      worldvln-edge build bundle --target sm89,sm120
      worldvln-edge build bundle --check-engines
    """
    names = [name.strip() for name in graphs.split(",") if name.strip()] if graphs else None
    if only_check == (target is not None):
        raise click.UsageError("give either --target or --check-engines")
    results: Sequence[BuildResult | CheckResult]
    results = _check(bundle, names) if target is None else _build(bundle, target, names, jobs, style, has_parity)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "engines": [_as_json(result) for result in results]}))
    else:
        for result in results:
            click.echo(_line(result))
    unbuilt = sum(result.entry is None for result in results)
    wrong = sum(_is_wrong(result.entry) for result in results)
    if unbuilt:
        click.echo(f"error: {unbuilt} of {len(results)} engines were not built", err=True)
    if wrong:
        click.echo(f"error: {wrong} of {len(results)} engines do not compute what their graphs do", err=True)
    if unbuilt or wrong:
        sys.exit(1)


def _build(
    bundle: Path,
    target: str,
    graphs: list[str] | None,
    jobs: int,
    style: Literal["exact", "range"],
    has_parity: bool,
) -> list[BuildResult]:
    targets = parse_targets(target)
    is_local = any(one.is_local for one in targets)

    def progress(result: BuildResult, done: int, count: int) -> None:
        click.echo(f"build: {done}/{count} {_line(result)}", err=True)

    return build_engines(
        bundle,
        targets,
        graphs=graphs,
        jobs=jobs,
        style=style,
        check=EngineChecker(bundle).check if is_local and has_parity else None,
        progress=progress,
    )


def _check(bundle: Path, graphs: list[str] | None) -> list[CheckResult]:
    def progress(result: CheckResult, done: int, count: int) -> None:
        click.echo(f"check: {done}/{count} {_line(result)}", err=True)

    return check_engines(bundle, graphs=graphs, progress=progress)


def _is_wrong(entry: EngineEntry | None) -> bool:
    return entry is not None and entry.parity is not None and not entry.parity.within


def _built(result: BuildResult | CheckResult) -> EngineEntry:
    assert result.entry is not None
    return result.entry


def _line(result: BuildResult | CheckResult) -> str:
    if isinstance(result, BuildResult) and result.entry is None:
        return f"{result.target.compute_capability} {result.graph}: not built: {result.error}"
    entry = _built(result)
    if isinstance(result, CheckResult):
        how = f"{entry.backend} {entry.version}"
    elif result.is_kept:
        how = "kept"
    else:
        how = f"{entry.build_seconds:.1f} s, {entry.peak_memory_bytes / 1e9:.2f} GB of memory"
    return (
        f"{entry.compute_capability} {entry.graph}: {entry.precision}, {entry.profiles} profiles, "
        f"{entry.content.size_bytes / 1e6:.1f} MB, {how}, {_parity(entry, result.not_run)}"
    )


def _parity(entry: EngineEntry, not_run: str) -> str:
    if not_run:
        return f"not run: {not_run}"
    if entry.parity is None:
        return "built, not run"
    if not entry.parity.within:
        return f"out of bounds: {entry.parity.reason}"
    return f"within bounds at {entry.parity.shapes} shapes"


def _as_json(result: BuildResult | CheckResult) -> dict[str, object]:
    if isinstance(result, BuildResult) and result.entry is None:
        return {"graph": result.graph, "target": result.target.compute_capability, "error": result.error}
    entry = _built(result)
    return {
        "graph": entry.graph,
        "target": entry.compute_capability,
        "file": entry.file,
        "backend": entry.backend,
        "version": entry.version,
        "precision": entry.precision,
        "profiles": entry.profiles,
        "bytes": entry.content.size_bytes,
        "seconds": entry.build_seconds,
        "peak_memory_bytes": entry.peak_memory_bytes,
        "kept": isinstance(result, CheckResult) or result.is_kept,
        "parity": msgspec.to_builtins(entry.parity),
        "not_run": result.not_run,
    }
