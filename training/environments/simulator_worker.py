"""A simulator process: `python -m worldvln_edge.training.environments.simulator_worker SOCKET MEMORY`.

Both are inherited file descriptors. The process says `Ready` once it can render, answers one request at a time
(`simulator_messages.py`), and ends when the other side closes the socket, however that came about.
"""

from __future__ import annotations

import logging
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np

from worldvln_edge.training.environments.episode import BadTaskError, Episode, SceneViews
from worldvln_edge.training.environments.frame_memory import FrameMemory
from worldvln_edge.training.environments.simulator_messages import (
    SPARE_VIEWS,
    Close,
    Create,
    Look,
    Ready,
    Refused,
    Reset,
    SimulatorReply,
    SimulatorRequest,
    WarmUp,
    decode_request,
    encode,
)
from worldvln_edge.training.sim.camera import RenderingUnavailableError, make_gl_context

_log = logging.getLogger(__name__)


class SimulatorWorker:
    """The episodes of one process.

    Args:
        memory: where frames are left for the owner.
    """

    def __init__(self, memory: FrameMemory) -> None:
        self._memory = memory
        self._views = SceneViews(spare=SPARE_VIEWS)
        self._episodes: dict[str, tuple[Episode, Create]] = {}

    def answer(self, request: SimulatorRequest) -> SimulatorReply:
        """Do what a request says. Whatever a single episode raises costs that episode only."""
        try:
            return self._answer(request)
        except BadTaskError as error:
            return Refused("bad_task", str(error))
        except Exception:  # the boundary to the renderer: whatever it raises must not end the other episodes
            _log.exception("the simulator failed")
            if not isinstance(request, WarmUp):
                self._drop(request.id)
            return Refused("simulator_failed", "the simulator failed; its stderr says why")

    def _answer(self, request: SimulatorRequest) -> SimulatorReply:
        if isinstance(request, Create):
            episode = Episode(request.task, self._views, image_hw=request.image_hw, order=request.order)
            self._drop(request.id)
            self._episodes[request.id] = episode, request
            return Ready()
        if isinstance(request, WarmUp):
            self._views.take(request.task, request.image_hw)[-1]()
            return Ready()
        if isinstance(request, Close):
            self._drop(request.id)
            return Ready()
        episode, made = self._episodes[request.id]
        if isinstance(request, Reset):
            return self._look(made, episode, episode.reset())
        if not episode.frame_index:
            return Refused("not_reset", "the drone stands nowhere yet; reset the environment before its first step")
        actions_N6 = np.frombuffer(request.actions, np.float64).reshape(-1, 6)
        return self._look(made, episode, episode.step(actions_N6, request.frames))

    def _look(self, made: Create, episode: Episode, seen: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Look:
        frames, poses, collided = seen
        self._memory.write(frames)
        count, rows, columns, _ = frames.shape
        return Look(
            frames=(count, rows, columns, 3),
            poses=poses.tobytes(),
            collided=collided.tobytes(),
            frame_index=episode.frame_index,
            done=episode.frame_index >= made.max_frames,
        )

    def _drop(self, id: str) -> None:
        episode, _ = self._episodes.pop(id, (None, None))
        if episode is not None:
            episode.close()

    def close(self) -> None:
        """Free every camera."""
        self._views.close()


def serve_requests(connection: Connection, memory: FrameMemory) -> None:
    """Answer until the other side is gone."""
    try:
        make_gl_context(8, 8).free()
    except RenderingUnavailableError as error:
        connection.send_bytes(encode(Refused("simulator_failed", str(error))))
        return
    worker = SimulatorWorker(memory)
    try:
        connection.send_bytes(encode(Ready()))
        while True:
            connection.send_bytes(encode(worker.answer(decode_request(connection.recv_bytes()))))
    except (EOFError, ConnectionError):
        worker.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the owner decides when to stop
    serve_requests(Connection(int(sys.argv[1])), FrameMemory(int(sys.argv[2])))
