"""One simulator process, seen from its owner: started, asked with a time limit, killed and started again.

A process of its own keeps a fault of the renderer (a crash, a deadlock in the driver, memory) from the run. It is a
fresh interpreter behind a socket pair, not a fork: an OpenGL context does not survive one.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection

from worldvln_edge.training.environments.frame_memory import FrameMemory, make_frame_memory
from worldvln_edge.training.environments.simulator_messages import (
    Refused,
    SimulatorReply,
    SimulatorRequest,
    decode_reply,
    encode,
)

_COMMAND = ("-m", "worldvln_edge.training.environments.simulator_worker")
_START_WITHIN_S = 60.0
_STALLED_AFTER_S = 10
"""A message that has begun may not pause longer than this."""
_END_WITHIN_S = 2.0


class SimulatorStartError(RuntimeError):
    """A simulator process cannot be started, or cannot render."""


class SimulatorLostError(RuntimeError):
    """The process died or hung; whatever it held is gone. The next `ask` starts another one."""


class SimulatorProcess:
    """Use it from one thread at a time; `pid` may be read from any."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory: FrameMemory | None = None

    @property
    def memory(self) -> FrameMemory:
        """Where the frames of the last answer lie."""
        if self._memory is None:
            raise RuntimeError("no simulator process runs, so there are no frames")
        return self._memory

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start unless it runs.

        Raises:
            SimulatorStartError: it did not come up; its stderr says more.
        """
        if self._process is not None:
            return
        try:
            self._launch()
        except OSError as error:
            self.stop()
            raise SimulatorStartError(f"cannot start a simulator process: {error}") from error
        try:
            reply = self._receive(_START_WITHIN_S)
        except SimulatorLostError as error:
            raise SimulatorStartError(f"a simulator process did not start: {error}; its stderr says more") from None
        if isinstance(reply, Refused):
            self.stop()
            raise SimulatorStartError(reply.message)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(True)  # whatever default others have set: rospy sets one of 60 s
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STALLED_AFTER_S, 0))
            self._memory = make_frame_memory()
            fds = theirs.fileno(), self._memory.fd
            self._process = subprocess.Popen(
                [sys.executable, *_COMMAND, *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints must not mix with the owner's results
                pass_fds=fds,
            )
            self._connection = Connection(ours.detach())

    def ask(self, request: SimulatorRequest, within_s: float) -> SimulatorReply:
        """Send a request and wait for its answer.

        Raises:
            SimulatorLostError: it died, did not answer in time (then it is killed), or cannot be started again.
        """
        try:
            self.start()
        except SimulatorStartError as error:
            raise SimulatorLostError(str(error)) from error
        assert self._connection is not None
        try:
            self._connection.send_bytes(encode(request))
        except BlockingIOError:
            raise SimulatorLostError(self._bury("did not take a request and was killed")) from None
        except OSError:
            raise SimulatorLostError(self._bury("died")) from None
        return self._receive(within_s)

    def stop(self) -> None:
        """End the process, by force when it does not end by itself; may be called twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(_END_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _receive(self, within_s: float) -> SimulatorReply:
        assert self._connection is not None
        try:
            if not self._connection.poll(within_s):
                raise SimulatorLostError(self._bury(f"did not answer within {within_s:g} s and was killed"))
            return decode_reply(self._connection.recv_bytes())
        except BlockingIOError:
            raise SimulatorLostError(self._bury("stopped in the middle of an answer and was killed")) from None
        except (EOFError, OSError):
            raise SimulatorLostError(self._bury("died")) from None

    def _bury(self, what: str) -> str:
        """Kill it, unless it is dead, and say what happened."""
        assert self._process is not None
        pid, own_end = self._process.pid, None
        if what == "died":
            with contextlib.suppress(subprocess.TimeoutExpired):
                own_end = self._process.wait(_END_WITHIN_S)  # the socket closes a moment before the process is gone
        self._process.kill()
        self.stop()
        if own_end is None:
            return f"simulator process {pid} {what}"
        how = f"was killed by signal {-own_end}" if own_end < 0 else f"ended with status {own_end}"
        return f"simulator process {pid} {how}"
