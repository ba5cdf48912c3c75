"""`worldvln-edge ros run`: starts both processes, and the policy again when it dies; moves nothing itself."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)
_LOOK_S = 0.05
_PAUSE_S = 1.0
_STOP_S = 5.0


class SetpointProcessDiedError(RuntimeError):
    """Without it nothing flies, so the bridge ends."""


class Supervisor:
    """
    Args:
        via, config_file: passed on to both processes.
        socket_path: where they meet.
    """

    def __init__(self, via: str, config_file: Path, socket_path: Path):
        self._options = ["--via", via, "--config", str(config_file), "--socket", str(socket_path)]
        self._socket_path = socket_path
        self._stopping = threading.Event()
        self._policy: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """Return from `run` soon."""
        self._stopping.set()

    def run(self) -> None:
        """Watch both processes until `stop`. Raises SetpointProcessDiedError."""
        setpoints = self._start("setpoints")
        try:
            while not self._stopping.wait(_LOOK_S):
                if setpoints.poll() is not None:
                    raise SetpointProcessDiedError(
                        f"the setpoint process ended with status {setpoints.returncode}; its last lines say why"
                    )
                self._keep_policy()
        finally:
            # The policy first, so that the drone holds until setpoints end.
            for process in (self._policy, setpoints):
                if process is not None:
                    _end(process)

    def _keep_policy(self) -> None:
        if self._policy is None:
            if self._socket_path.is_socket():
                self._policy = self._start("policy")
        elif self._policy.poll() is not None:
            _log.error("the policy ended with status %s; it is started again", self._policy.returncode)
            self._stopping.wait(_PAUSE_S)
            self._policy = None

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        # The policy ends with the line to the setpoint process.
        parent = ["--parent", str(os.getpid())] if name == "setpoints" else []
        return subprocess.Popen([sys.executable, "-m", "worldvln_edge", "ros", name, *self._options, *parent])


def end_with_parent(parent: int, stop: Callable[[], None]) -> None:
    """Call `stop` when the process `parent`, which started this one, has ended: the next `ros run` starts a setpoint
    process of its own, and two of them must never fly one drone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        _log.error("the process that started this one has ended, so setpoints end")
        stop()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
