"""`ServerConnection` on an event loop.

Source: spec/session_protocol.md 7.1, 7.2.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from worldvln_edge.client_config import ClientConfig
from worldvln_edge.client_errors import (
    AnswerTimeoutError,
    ConnectionLostError,
    MissingTransportError,
    ServerError,
    ServerUnreachableError,
)
from worldvln_edge.conversation import FULL_OR_STARTING, A, Call, Conversation
from worldvln_edge.protocol import Encoding, Request, Welcome
from worldvln_edge.server_address import is_zmq
from worldvln_edge.websocket_transport import AsyncWebSocketTransport


class AsyncTransport(Protocol):
    """See `connection.Transport`."""

    hello_key: str | None

    async def open(self) -> None: ...

    async def send(self, data: bytes, encoding: Encoding) -> None: ...

    async def receive(self) -> tuple[bytes, Encoding]: ...

    async def close(self) -> None: ...


class AsyncServerConnection:
    """Made by `connect`."""

    welcome: Welcome

    def __init__(self, config: ClientConfig):
        self._config = config
        self._conversation = Conversation(config.encoding)
        self._transport = _transport(config)

    @classmethod
    async def connect(cls, config: ClientConfig) -> AsyncServerConnection:
        """An open connection that has said hello. Raises what ServerConnection raises when it is opened."""
        connection = cls(config)
        try:
            await connection._transport.open()
            hello = connection._conversation.hello(connection._transport.hello_key)
            connection.welcome = await connection._carry(hello)
        except (ConnectionLostError, ServerError) as error:
            await connection.close()
            if isinstance(error, ServerError) and error.code not in FULL_OR_STARTING:
                raise
            raise ServerUnreachableError(config.url, error) from error
        except BaseException:
            await connection.close()
            raise
        connection._conversation.max_msg_bytes = connection.welcome.limits.max_msg_bytes
        return connection

    async def close(self) -> None:
        await self._transport.close()

    async def exchange(self, request: Request, kind: type[A]) -> A:
        """See `ServerConnection.exchange`."""
        return await self._carry(self._conversation.call(request, kind))

    async def _carry(self, call: Call[A]) -> A:
        timeout_s = self._config.answer_timeout_s
        try:
            return await asyncio.wait_for(self._send_and_wait(call), timeout_s)
        except asyncio.TimeoutError as error:
            raise AnswerTimeoutError(self._config.url, timeout_s) from error

    async def _send_and_wait(self, call: Call[A]) -> A:
        await self._transport.send(call.data, self._conversation.encoding)
        while True:
            answer = call.take(*await self._transport.receive())
            if answer is not None:
                return answer


def _transport(config: ClientConfig) -> AsyncTransport:
    if not is_zmq(config.url):
        return AsyncWebSocketTransport(config)
    try:
        from worldvln_edge.zmq_transport import AsyncZmqTransport  # pyzmq is no part of the base install
    except ModuleNotFoundError as error:
        raise MissingTransportError(config.url, "pyzmq") from error
    return AsyncZmqTransport(config)
