"""The bridge's processes from a configuration in memory, started and stopped by somebody else's states."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import msgspec

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig
from worldvln_edge.ros_bridge.supervisor import SetpointProcessDiedError, Supervisor


class RunningBridge:
    """Both processes, from the constructor on until `stop`.

    Args:
        via: see `ports.opening.WAYS`.
        config: given to the processes as a file in a folder of their own.
    """

    def __init__(self, via: str, config: BridgeConfig):
        self._folder = tempfile.TemporaryDirectory(prefix="worldvln-ros-")
        folder = Path(self._folder.name)
        file = folder / "bridge.json"
        file.write_bytes(msgspec.json.encode(config))
        self._supervisor = Supervisor(via, file, folder / "setpoints.sock")
        self._why_ended: str | None = None
        self._thread = threading.Thread(target=self._run, name="bridge", daemon=True)
        self._thread.start()

    @property
    def why_ended(self) -> str | None:
        """Why it ended by itself; None while it runs."""
        return self._why_ended

    def stop(self) -> None:
        """End both processes, the policy first. Returns when they have ended."""
        self._supervisor.stop()
        self._thread.join()
        self._folder.cleanup()

    def _run(self) -> None:
        try:
            self._supervisor.run()
        except (SetpointProcessDiedError, OSError) as failure:  # OSError: no process could be started
            self._why_ended = str(failure)
