"""A real roscore on a port of its own, for tests that need ROS 1."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bridge_processes import free_port


@contextlib.contextmanager
def ros_master(folder: Path) -> Iterator[str]:
    """Its URI, which `ROS_MASTER_URI` holds as long as it runs, for this process and those that it starts."""
    port = free_port()
    settings = {"ROS_MASTER_URI": f"http://127.0.0.1:{port}", "ROS_HOME": str(folder), "ROS_LOG_DIR": str(folder)}
    with pytest.MonkeyPatch.context() as patch, (folder / "roscore.log").open("wb") as log:
        for name, value in settings.items():
            patch.setenv(name, value)
        process = subprocess.Popen(["roscore", "-p", str(port)], stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(port, process, folder / "roscore.log")
            yield settings["ROS_MASTER_URI"]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + 60
    while True:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < give_up_s, log.read_text()
        time.sleep(0.1)
