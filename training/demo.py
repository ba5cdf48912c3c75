"""The first flight: export the packaged checkpoint, serve it as its own process, fly held-out tasks, show the flights.

Every room is used the way a user would: `export` and `serve` run as commands of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from worldvln_edge.bundle import Bundle
from worldvln_edge.runtime.recording.recorder import SUFFIX
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.bundle_source import ensure_bundle
from worldvln_edge.training.evaluation.flight_run import FlightRun, FlightRunConfig, fly_tasks
from worldvln_edge.training.evaluation.served_bundle import serve_bundle
from worldvln_edge.training.sim.instructions import TASK_KINDS
from worldvln_edge.training.sim.tasks import generate_task

PACKAGED_CHECKPOINT = "nano"
_TENSOR_FILE = "model.safetensors"


class DemoError(RuntimeError):
    """A step of the demo failed. The message says which one and where to look."""


def run_demo(checkpoint: Path, out: Path, *, tasks: int, seed: int = 0, with_video: bool = True) -> FlightRun:
    """Export, serve, fly; into `out` go everything of a flight run, `bundle/`, `recordings/` and `server.log`.

    Args:
        checkpoint: folder.
        out: folder; a bundle there that was made from the same checkpoint by the same exporter is used again.
        tasks: how many held-out tasks to fly; the first 18 are all of different kinds and scenes.
        seed: of the policy's draws.
        with_video: render the camera videos.

    Raises:
        DemoError: no checkpoint there.
        ServedBundleError: the server failed.
        ExportFailedError: the export failed.
        BundleError: the exported bundle does not open.
        Everything that `fly_tasks` raises.
    """
    out.mkdir(parents=True, exist_ok=True)
    bundle_folder = out / "bundle"
    tensors = checkpoint / _TENSOR_FILE
    if not tensors.is_file():
        raise DemoError(
            f"{checkpoint} is no checkpoint: {_TENSOR_FILE} is missing; train one with `worldvln-edge train`"
        )
    ensure_bundle(checkpoint, bundle_folder)
    bundle = Bundle.open(bundle_folder)
    flown = demo_tasks(tasks)
    recordings = out / "recordings"
    for older in recordings.glob(f"*{SUFFIX}"):  # of an earlier demo
        older.unlink()
    with serve_bundle(bundle_folder, out / "server.log", record=recordings) as server:

        def measure() -> dict[str, float | None]:
            return {
                "server_rss_mb": server.rss_mb(),
                "bundle_mb": round(bundle.size_bytes / 1e6, 2),
                "checkpoint_mb": round(tensors.stat().st_size / 1e6, 2),
            }

        config = FlightRunConfig(server=server.url, seed=seed, with_video=with_video)
        return fly_tasks(flown, out, config, measure=measure)


def demo_tasks(count: int) -> list[Task]:
    """Held-out tasks, chosen by number alone: the next kind and the next scene every time."""
    stride = len(TASK_KINDS) + 1
    return [generate_task("test", stride * number) for number in range(count)]


@contextmanager
def packaged_checkpoint() -> Iterator[Path]:
    """Folder of the checkpoint that comes with the package.

    Raises:
        DemoError: this installation has none.
    """
    with resources.as_file(resources.files("worldvln_edge") / "checkpoints" / PACKAGED_CHECKPOINT) as folder:
        if not folder.is_dir():
            raise DemoError(
                f"this installation holds no packaged checkpoint {PACKAGED_CHECKPOINT!r}; give one: --checkpoint DIR"
            )
        yield folder
