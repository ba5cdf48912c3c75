"""Fly against a server: connect, start a session, send the frames you see, execute the actions you get.

    with SessionClient("ws://127.0.0.1:8001") as client:
        client.start("Fly to the red car.")
        answer = client.observe([camera.read()])
        while not answer.done:
            answer = client.observe([step_and_read(action) for action in answer.actions])

The same over WebSocket (ws://, wss://) and ZeroMQ (tcp://, ipc://): the address chooses. A lost connection is opened
again and the unanswered request repeated; the protocol makes that safe. `async_client.py` has the same for programs
with an event loop.
Source: spec/session_protocol.md 7.1 to 7.5.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldvln_edge.client_config import ClientConfig, ClientOptions
from worldvln_edge.client_errors import AnswerTimeoutError, ServerAddressError, ServerError, ServerUnreachableError
from worldvln_edge.client_flight import REPORTED, ActionAnswer, Close, Exchange, Flight, Open, Step, Steps
from worldvln_edge.connection import ServerConnection
from worldvln_edge.protocol import Actions, Ping, Pong, Request, SessionState, Welcome
from worldvln_edge.tls_trust import TrustFileError

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in `typing` from Python 3.11 on

__all__ = [
    "ActionAnswer",
    "AnswerTimeoutError",
    "ServerAddressError",
    "ServerError",
    "ServerUnreachableError",
    "SessionClient",
    "TrustFileError",
]


class SessionClient:
    """One connection, one session at a time. Not thread-safe.

    Args:
        url: `ws://host:port`, `wss://host:port`, `tcp://host:port` or `ipc:///path`.
        key: API key.
        options: the other attributes of `client_config.ClientConfig`, by name: `curve`, `ca_file`, `encoding`,
            `frame_format`, time-outs, ...

    Raises:
        ServerAddressError: not an address of one of these transports.
        TrustFileError: a file of keys or authorities cannot be used.
        ValueError: an option out of its range.
    """

    def __init__(self, url: str, key: str | None = None, **options: Unpack[ClientOptions]):
        self._config = ClientConfig(url=url, key=key, **options)
        self.url = self._config.url
        self._flight = Flight(self._config)
        self._connection: ServerConnection | None = None

    @property
    def welcome(self) -> Welcome | None:
        """What the server said of itself; None without a connection."""
        return None if self._connection is None else self._connection.welcome

    @property
    def session(self) -> str | None:
        """Name of the session, to resume it from another client; None before `start`."""
        return self._flight.session

    def __enter__(self) -> SessionClient:
        self._connection = ServerConnection(self._config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The session stays on the server (see `end`) and can be resumed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def start(
        self,
        prompt: str | None = None,
        *,
        session: str | None = None,
        seed: int = 0,
        negative_prompt: str = "",
        emit: Literal["ahead", "behind"] = "ahead",
        resume: bool = False,
        chain: bool = False,
        max_horizons: int | None = None,
    ) -> SessionState:
        """Open a session, replacing one of the same name, or resume one.

        Args:
            prompt: the instruction; not needed to resume.
            session: its name; default: a random one.
            emit: `ahead` plans from the first frame of a segment, `behind` waits until its last.
            chain: go on behind the model's horizon, for as long as frames come.
            max_horizons: of a chained session; None: as many as the server allows.

        Raises:
            ServerError: the server refused; its code says why.
            ServerUnreachableError: no connection could be opened.
        """
        request = self._flight.start_request(
            prompt,
            session=session,
            seed=seed,
            negative_prompt=negative_prompt,
            emit=emit,
            resume=resume,
            chain=chain,
            max_horizons=max_horizons,
        )
        state = self._ask(request, SessionState)
        self._flight.started(request, state)
        return state

    def observe(
        self,
        frames: Sequence[np.ndarray | bytes],
        *,
        first: int | None = None,
        segment: int | None = None,
        prompt: str | None = None,
        deadline_ms: float | None = None,
        t_ns: Sequence[int] | None = None,
        poses: Sequence[Sequence[float]] | None = None,
    ) -> ActionAnswer:
        """Send new frames, oldest first, and get the next segment's actions if they are ready.

        Args:
            frames: uint8 RGB [H, W, 3] arrays, or images already encoded as JPEG, PNG or WebP; may be empty.
            first: 1-based index of frames[0]; default: the one after the last that the server has.
            segment: wanted segment; default: the next. An earlier one is answered again without inference.
            prompt: replaces the instruction for the segments still to come.
            deadline_ms: actions later than this after arrival are useless; frames are stored all the same.
            t_ns: capture time of every frame, for the log.
            poses: pose [x, y, z, roll, yaw, pitch] (cm, deg) of every frame, for the log.

        Raises:
            ServerError: `gap`, `deadline`, `bad_image`, ... (spec/session_protocol.md 7.7).
            AnswerTimeoutError: the server is there and does not answer; the same call may be made again.
            ServerUnreachableError: the connection was lost and could not be opened again.
            ValueError: a frame is neither encoded bytes nor uint8 [H, W, 3], or `start` was not called.
        """
        request = self._flight.observe_request(
            frames, first=first, segment=segment, prompt=prompt, deadline_ms=deadline_ms, t_ns=t_ns, poses=poses
        )
        try:
            answer = self._ask(request, Actions)
        except ServerError as error:
            self._flight.refused(error)
            raise
        return self._flight.observed(answer)

    def end(self) -> SessionState:
        """Free the session on the server. Harmless if it is gone already."""
        state = self._ask(self._flight.end_request(), SessionState)
        self._flight.ended()
        return state

    def ping(self) -> Pong:
        """The server's clock, load and readiness."""
        return self._ask(Ping(id=0, t_ns=time.time_ns()), Pong)

    def _ask(self, request: Request, kind: type) -> Any:
        steps = self._flight.ask(request, kind, is_open=self._connection is not None)
        return self._carry_out(steps)

    def _carry_out(self, steps: Steps) -> Any:
        result: Any = None
        failure: Exception | None = None
        while True:
            try:
                step = steps.send(result) if failure is None else steps.throw(failure)
            except StopIteration as end:
                return end.value
            result, failure = None, None
            try:
                result = self._do(step)
            except REPORTED as error:
                failure = error

    def _do(self, step: Step) -> Any:
        if isinstance(step, Exchange):
            assert self._connection is not None, "steps open a connection first"
            return self._connection.exchange(step.request, step.kind)
        if isinstance(step, Open):
            self._connection = ServerConnection(self._config)
        elif isinstance(step, Close):
            self.close()
        else:
            time.sleep(step.seconds)
        return None
