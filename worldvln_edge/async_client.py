"""`SessionClient` for programs with an event loop.

    async with AsyncSessionClient("ipc:///run/worldvln/session.sock") as client:
        await client.start("Fly to the red car.")
        answer = await client.observe([camera.read()])

Source: spec/session_protocol.md 7.1 to 7.5.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldvln_edge.async_connection import AsyncServerConnection
from worldvln_edge.client_config import ClientConfig, ClientOptions
from worldvln_edge.client_errors import AnswerTimeoutError, ServerAddressError, ServerError, ServerUnreachableError
from worldvln_edge.client_flight import REPORTED, ActionAnswer, Close, Exchange, Flight, Open, Step, Steps
from worldvln_edge.protocol import Actions, Ping, Pong, Request, SessionState, Welcome
from worldvln_edge.tls_trust import TrustFileError

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in `typing` from Python 3.11 on

__all__ = [
    "ActionAnswer",
    "AnswerTimeoutError",
    "AsyncSessionClient",
    "ServerAddressError",
    "ServerError",
    "ServerUnreachableError",
    "TrustFileError",
]


class AsyncSessionClient:
    """One connection, one session at a time; calls made at once wait for each other. Lives on one event loop.

    Args:
        url: as for `SessionClient`.
        key: API key.
        options: as for `SessionClient`.

    Raises:
        ServerAddressError: as for `SessionClient`.
        TrustFileError: as for `SessionClient`.
        ValueError: as for `SessionClient`.
    """

    def __init__(self, url: str, key: str | None = None, **options: Unpack[ClientOptions]):
        self._config = ClientConfig(url=url, key=key, **options)
        self.url = self._config.url
        self._flight = Flight(self._config)
        self._connection: AsyncServerConnection | None = None
        self._turn = asyncio.Lock()

    @property
    def welcome(self) -> Welcome | None:
        """What the server said of itself; None without a connection."""
        return None if self._connection is None else self._connection.welcome

    @property
    def session(self) -> str | None:
        """Name of the session, to resume it from another client; None before `start`."""
        return self._flight.session

    async def __aenter__(self) -> AsyncSessionClient:
        self._connection = await AsyncServerConnection.connect(self._config)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. The session stays on the server (see `end`) and can be resumed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def start(
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
        """See `SessionClient.start`."""
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
        async with self._turn:
            state = await self._ask(request, SessionState)
            self._flight.started(request, state)
        return state

    async def observe(
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
        """See `SessionClient.observe`. Arrays are compressed on a thread, so the loop goes on."""
        async with self._turn:
            make_request = partial(
                self._flight.observe_request,
                frames,
                first=first,
                segment=segment,
                prompt=prompt,
                deadline_ms=deadline_ms,
                t_ns=t_ns,
                poses=poses,
            )
            is_compressed = all(isinstance(frame, bytes) for frame in frames)
            request = make_request() if is_compressed else await asyncio.to_thread(make_request)
            try:
                answer = await self._ask(request, Actions)
            except ServerError as error:
                self._flight.refused(error)
                raise
            return self._flight.observed(answer)

    async def end(self) -> SessionState:
        """Free the session on the server. Harmless if it is gone already."""
        async with self._turn:
            state = await self._ask(self._flight.end_request(), SessionState)
            self._flight.ended()
        return state

    async def ping(self) -> Pong:
        """The server's clock, load and readiness."""
        async with self._turn:
            return await self._ask(Ping(id=0, t_ns=time.time_ns()), Pong)

    async def _ask(self, request: Request, kind: type) -> Any:
        steps = self._flight.ask(request, kind, is_open=self._connection is not None)
        return await self._carry_out(steps)

    async def _carry_out(self, steps: Steps) -> Any:
        result: Any = None
        failure: Exception | None = None
        while True:
            try:
                step = steps.send(result) if failure is None else steps.throw(failure)
            except StopIteration as end:
                return end.value
            result, failure = None, None
            try:
                result = await self._do(step)
            except REPORTED as error:
                failure = error

    async def _do(self, step: Step) -> Any:
        if isinstance(step, Exchange):
            assert self._connection is not None, "steps open a connection first"
            return await self._connection.exchange(step.request, step.kind)
        if isinstance(step, Open):
            self._connection = await AsyncServerConnection.connect(self._config)
        elif isinstance(step, Close):
            await self.close()
        else:
            await asyncio.sleep(step.seconds)
        return None
