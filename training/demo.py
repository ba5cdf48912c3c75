"""The first flight: export the packaged checkpoint, serve it as its own process, fly held-out tasks, show the flights.

Every room is used the way a user would: `export` and `serve` run as commands of their own.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from worldvln_edge.bundle import Bundle
from worldvln_edge.tasks import Task
from worldvln_edge.training.bundle_source import ensure_bundle
from worldvln_edge.training.flight_run import FlightRun, FlightRunConfig, fly_tasks
from worldvln_edge.training.sim.instructions import TASK_KINDS
from worldvln_edge.training.sim.tasks import generate_task

PACKAGED_CHECKPOINT = "nano"
_TENSOR_FILE = "model.safetensors"
_READY = re.compile(r"ready at (ws://\S+)")
_READY_TIMEOUT_S, _STOP_TIMEOUT_S = 180.0, 30.0
_COMMAND = (sys.executable, "-m", "worldvln_edge")


class DemoError(RuntimeError):
    """A step of the demo failed. The message says which one and where to look."""


@dataclass(frozen=True, kw_only=True)
class ServerProcess:
    url: str
    pid: int

    def rss_mb(self) -> float | None:
        """Resident memory, 10^6 bytes; None where there is no /proc."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        except OSError:
            return None
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        return None if found is None else round(int(found[1]) * 1024 / 1e6, 1)


def run_demo(checkpoint: Path, out: Path, *, tasks: int, seed: int = 0, with_video: bool = True) -> FlightRun:
    """Export, serve, fly and write everything of a flight run plus `bundle/` and `server.log` into `out`.

    Args:
        checkpoint: folder.
        out: folder; a bundle there that was made from the same checkpoint by the same exporter is used again.
        tasks: how many held-out tasks to fly; the first 18 are all of different kinds and scenes.
        seed: of the policy's draws.
        with_video: render the camera videos.

    Raises:
        DemoError: no checkpoint there, or the server failed.
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
    with serve_bundle(bundle_folder, out / "server.log") as server:

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


@contextmanager
def serve_bundle(bundle: Path, log: Path) -> Iterator[ServerProcess]:
    """`worldvln-edge serve` as a process of its own, on a free loopback port; stopped when the block ends.

    Args:
        bundle: what to serve.
        log: file for what the server says.

    Raises:
        DemoError: it ended, or was not ready in time.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_COMMAND, "serve", str(bundle), "--ws", "127.0.0.1:0"], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield ServerProcess(url=_wait_until_ready(process, log), pid=process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    give_up_s = time.monotonic() + _READY_TIMEOUT_S
    while True:
        has_ended = process.poll() is not None
        said = log.read_text(encoding="utf-8", errors="replace")
        found = _READY.search(said)
        if found is not None and not has_ended:
            return found[1]
        if has_ended:
            last = said.strip().rpartition("\n")[2] or "it said nothing"
            raise DemoError(
                f"the server ended with status {process.returncode} before it was ready: {last} (see {log})"
            )
        if time.monotonic() > give_up_s:
            raise DemoError(f"the server was not ready within {_READY_TIMEOUT_S:.0f} s; see {log}")
        time.sleep(0.05)
