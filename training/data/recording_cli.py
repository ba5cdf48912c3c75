"""`worldvln-edge record export`: a recorded flight as training data. Heavy imports happen inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from worldvln_edge.training.data.recording_flights import Motion

_NEW_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--route", type=_NEW_FOLDER, help="Write route folders: pictures, words, poses.")
@click.option("--lerobot", type=_NEW_FOLDER, help="Write a LeRobot dataset, version 3.")
@click.option(
    "--motion",
    type=click.Choice(["poses", "actions", "none"]),
    default="poses",
    show_default=True,
    help="What moved: the client's poses, where it sent them; the actions as they were answered; or nothing.",
)
@click.option(
    "--image-size", type=click.IntRange(8, 4096), nargs=2, help="Rows, columns.  [default: as they were sent]"
)
def export_command(
    file: Path, route: Path | None, lerobot: Path | None, motion: Motion, image_size: tuple[int, int] | None
) -> None:
    """Make training data of the recording FILE: a flight for every instruction that was flown.

    Example: worldvln-edge record export recordings/20261121T235900.250Z-a3901555b1ae9325.000.mcap --lerobot monday
    """
    from worldvln_edge.runtime.recording.recording_reader import Recording
    from worldvln_edge.training.data.lerobot_writer import write_lerobot
    from worldvln_edge.training.data.recording_flights import RecordingFlights
    from worldvln_edge.training.data.route_folder_writer import write_routes

    if route is None and lerobot is None:
        raise click.UsageError("say where to: --route FOLDER, --lerobot FOLDER, or both")
    recording = Recording(file)
    flights = RecordingFlights(recording, image_size, motion=motion)
    rows = range(len(flights))
    for problem in flights.problems:
        click.echo(problem, err=True)
    if route is not None:
        write_routes(flights, rows, route)
        click.echo(f"{route}: {len(rows)} flights")
    if lerobot is not None:
        write_lerobot(flights, rows, lerobot, fps=recording.opening.horizon.fps)
        click.echo(f"{lerobot}: {len(rows)} flights")
