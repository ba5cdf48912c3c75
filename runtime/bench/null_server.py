"""A server of the null policy in a process of its own: what a server costs without a model, and what it survives.

    with NullServerProcess(NullServerConfig()) as server:
        with SessionClient(server.url) as client: ...

The process ends with the one that started it: it stops when its standard input is closed.
Source: spec/session_protocol.md 7.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import msgspec

from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.runtime.sessions.process_memory import resident_bytes

_STARTS_WITHIN_S, _ENDS_WITHIN_S = 60.0, 40.0


class NullServerError(RuntimeError):
    """The server's process did not start, or ended, or would not end."""


class NullServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told."""

    limits: Limits = Limits()
    zmq_endpoints: tuple[str, ...] = ()
    """Besides the WebSocket and HTTP port, a free one of 127.0.0.1."""
    journal: str | None = None
    """Folder where sessions outlive the process."""
    infer_s: float = 0.0
    """Seconds that every segment occupies the device thread."""


class NullServerProcess:
    """The process as a context manager. Raises NullServerError where it does not start."""

    def __init__(self, config: NullServerConfig | None = None):
        self._config = config or NullServerConfig()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        """Of the native WebSocket."""
        self.zmq_urls: tuple[str, ...] = ()

    @property
    def http_url(self) -> str:
        """Base address of the HTTP routes."""
        return "http://" + self.url.split("/")[2]

    @property
    def port(self) -> int:
        return int(self.url.split("/")[2].rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self._started().pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def resident_bytes(self, field: str = "VmRSS") -> int:
        """See `process_memory.resident_bytes`. Raises NullServerError: not on Linux, or the process has ended."""
        found = resident_bytes(field, self.pid)
        if found is None:
            raise NullServerError("the server's memory cannot be read; it has ended, or this system is not Linux")
        return found

    def processor_s(self) -> float:
        """Processor time of all threads so far, seconds. Linux only."""
        # The clock of another process, as clock_getcpuclockid(3) numbers it.
        return time.clock_gettime((~self.pid << 3) | 2)

    def start(self) -> None:
        """Start, and wait until sessions can be started."""
        command = [
            sys.executable,
            "-m",
            "worldvln_edge.runtime.bench.null_server",
            msgspec.json.encode(self._config).decode(),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _STARTS_WITHIN_S)
        line = self._process.stdout.readline().decode() if ready else ""
        if not line.startswith("ws://"):
            self.kill()
            raise NullServerError("the null policy's server did not start; its last lines on standard error say why")
        self.url, *zmq_urls = line.split()
        self.zmq_urls = tuple(zmq_urls)

    def stop(self) -> int:
        """SIGTERM, and the exit status: 0 after an orderly end."""
        process = self._started()
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NullServerError(f"the server did not end within {_ENDS_WITHIN_S:g} s of SIGTERM") from None
        self._close_pipes(process)
        return status

    def kill(self) -> None:
        """SIGKILL: it dies without a word."""
        process = self._started()
        process.kill()
        process.wait()
        self._close_pipes(process)

    def __enter__(self) -> NullServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_running:
            return
        if error is None:
            self.stop()
        else:
            self.kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise NullServerError("the server was not started; use it in a `with` block")
        return self._process

    @staticmethod
    def _close_pipes(process: subprocess.Popen[bytes]) -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    """The process: `python -m worldvln_edge.runtime.bench.null_server CONFIG`, a NullServerConfig as JSON."""
    from worldvln_edge.runtime.doors.server import serve
    from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
    from worldvln_edge.runtime.sessions.session_journal import SessionJournal

    config = msgspec.json.decode(sys.argv[1], type=NullServerConfig)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(
        NullPolicy(infer_s=config.infer_s),
        port=0,
        limits=config.limits,
        zmq=ZmqConfig(endpoints=config.zmq_endpoints) if config.zmq_endpoints else None,
        journal=None if config.journal is None else SessionJournal(Path(config.journal)),
        on_ready=lambda addresses: print(addresses, flush=True),
    )


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
