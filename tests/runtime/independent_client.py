"""A second client of the native protocol, written from docs/protocol.md alone; nothing of the package is imported.

Two doors, `WebSocketClient` and `ZmqClient`, each in msgpack or JSON. `Flight` flies one session over either: it counts
frames and segments, waits when the server is full, fills gaps, and resumes after a cut.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import socket as tcp
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as websocket_connect

Message = dict[str, Any]
Action = tuple[float, float, float, float, float, float]

VERSIONS = [1]
WAIT_CODES = frozenset({"busy", "overloaded", "not_ready", "timeout", "internal"})  # wait, then send the same again
DEFAULT_RETRY_S = 0.1
MAX_RETRY_S = 5.0
AXES = ("dx", "dy", "dz", "droll", "dyaw", "dpitch")
UNITS = ("cm", "cm", "cm", "deg", "deg", "deg")


def backoff(attempt: int) -> float:
    """Seconds to wait where the server gave no hint."""
    return min(DEFAULT_RETRY_S * 2.0**attempt, MAX_RETRY_S)


class ProtocolError(Exception):
    """The server said something that the page does not allow."""


class ConnectionLost(Exception):
    """The connection is gone, or silent for longer than the time limit."""


class ServerError(Exception):
    """An ``error`` answer, or a handshake that was refused with an HTTP status."""

    def __init__(self, answer: Message) -> None:
        super().__init__(f"{answer.get('code')}: {answer.get('msg')}")
        self.answer = answer
        self.code: str = str(answer.get("code"))
        self.retry = bool(answer.get("retry"))
        self.retry_ms: float | None = answer.get("retry_ms")
        self.expected: int | None = answer.get("expected")
        self.frames: int | None = answer.get("frames")
        self.error_id: str | None = answer.get("error_id")

    def wait_s(self, attempt: int) -> float | None:
        """How long to wait before the same is sent again; None where waiting does not help."""
        if self.code not in WAIT_CODES:
            return None
        return backoff(attempt) if self.retry_ms is None else self.retry_ms / 1000


@dataclass(frozen=True)
class Welcome:
    """What the server says of itself; distances in cm, angles in degrees."""

    version: int
    num_frames: int
    step: int
    points: tuple[int, ...]
    fps: float
    limits: Message
    raw: Message

    @classmethod
    def read(cls, answer: Message) -> Welcome:
        expect(answer, "welcome")
        if answer["v"] not in VERSIONS:
            raise ProtocolError(f"version {answer['v']!r} was not offered")
        if (tuple(answer["action"]["order"]), tuple(answer["action"]["units"])) != (AXES, UNITS):
            raise ProtocolError(f"unknown actions: {answer['action']}")
        points = tuple(answer["points"])
        if points[0] != 1 or points[-1] != answer["num_frames"] or list(points) != sorted(set(points)):
            raise ProtocolError(f"points {points}")
        return cls(answer["v"], answer["num_frames"], answer["step"], points, answer["fps"], answer["limits"], answer)


@dataclass(frozen=True)
class Chunk:
    """The answer to an ``observe``: the actions of at most one segment."""

    seg: int
    actions: tuple[Action, ...]
    frames: int
    need: int
    done: bool
    raw: Message

    @classmethod
    def read(cls, answer: Message, step: int) -> Chunk:
        expect(answer, "actions")
        seg, rows = answer["seg"], answer["actions"]
        if len(rows) != (0 if seg < 0 else step):
            raise ProtocolError(f"segment {seg} has {len(rows)} actions")
        for row in rows:
            if len(row) != 6 or not all(isinstance(x, float | int) and math.isfinite(x) for x in row):
                raise ProtocolError(f"not an action: {row!r}")
        return cls(seg, tuple(tuple(row) for row in rows), answer["frames"], answer["need"], answer["done"], answer)


def expect(answer: Message, kind: str) -> Message:
    """The answer, if it is of this kind."""
    if answer.get("t") != kind:
        raise ProtocolError(f"{kind} was expected, not {answer.get('t')!r}")
    return answer


class Client:
    """Requests and answers of one connection at a time; the two doors are subclasses."""

    def __init__(self, *, text: bool = False, key: str | None = None, timeout: float = 60.0, tries: int = 20) -> None:
        self.text, self.key, self.timeout, self.tries = text, key, timeout, tries
        self.welcome: Welcome | None = None
        self.byes: list[Message] = []
        self._hello: Message = {}  # what a door adds to hello
        self._next_id = 0
        self._answers: dict[int, Message] = {}

    # a door has these
    def _open(self) -> None:
        raise NotImplementedError

    def send_raw(self, data: bytes | str) -> None:
        """Send this, whatever it is."""
        raise NotImplementedError

    def _receive(self, timeout: float) -> bytes | str:
        raise NotImplementedError

    def close(self) -> None:
        """Close the connection; the session stays."""
        raise NotImplementedError

    def cut(self) -> None:
        """Break the connection without a goodbye, as a lost radio link does."""
        self.close()

    # connection
    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> Welcome:
        """Open a connection and say hello; a server that is away or starting is waited for."""
        for attempt in range(self.tries):
            self.close()
            self._answers.clear()
            try:
                self._open()
                return self.hello()
            except (ConnectionLost, ServerError) as error:
                wait = error.wait_s(attempt) if isinstance(error, ServerError) else backoff(attempt)
                if wait is None or attempt + 1 == self.tries:
                    raise
                time.sleep(wait)
        raise AssertionError

    def hello(self) -> Welcome:
        """Say hello on this connection."""
        self.welcome = Welcome.read(self.ask(t="hello", v=VERSIONS, client="independent", **self._hello))
        return self.welcome

    # requests
    def encode(self, request: Message) -> bytes | str:
        """Bytes for msgpack, text for JSON; images in ``frames`` become base64 in JSON."""
        if not self.text:
            return msgspec.msgpack.encode(request)
        if "frames" in request:
            request = request | {"frames": [base64.b64encode(frame).decode() for frame in request["frames"]]}
        return json.dumps(request)

    def submit(self, **request: Any) -> int:
        """Send a request, do not wait; its id."""
        self._next_id += 1
        data = self.encode({"id": self._next_id} | request)
        if self.welcome is not None and len(data) > self.welcome.limits["max_msg_bytes"]:
            raise ValueError("the message is above max_msg_bytes; the server would cut the connection")
        self.send_raw(data)
        return self._next_id

    def receive_any(self, timeout: float | None = None) -> Message:
        """The next message of the server, of whatever kind."""
        data = self._receive(self.timeout if timeout is None else timeout)
        message = json.loads(data) if isinstance(data, str) or data[:1] == b"{" else msgspec.msgpack.decode(data)
        if not isinstance(message, dict) or not isinstance(message.get("t"), str):
            raise ProtocolError(f"not a message: {message!r}")
        return message

    def collect(self, request_id: int) -> Message:
        """The answer to one request, errors included. Answers to others are kept for their own `collect`."""
        while request_id not in self._answers:
            message = self.receive_any()
            if message["t"] == "bye":
                self.byes.append(message)
                if message["reason"] == "shutdown":
                    raise ConnectionLost("the server stops")
            elif isinstance(message.get("re"), int):
                self._answers[message["re"]] = message
            elif message["t"] == "error":
                raise ServerError(message)
            else:
                raise ProtocolError(f"an answer to nothing: {message!r}")
        return self._answers.pop(request_id)

    def ask(self, **request: Any) -> Message:
        """Send a request once and return its answer; an error is raised."""
        answer = self.collect(self.submit(**request))
        if answer["t"] == "error":
            raise ServerError(answer)
        return answer

    def call(self, **request: Any) -> Message:
        """Like `ask`, but wait and send again when the server says so (`WAIT_CODES`)."""
        for attempt in range(self.tries):
            try:
                return self.ask(**request)
            except ServerError as error:
                wait = error.wait_s(attempt)
                if wait is None or attempt + 1 == self.tries:
                    raise
                time.sleep(wait)
        raise AssertionError

    def end(self, session: str) -> Message:
        """End a session; harmless for an unknown one."""
        return expect(self.call(t="end", session=session), "session")

    def cancel(self, target: int) -> Message:
        """Cancel a request of this connection; `collect` of the target then gives the error ``cancelled``."""
        return expect(self.call(t="cancel", target=target), "session")

    def ping(self) -> Message:
        """Clocks and load of the server."""
        return expect(self.call(t="ping", t_ns=time.time_ns()), "pong")


class WebSocketClient(Client):
    """The native WebSocket: ``ws://HOST:PORT/v1/session``."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(**options)
        self.url = url
        self.socket: ClientConnection | None = None
        self._stack = contextlib.ExitStack()

    def _open(self) -> None:
        headers = {"Authorization": f"Api-Key {self.key}"} if self.key else {}
        try:
            connecting = websocket_connect(
                self.url, compression=None, additional_headers=headers, max_size=None, open_timeout=self.timeout
            )
            self.socket = self._stack.enter_context(connecting)
        except InvalidStatus as error:
            with contextlib.suppress(ValueError, AttributeError):
                body = json.loads(bytes(error.response.body or b""))
                raise ServerError(body | {"msg": body["detail"]}) from error
            raise ServerError({"code": f"http_{error.response.status_code}", "msg": str(error)}) from error
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(str(error)) from error

    def send_raw(self, data: bytes | str) -> None:
        if self.socket is None:
            raise ConnectionLost("closed")
        try:
            self.socket.send(data)
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(str(error)) from error

    def _receive(self, timeout: float) -> bytes | str:
        if self.socket is None:
            raise ConnectionLost("closed")
        try:
            return self.socket.recv(timeout)
        except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
            raise ConnectionLost(str(error) or "no answer in time") from error

    def close(self) -> None:
        self.socket = None
        self._stack.close()

    def cut(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.socket.shutdown(tcp.SHUT_RDWR)


class ZmqClient(Client):
    """Native ZeroMQ: a DEALER socket, a new one for every connection."""

    def __init__(self, endpoint: str, **options: Any) -> None:
        super().__init__(**options)
        self.endpoint = endpoint
        self._hello = {"key": self.key} if self.key else {}
        self.socket: zmq.Socket[bytes] | None = None

    def _open(self) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(self.endpoint)

    def send_raw(self, data: bytes | str) -> None:
        if self.socket is None:
            raise ConnectionLost("closed")
        self.socket.send(data.encode() if isinstance(data, str) else data)

    def _receive(self, timeout: float) -> bytes | str:
        if self.socket is None:
            raise ConnectionLost("closed")
        if not self.socket.poll(round(timeout * 1000)):
            raise ConnectionLost("no answer in time")
        parts = self.socket.recv_multipart()
        if len(parts) != 1:
            raise ProtocolError(f"a message of {len(parts)} frames")
        return parts[0]

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close(0)
            self.socket = None


class Flight:
    """One session, on whatever connection its client has at the moment."""

    def __init__(self, client: Client, prompt: str, **start: Any) -> None:
        self.client = client
        answer = expect(client.call(t="start", prompt=prompt, **start), "session")
        self.session: str = answer["session"]
        self.log: list[bytes] = []  # all frames, so that a gap can be filled
        self.next_seg = 0
        self.resumes = 0
        self.done = False

    def resume(self, *, reconnect: bool = True) -> Message:
        """Say hello, on a new connection or on this one, and take the session up again."""
        self.resumes += 1
        if reconnect:
            self.client.connect()
        else:
            self.client.hello()
        return expect(self.client.call(t="start", session=self.session, resume=True), "session")

    def request(self, first: int, **keys: Any) -> Message:
        """The `observe` for the frames from `first` on; without new frames the newest one is sent again."""
        first = max(1, min(first, len(self.log)))
        seg = {} if self.done else {"seg": self.next_seg}
        return {"t": "observe", "session": self.session, "first": first, "frames": self.log[first - 1 :]} | seg | keys

    def observe(self, frames: Iterable[bytes] = (), **keys: Any) -> Chunk:
        """Send what was seen, get the next segment (or none, when it is not due).

        Waits while the server is full, fills gaps, reconnects and resumes. `prompt` and `deadline_ms` go through.
        After `deadline` or `cancelled` the frames are stored: call this again without frames to have the actions.
        """
        assert self.client.welcome is not None
        first = len(self.log) + 1
        self.log.extend(frames)
        for _ in range(self.client.tries):
            try:
                chunk = Chunk.read(self.client.call(**self.request(first, **keys)), self.client.welcome.step)
            except ConnectionLost:
                self._try_resume(reconnect=True)
            except ServerError as error:
                if error.code == "gap" and error.expected is not None and error.expected < first:
                    first = error.expected
                elif error.code == "hello_required":
                    self._try_resume(reconnect=False)
                else:
                    raise
            else:
                if chunk.seg >= 0 and chunk.seg != self.next_seg:
                    raise ProtocolError(f"segment {chunk.seg} in the place of {self.next_seg}")
                self.next_seg += chunk.seg >= 0
                self.done = chunk.done
                return chunk
        raise ConnectionLost("the session could not go on")

    def _try_resume(self, *, reconnect: bool) -> None:
        with contextlib.suppress(ConnectionLost):  # lost again on the way: the caller counts the attempts
            self.resume(reconnect=reconnect)

    def end(self) -> Message:
        """End the session."""
        return self.client.end(self.session)
