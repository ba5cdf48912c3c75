"""`worldvln-edge fly`, `eval`, `train` and `demo`. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from worldvln_edge.runtime.profile_options import also_option, own_profiles_option
from worldvln_edge.training.profile_options import own_profiles, profile_option, refuse_without_bundle

if TYPE_CHECKING:
    from worldvln_edge.training.evaluation.flight_run import FlightRun

_DEFAULT_SERVER = "ws://127.0.0.1:8001"
_FOLDER = click.Path(file_okay=False, path_type=Path)
_KEY_FILE = click.option(
    "--key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="API keys, one a line; the first is sent.",
)


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
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the policy's draws.")
@click.option("--video/--no-video", "with_video", default=True, show_default=True, help="Render the camera videos.")
@click.option(
    "--frame-format",
    type=click.Choice(["rgb8", "jpeg"]),
    default="rgb8",
    show_default=True,
    help="How frames are sent: rgb8 is exact, jpeg is what a radio link needs.",
)
@_KEY_FILE
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
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
    tasks = read_task_list(tasks_path)
    config = FlightRunConfig(
        server=server or _DEFAULT_SERVER,
        key=_first_key(key_file),
        seed=seed,
        frame_format=frame_format,
        with_video=with_video,
    )
    if bundle is None:
        _print_run(fly_tasks(tasks, out, config), as_json)
        return

    from worldvln_edge.training.evaluation.evaluation import check_bundle
    from worldvln_edge.training.evaluation.served_bundle import serve_bundle

    name = profile or EXACT
    check_bundle(bundle, name, own_profiles(profile_file))  # a wrong one is refused without a server
    out.mkdir(parents=True, exist_ok=True)
    with serve_bundle(bundle, out / "server.log", profile=name, profile_file=profile_file, also=also) as started:
        run = fly_tasks(tasks, out, replace(config, server=started.url))
    _print_run(run, as_json)


@click.command("eval")
@click.option("--bundle", type=_FOLDER, help="Fly this bundle in process; or give --server.")
@click.option("--server", metavar="URL", help="Fly through this server; or give --bundle.")
@profile_option
@own_profiles_option
@also_option
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--count", type=click.IntRange(min=1), default=100, show_default=True, help="Tasks; kinds take turns.")
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="Index of the first task.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes, one per core.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the policy's draws.")
@click.option(
    "--baselines/--no-baselines", "with_baselines", default=True, show_default=True, help="Fly what there is to beat."
)
@click.option(
    "--train-flights",
    type=_FOLDER,
    default=Path("runs/flights/train"),
    show_default=True,
    help="Shards of training flights: the baselines are their means.",
)
@click.option("--out", type=_FOLDER, default=Path("runs/eval"), show_default=True, help="For eval.json and eval.md.")
@_KEY_FILE
@click.option("--json", "as_json", is_flag=True, help="Print eval.json instead of the tables.")
def eval_command(
    bundle: Path | None,
    server: str | None,
    profile: str | None,
    profile_file: Path | None,
    also: tuple[Path, ...],
    split: Literal["validation", "test"],
    count: int,
    first: int,
    workers: int,
    seed: int,
    with_baselines: bool,
    train_flights: Path,
    out: Path,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Fly held-out tasks and compare with the baselines, task by task.

    Example: worldvln-edge eval --bundle runs/demo/bundle --count 100 --train-flights runs/flights/train
    """
    import msgspec
    from tqdm import tqdm

    from worldvln_edge.atomic import atomic_file
    from worldvln_edge.generation_profile import EXACT
    from worldvln_edge.training.evaluation.baselines import read_action_tables
    from worldvln_edge.training.evaluation.evaluation import (
        BundlePilot,
        RemotePilot,
        check_bundle,
        check_server,
        evaluate,
    )
    from worldvln_edge.training.evaluation.evaluation_tables import evaluation_markdown
    from worldvln_edge.training.evaluation.flight_report import write_json
    from worldvln_edge.training.sim.tasks import generate_task

    refuse_without_bundle(bundle, profile, profile_file, also)
    source: BundlePilot | RemotePilot
    if bundle is not None and server is None:
        own = own_profiles(profile_file)
        check_bundle(bundle, profile or EXACT, own)
        source = BundlePilot(folder=bundle, profile=profile or EXACT, profiles=own, also=also)
    elif server is not None and bundle is None:
        key = _first_key(key_file)
        check_server(server, key)
        source = RemotePilot(server=server, key=key)
    else:
        raise click.UsageError("give either --bundle DIR or --server URL")
    tables = read_action_tables(train_flights) if with_baselines else None
    indices = tqdm(range(first, first + count), desc="tasks", unit="task")
    tasks = [generate_task(split, index) for index in indices]
    evaluation = evaluate(tasks, source, tables=tables, seed=seed, workers=workers)

    flown = str(bundle if bundle is not None else server)
    record = evaluation.to_json(
        policy=flown, split=split, first=first, train_flights=None if tables is None else tables.flights
    )
    markdown = evaluation_markdown(evaluation, f"{flown}: {count} {split} tasks from {first}, seed {seed}")
    write_json(out / "eval.json", record)
    with atomic_file(out / "eval.md") as building:
        building.write_text(markdown, encoding="utf-8")
    click.echo(msgspec.json.encode(record).decode() if as_json else markdown + f"\n{out / 'eval.json'}")


