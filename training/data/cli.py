"""`worldvln-edge data`: look into flights, check them, and convert them. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from worldvln_edge.training.data.data_check import CheckReport
    from worldvln_edge.training.data.frame_selection import SampleMode
    from worldvln_edge.training.data.open_flights import ReadingOptions

_PATH = click.Path(path_type=Path)
_UNITS = click.Choice(["cm", "m"])
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how flights are read; they arrive as keywords of `_options`."""
    options = [
        click.option(
            "--image-size", type=click.IntRange(8, 4096), nargs=2, help="Rows, columns.  [default: as stored]"
        ),
        click.option(
            "--caption-field", default="tarsier2_caption", show_default=True, help="JSONL: where captions are."
        ),
        click.option("--items", "items_key", default="items_train", show_default=True, help="Manifest: which items."),
        click.option("--route-fps", type=float, default=16.0, show_default=True, help="Routes: pictures a second."),
        click.option("--camera", help="LeRobot: which camera.  [default: the only one]"),
        click.option("--motion-column", help="LeRobot: the column with the motion; say also what is in it:"),
        click.option("--motion-layout", type=click.Choice(["pose6", "delta6", "delta4"]), help="Its layout."),
        click.option("--length-unit", type=_UNITS, help="Its unit of length; also of UAV-Flow's logs."),
        click.option("--angle-unit", type=click.Choice(["deg", "rad"]), help="Its unit of angles."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def data() -> None:
    """Training data: look into it, check it row by row, convert it.

    Example: worldvln-edge data check flights/train
    """


@data.command()
@click.argument("path", type=_PATH)
@click.option(
    "--mode",
    type=click.Choice(["duration", "fixed_full", "segment_full", "segment_full_floor_sec", "whole"]),
    default="duration",
    show_default=True,
    help="How frames are chosen.",
)
@_reading_options
@click.option("--max-step", type=float, default=2.0, show_default=True, help="Metres a drone can fly between frames.")
@click.option("--max-turn", type=float, default=45.0, show_default=True, help="Degrees it can turn between frames.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Rows to print.")
@_JSON
def check(
    path: Path, mode: SampleMode, max_step: float, max_turn: float, limit: int, as_json: bool, **reading: Any
) -> None:
    """Read every row and report what is wrong; ends with 1 if anything is.

    Example: worldvln-edge data check flights/train --caption-field instruction
    """
    from worldvln_edge.training.data.data_check import MotionLimits, check_dataset

    limits = MotionLimits(max_step_m=max_step, max_turn_deg=max_turn)
    report = check_dataset(path, _options(mode, **reading), limits)
    _print_report(report, limit, as_json)
    if report.problems:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("path", type=_PATH)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--to",
    type=click.Choice(["video-shards", "lerobot", "routes"]),
    default="video-shards",
    show_default=True,
    help="JSONL with mp4 and trajectories, a LeRobot dataset (v3), or route folders with pictures.",
)
@_reading_options
@click.option("--skip-broken", is_flag=True, help="Leave rows out that `data check` complains about.")
@_JSON
def convert(path: Path, out: Path, to: str, skip_broken: bool, as_json: bool, **reading: Any) -> None:
    """Convert flights of any kind; frames are taken at 16 a second, for as long as a flight is.

    Example: worldvln-edge data convert uav-flow/ --out flights/uav-flow --length-unit m
    """
    from worldvln_edge.training.data.open_flights import kind_of_flights

    kind = kind_of_flights(path)
    if kind == "uav-flow":
        written, problems = _convert_uav_flow(path, out, to, reading["length_unit"])
    else:
        written, problems = _convert(path, out, to, skip_broken, _options("whole", **reading))
    for problem in problems:
        click.echo(f"left out: {problem}", err=True)
    if as_json:
        left_out = [str(problem) for problem in problems]
        click.echo(json.dumps({"out": str(out), "kind": to, "flights": written, "left_out": left_out}))
    else:
        click.echo(f"{out}: {written} flights from {path} ({kind}), {len(problems)} left out")


@data.command()
@click.argument("path", type=_PATH)
@_reading_options
@_JSON
def info(path: Path, as_json: bool, **reading: Any) -> None:
    """Say what a path holds: rows, frames, instructions, motion; or the size of a latent cache.

    Example: worldvln-edge data info flights/train
    """
    from worldvln_edge.training.data.dataset_info import describe_dataset

    described = describe_dataset(path, _options("duration", **reading))
    if as_json:
        click.echo(json.dumps(described))
        return
    width = max(len(name) for name in described)
    for name, value in described.items():
        click.echo(f"{name:<{width}}  {value if isinstance(value, str) else json.dumps(value)}")


def _options(
    mode: SampleMode, *, image_size: tuple[int, int] | None, caption_field: str, **others: Any
) -> ReadingOptions:
    from worldvln_edge.training.data.captions import CaptionConfig
    from worldvln_edge.training.data.frame_selection import FrameSelection
    from worldvln_edge.training.data.open_flights import ReadingOptions

    return ReadingOptions(
        image_hw=image_size,
        selection=FrameSelection(mode=mode),
        captions=CaptionConfig(caption_field=caption_field),
        **others,
    )


def _convert_uav_flow(path: Path, out: Path, to: str, length_unit: Any) -> tuple[int, list[Any]]:
    from worldvln_edge.training.data.uav_flow import convert_uav_flow
    from worldvln_edge.training.data.video_shards import VideoShards

    if length_unit is None:
        raise click.UsageError("UAV-Flow's files do not say their unit: give --length-unit m (real) or cm (simulated)")
    if to != "video-shards":
        raise click.UsageError("UAV-Flow is converted to video-shards; convert those afterwards")
    problems = convert_uav_flow(path, out, length_unit=length_unit)
    return len(VideoShards(out, None)), problems


def _convert(path: Path, out: Path, to: str, skip_broken: bool, options: ReadingOptions) -> tuple[int, list[Any]]:
    from worldvln_edge.training.data.data_check import MotionLimits, check_rows
    from worldvln_edge.training.data.flight_folder_writer import write_flight_folder
    from worldvln_edge.training.data.open_flights import open_flights

    source = open_flights(path, options)
    broken = check_rows(source, MotionLimits(), show_progress=True) if skip_broken else []
    names = {problem.where for problem in broken}
    rows = [row for row in range(len(source)) if source.name(row) not in names]
    if to == "lerobot":
        from worldvln_edge.training.data.lerobot_writer import write_lerobot

        write_lerobot(source, rows, out)
    elif to == "routes":
        from worldvln_edge.training.data.route_folder_writer import write_routes

        write_routes(source, rows, out)
    else:
        write_flight_folder(source, rows, out)
    return len(rows), [*source.skipped, *broken]


def _print_report(report: CheckReport, limit: int, as_json: bool) -> None:
    if as_json:
        problems = [{"where": p.where, "kind": p.kind, "reason": p.reason} for p in report.problems]
        content = {"path": report.path, "kind": report.kind, "rows": report.rows, "problems": problems}
        click.echo(json.dumps(content))
        return
    for problem in report.problems[:limit]:
        click.echo(f"{problem.kind:<8} {problem}")
    if len(report.problems) > limit:
        click.echo(f"... {len(report.problems) - limit} more; --limit {len(report.problems)} prints all")
    counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    click.echo(f"{report.path}: {report.kind}, {report.rows} rows, {counts or 'nothing wrong'}")
