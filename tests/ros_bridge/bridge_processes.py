"""The bridge's processes and a server, as programs of their own that a test can kill."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_CONFIG = """
[server]
url = "ws://127.0.0.1:{port}"

[dds]
domain_id = {domain}
network_interface = "lo"

[limits]
geofence_min_m = [-50, -50, 0]
geofence_max_m = [50, 50, 20]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class BridgeProcesses:
    """Processes by name (`server`, `setpoints`, `policy`), each started with its log in `folder`."""

    def __init__(self, folder: Path, via: str = "dds", settings: str = ""):
        self.folder, self._via = folder, via
        self.domain_id = 1 + os.getpid() % 200
        self._port = free_port()
        self.config = folder / "drone.toml"
        self.config.write_text(_CONFIG.format(port=self._port, domain=self.domain_id) + settings)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> subprocess.Popen[bytes]:
        arguments = [str(Path(__file__).with_name("forward_server.py")), str(self._port)]
        if name != "server":
            socket_path = self.folder / "setpoints.sock"
            arguments = ["-m", "worldvln_edge", "ros", name, "--via", self._via, "--config", str(self.config)]
            arguments += [] if name == "run" else ["--socket", str(socket_path)]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log, start_new_session=True)
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def end(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def bridge_processes(folder: Path, via: str = "dds", settings: str = "") -> Iterator[BridgeProcesses]:
    """`settings`: more sections of the configuration, in TOML."""
    processes = BridgeProcesses(folder, via, settings)
    try:
        yield processes
    finally:
        processes.end()