@click.command("train")
@click.option(
    "--preset", "preset_name", default="nano", show_default=True, help="nano (CPU) or mini (GPU, --device cuda)."
)
@click.option("--data", type=_FOLDER, required=True, help="Shards that `worldvln-edge sim flights` wrote.")
@click.option("--out", type=_FOLDER, required=True, help="Checkpoint folder to write.")
@click.option("--work", type=_FOLDER, required=True, help="Finished stages; a stopped run goes on from here.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most that many flights.")
@click.option(
    "--share",
    type=click.FloatRange(min=0.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Multiplies the steps of every stage; small numbers rehearse.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to train.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
def train_command(
    preset_name: str,
    data: Path,
    out: Path,
    work: Path,
    seed: int,
    limit: int | None,
    share: float,
    device: Literal["cpu", "cuda"],
    threads: int,
) -> None:
    """Train VAE, world model and action heads, one after the other, and write a checkpoint.

    Example: worldvln-edge train --data runs/flights/train --out runs/nano --work runs/nano-work
    """
    from worldvln_edge.presets import preset
    from worldvln_edge.training.sim.shards import list_shards

    config = preset(preset_name)
    list_shards(data)  # a wrong folder is refused before torch loads, which takes seconds

    import torch

    from worldvln_edge.training.stages.pipeline import Recipe, train_model

    torch.set_num_threads(threads)
    recipe = Recipe() if share == 1.0 else Recipe().scaled(share)
    train_model(config, data, work, out, seed=seed, recipe=recipe, limit=limit, device=device)
    click.echo(f"{out}: checkpoint of {preset_name}, loss curve in {out / 'loss_curve.jsonl'}")


@click.command("demo")
@click.option("--out", type=_FOLDER, default=Path("runs/demo"), show_default=True, help="Bundle, JSON and pictures.")
@click.option("--tasks", type=click.IntRange(min=1), default=8, show_default=True, help="Held-out tasks to fly.")
@click.option("--checkpoint", type=_FOLDER, help="Fly this checkpoint.  [default: the one in the package]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the policy's draws.")
@click.option("--video/--no-video", "with_video", default=True, show_default=True, help="Render the camera videos.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
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


def _first_key(key_file: Path | None) -> str | None:
    if key_file is None:
        return None
    from worldvln_edge.runtime.doors.access import read_key_file

    return read_key_file(key_file)[0]
