"""`worldvln-edge sim serve` and `sim bench`. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from worldvln_edge.command_options import json_option, key_file_option

if TYPE_CHECKING:
    from worldvln_edge.poses import BodyOrder
    from worldvln_edge.training.environments.bench import BenchRow
    from worldvln_edge.training.environments.worldvln_door import ImageFormat
    from worldvln_edge.training.sim.tasks import Split

_side = click.IntRange(8, 4096)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0 takes a free one.")
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Simulators that render at once."
)
@click.option(
    "--per-process", type=click.IntRange(min=1), default=64, show_default=True, help="Environments in each of them."
)
@click.option(
    "--answer-within",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds for a creation, a reset or 16 actions of one environment; a slower simulator is killed.",
)
@click.option(
    "--lease",
    type=click.FloatRange(min=0.1),
    default=600.0,
    show_default=True,
    help="Seconds that an environment may be left alone before it is given back.",
)
@click.option(
    "--tasks",
    "task_root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of task files, one a task, that requests name by task_id.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="train",
    show_default=True,
    help="Of ActiveVLN's episodes that have no task file.",
)
@click.option("--family", type=click.Choice(["city", "rooms"]), default="city", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Scene of tasks that name none.")
@click.option(
    "--image-size", type=_side, default=256, show_default=True, help="Rows and columns of /reset and /step_actions."
)
@click.option(
    "--image-format",
    type=click.Choice(["jpeg", "png"]),
    default="jpeg",
    show_default=True,
    help="Of /reset and /step_actions; png is exact.",
)
@click.option(
    "--activevln-size",
    type=(_side, _side),
    default=(480, 640),
    show_default=True,
    metavar="ROWS COLUMNS",
    help="Of /batch/reset and /batch/step.",
)
@click.option(
    "--max-frame-side", type=_side, default=1024, show_default=True, help="Pixels; larger frames are refused."
)
@click.option(
    "--order",
    type=click.Choice(["trans_first", "yaw_first", "midpoint"]),
    default="trans_first",
    show_default=True,
    help="Heading of an action's translation; the research simulator uses yaw_first.",
)
@key_file_option("clients must show one of them")
@click.option("--allow-remote", is_flag=True, help="Listen beyond this machine without a key.")
def serve(
    host: str,
    port: int,
    processes: int,
    per_process: int,
    answer_within: float,
    lease: float,
    task_root: Path | None,
    split: Split,
    family: str,
    seed: int,
    image_size: int,
    image_format: ImageFormat,
    activevln_size: tuple[int, int],
    max_frame_side: int,
    order: BodyOrder,
    key_file: Path | None,
    allow_remote: bool,
) -> None:
    """Serve simulator environments over HTTP to rollouts and evaluators, until SIGTERM.

    Example: worldvln-edge sim serve --port 8765 --processes 2 --tasks runs/tasks
    """
    import asyncio

    from worldvln_edge.runtime.doors.access import read_key_file
    from worldvln_edge.tasks import SceneRef
    from worldvln_edge.training.environments.pool import PoolConfig
    from worldvln_edge.training.environments.server import EnvironmentServer, EnvironmentServerConfig

    config = EnvironmentServerConfig(
        pool=PoolConfig(
            processes=processes,
            per_process=per_process,
            answer_within_s=answer_within,
            max_side=max(max_frame_side, image_size, *activevln_size),
            order=order,
        ),
        lease_s=lease,
        image_hw=(image_size, image_size),
        image_format=image_format,
        activevln_image_hw=activevln_size,
        scene=SceneRef(family=family, seed=seed),
        task_root=task_root,
        split=split,
    )
    keys = () if key_file is None else read_key_file(key_file)
    server = EnvironmentServer(config, host, port, keys=keys, allow_remote=allow_remote)

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.is_listening and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            click.echo(f"the simulator is ready at {server.url}", err=True)
        await serving

    try:
        asyncio.run(run())
    finally:
        server.release()


@click.command()
@click.option(
    "--processes", type=click.IntRange(min=1), multiple=True, default=(1, 2), show_default=True, help="May be repeated."
)
@click.option("--environments", type=click.IntRange(min=1), default=16, show_default=True, help="Flights at once.")
@click.option("--image-size", type=_side, default=64, show_default=True, help="Rows and columns.")
@click.option("--rounds", type=click.IntRange(min=1), default=6, show_default=True, help="Of 16 actions each.")
@json_option("Print the rows as JSON.")
def bench(processes: tuple[int, ...], environments: int, image_size: int, rounds: int, as_json: bool) -> None:
    """Measure environment steps a second: one simulator, a pool of processes, and the same behind HTTP.

    Example: worldvln-edge sim bench --processes 1 --processes 2
    """
    from dataclasses import asdict

    from worldvln_edge.training.environments.bench import bench_table, run_bench

    def show(row: BenchRow) -> None:
        click.echo(f"{row.way}, {row.processes} processes: {row.steps_per_s:.0f} steps/s", err=True)

    rows = run_bench(
        processes=processes,
        environments=environments,
        image_hw=(image_size, image_size),
        rounds=rounds,
        on_row=show,
    )
    if as_json:
        click.echo(json.dumps([{**asdict(row), "steps_per_s": round(row.steps_per_s, 1)} for row in rows]))
    else:
        click.echo(bench_table(rows))
