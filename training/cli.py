"""`worldvln-edge fly`, `train` and `demo`. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from worldvln_edge.command_options import (
    also_option,
    ca_file_option,
    json_option,
    key_file_option,
    own_profiles_option,
    seed_option,
)
from worldvln_edge.training.profile_options import own_profiles, profile_option, refuse_without_bundle

if TYPE_CHECKING:
    from worldvln_edge.training.evaluation.flight_run import FlightRun

_DEFAULT_SERVER = "ws://127.0.0.1:8001"
_FOLDER = click.Path(file_okay=False, path_type=Path)
_key_file_option = key_file_option("the first is sent")


@click.command("fly")
@click.option("--server", metavar="URL", help=f"Fly through this native WebSocket.  [default: {_DEFAULT_SERVER}]")
@click.option("--bundle", type=_FOLDER, help="Start a server of this bundle, fly through it, and stop it.")
@profile_option
@own_profiles_option
@also_option
@click.option(
    "--tasks", "tasks_path", type=click.Path(path_type=Path), required=True, help="A task file, a list, or a folder."
)
@click.option("--out", type=_FOLDER, default=Path("runs/fly"), show_default=True, help="Where JSON and pictures go.")
@seed_option()
@click.option("--video/--no-video", "with_video", default=True, show_default=True, help="Render the camera videos.")
@click.option(
    "--frame-format",
    type=click.Choice(["rgb8", "jpeg"]),
    default="rgb8",
    show_default=True,
    help="How frames are sent: rgb8 is exact, jpeg is what a radio link needs.",
)
@_key_file_option
@ca_file_option
@json_option("Print the summary as JSON.")
def fly_command(
    server: str | None,
    bundle: Path | None,
    profile: str | None,
    profile_file: Path | None,
    also: tuple[Path, ...],
    tasks_path: Path,
    out: Path,
    seed: int,
    with_video: bool,
    frame_format: Literal["rgb8", "jpeg"],
    key_file: Path | None,
    ca_file: Path | None,
    as_json: bool,
) -> None:
    """Fly tasks in the simulator, closed loop, with the actions of a server.

    Example: worldvln-edge fly --server ws://127.0.0.1:8001 --tasks tasks.json --out runs/fly
    """
    from dataclasses import replace

    from worldvln_edge.generation_profile import EXACT
    from worldvln_edge.tasks import read_task_list
    from worldvln_edge.training.evaluation.flight_run import FlightRunConfig, fly_tasks

    if server is not None and bundle is not None:
        raise click.UsageError("give either --server URL or --bundle DIR")
    refuse_without_bundle(bundle, profile, profile_file, also)
    _refuse_trust_without_server(ca_file, server)
    tasks = read_task_list(tasks_path)
    config = FlightRunConfig(
        server=server or _DEFAULT_SERVER,
        key=_first_key(key_file),
        ca_file=ca_file,
        seed=seed,
        frame_format=frame_format,
        with_video=with_video,
    )
    if bundle is None:
        _print_run(fly_tasks(tasks, out, config), as_json)
        return

    from worldvln_edge.training.evaluation.pilot_sources import check_bundle
    from worldvln_edge.training.evaluation.served_bundle import serve_bundle

    name = profile or EXACT
    check_bundle(bundle, name, own_profiles(profile_file))  # a wrong one is refused without a server
    out.mkdir(parents=True, exist_ok=True)
    with serve_bundle(bundle, out / "server.log", profile=name, profile_file=profile_file, also=also) as started:
        run = fly_tasks(tasks, out, replace(config, server=started.url))
    _print_run(run, as_json)


@click.command("demo")
@click.option("--out", type=_FOLDER, default=Path("runs/demo"), show_default=True, help="Bundle, JSON and pictures.")
@click.option("--tasks", type=click.IntRange(min=1), default=8, show_default=True, help="Held-out tasks to fly.")
@click.option("--checkpoint", type=_FOLDER, help="Fly this checkpoint.  [default: the one in the package]")
@seed_option()
@click.option("--video/--no-video", "with_video", default=True, show_default=True, help="Render the camera videos.")
@json_option("Print the summary as JSON.")
def demo_command(out: Path, tasks: int, checkpoint: Path | None, seed: int, with_video: bool, as_json: bool) -> None:
    """Export the packaged checkpoint, serve it, fly held-out tasks through the WebSocket, and show the flights.

    Example: worldvln-edge demo --out runs/demo
    """
    from contextlib import nullcontext

    from worldvln_edge.training.demo import packaged_checkpoint, run_demo

    with packaged_checkpoint() if checkpoint is None else nullcontext(checkpoint) as folder:
        run = run_demo(folder, out, tasks=tasks, seed=seed, with_video=with_video)
    _print_run(run, as_json)


def _print_run(run: FlightRun, as_json: bool) -> None:
    import msgspec

    from worldvln_edge.training.evaluation.flight_report import summary_table

    if as_json:
        click.echo(msgspec.json.encode(run.summary).decode())
        return
    click.echo(summary_table(run.summary))
    if run.summary.bundle_mb is not None:
        memory = "" if run.summary.server_rss_mb is None else f", server memory {run.summary.server_rss_mb:.0f} MB"
        click.echo(f"checkpoint {run.summary.checkpoint_mb:.1f} MB, bundle {run.summary.bundle_mb:.1f} MB{memory}")
    click.echo(f"\nsummary: {run.summary_file}\npictures:")
    for picture in run.pictures:
        click.echo(f"  {picture}")


def _refuse_trust_without_server(ca_file: Path | None, server: str | None) -> None:
    if ca_file is not None and server is None:
        raise click.UsageError("--ca-file says whom to trust behind --server wss://HOST:PORT; give that too")


def _first_key(key_file: Path | None) -> str | None:
    if key_file is None:
        return None
    from worldvln_edge.runtime.doors.access import read_key_file

    return read_key_file(key_file)[0]
