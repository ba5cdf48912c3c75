"""`worldvln-edge serve` as a process of its own, for as long as somebody flies through it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from worldvln_edge.generation_profile import EXACT

_READY = re.compile(r"ready at (ws://\S+)")
_READY_TIMEOUT_S, _STOP_TIMEOUT_S = 180.0, 30.0


class ServedBundleError(RuntimeError):
    """The server did not come up. The message says why and where its log is."""


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


@contextmanager
def serve_bundle(
    bundle: Path,
    log: Path,
    *,
    profile: str = EXACT,
    profile_file: Path | None = None,
    also: Sequence[Path] = (),
    record: Path | None = None,
) -> Iterator[ServerProcess]:
    """Serve on a free loopback port; the server is stopped when the block ends.

    Args:
        bundle: what to serve.
        log: file for what the server says.
        profile: generation profile of its sessions.
        profile_file: JSON file with profiles of one's own.
        also: other exports of the same checkpoint, for profiles that name their precision.
        record: folder for recordings of its sessions; None: they are not recorded.

    Raises:
        ServedBundleError: it ended, or was not ready in time.
    """
    options = ["--ws", "127.0.0.1:0", "--profile", profile]
    if profile_file is not None:
        options += ["--profiles", str(profile_file)]
    for other in also:
        options += ["--also", str(other)]
    if record is not None:
        options += ["--record", str(record)]
    command = [sys.executable, "-m", "worldvln_edge", "serve", str(bundle), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
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
            raise ServedBundleError(
                f"the server ended with status {process.returncode} before it was ready: {last} (see {log})"
            )
        if time.monotonic() > give_up_s:
            raise ServedBundleError(f"the server was not ready within {_READY_TIMEOUT_S:.0f} s; see {log}")
        time.sleep(0.05)
