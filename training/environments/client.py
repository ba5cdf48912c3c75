"""Environments of another machine, or of a server on this one: the same contract as `pool.LocalEnvironments`.

Every call opens a connection, which costs less than one frame and leaves none behind that could have gone stale.
Creating, resetting, closing and warming up are repeated when the connection breaks, because doing them twice is doing
them once. A step is not: nobody knows whether the drones moved, so its environments are `lost`.
Source: spec/seed_systems.md 3.4.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from worldvln_edge.tasks import Task
from worldvln_edge.training.environments.env_messages import ACTION_KIND, read_answer, read_fault
from worldvln_edge.training.environments.environment import (
    MAX_FRAMES,
    CapacityError,
    EnvironmentAnswer,
    EnvironmentFault,
    FrameChoice,
    FrameSizeError,
    check_actions,
    without_reference,
)

_CONNECT_WITHIN_S = 10.0
_MSGPACK = "application/msgpack"
_log = logging.getLogger(__name__)


class EnvironmentServerUnreachableError(RuntimeError):
    """No answer after several attempts."""


class EnvironmentServerError(RuntimeError):
    """The server refused a call as a whole, or what answers is no environment server. `code` is the server's."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class RemoteEnvironments:
    """`Environments` behind HTTP. A context manager: leaving it closes what was created through it.

    Args:
        url: such as http://127.0.0.1:8765.
        token: an API key, where the server asks for one.
        timeout_s: for the answer to one call; a batch answers when its slowest environment has.
        attempts: how often a call is made that may be repeated.
        pause_s: before the second attempt; it doubles after every one.

    Raises:
        ValueError: not an http:// or https:// address.
        EnvironmentServerUnreachableError, EnvironmentServerError: nobody answers there, or somebody else.
    """

    def __init__(
        self, url: str, token: str | None = None, *, timeout_s: float = 180.0, attempts: int = 4, pause_s: float = 0.5
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"an environment server is reached by http://HOST:PORT, found {url!r}")
        self._url = url.rstrip("/")
        self._connection_kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"Content-Type": _MSGPACK}
        if token is not None:
            self._headers["Authorization"] = f"Api-Key {token}"
        self._timeout_s, self._attempts, self._pause_s = timeout_s, attempts, pause_s
        self._prefix = f"{uuid.uuid4().hex}/"  # two clients may choose the same ids
        self._lock = threading.Lock()
        self._created: set[str] = set()
        capacity = self.health().get("capacity")
        if not isinstance(capacity, int):
            raise EnvironmentServerError(f"{url} is no environment server: its health tells no capacity", "protocol")
        self._capacity = capacity

    @property
    def capacity(self) -> int:
        """Of the whole server; other clients use it, too."""
        return self._capacity

    def health(self) -> dict[str, Any]:
        """What the server says about itself: `capacity`, `free`, `processes`, `lease_s`, ..."""
        return self._call("GET", "health", None)

    def create(
        self, tasks: Mapping[str, Task], *, image_hw: tuple[int, int], max_frames: int = MAX_FRAMES
    ) -> Mapping[str, EnvironmentFault]:
        """See `Environments.create`."""
        envs = {self._prefix + id: {"task": without_reference(task)} for id, task in tasks.items()}
        answer = self._call("POST", "create", {"envs": envs, "image_hw": image_hw, "max_frames": max_frames})
        try:
            failed = {self._own(id): read_fault(fault) for id, fault in self._map(answer, "failed").items()}
        except ValueError as error:
            raise self._misunderstood(error) from None
        with self._lock:
            self._created |= {id for id in tasks if id not in failed}
        return failed

    def reset(self, ids: Sequence[str]) -> Mapping[str, EnvironmentAnswer]:
        """See `Environments.reset`."""
        return self._results(self._call("POST", "reset", {"ids": [self._prefix + id for id in ids]}), ids)

    def step(
        self, actions: Mapping[str, np.ndarray], *, frames: FrameChoice = "each"
    ) -> Mapping[str, EnvironmentAnswer]:
        """See `Environments.step`."""
        checked = {id: check_actions(rows) for id, rows in actions.items()}
        refused: dict[str, EnvironmentAnswer] = {
            id: rows for id, rows in checked.items() if isinstance(rows, EnvironmentFault)
        }
        sent = {id: rows.tolist() for id, rows in checked.items() if isinstance(rows, np.ndarray)}
        body = {"actions": {self._prefix + id: {"kind": ACTION_KIND, "values": rows} for id, rows in sent.items()}}
        try:
            answer = self._call("POST", "step", {**body, "frames": frames}, may_repeat=False)
        except _BrokenCallError as error:
            fault = EnvironmentFault(
                code="lost",
                message=f"{error} in the middle of a step; whether the drone moved is unknown, create it again",
            )
            return refused | dict.fromkeys(sent, fault)
        return refused | self._results(answer, sent)

    def warm_up(self, tasks: Sequence[Task], *, image_hw: tuple[int, int]) -> None:
        """See `Environments.warm_up`."""
        self._call("POST", "warmup", {"tasks": [without_reference(task) for task in tasks], "image_hw": image_hw})

    def close(self, ids: Sequence[str]) -> None:
        """See `Environments.close`."""
        with self._lock:
            self._created -= set(ids)
        self._call("POST", "close", {"ids": [self._prefix + id for id in ids]})

    def shut_down(self) -> None:
        """Close every environment that is still open; the server's lease does it where nobody answers any more."""
        with self._lock:
            left = list(self._created)
        if left:
            try:
                self.close(left)
            except (EnvironmentServerUnreachableError, EnvironmentServerError) as error:
                _log.warning("%d environments were not closed: %s", len(left), error)

    def __enter__(self) -> RemoteEnvironments:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down()

    def _results(
        self, answer: Mapping[str, Any], ids: Sequence[str] | Mapping[str, Any]
    ) -> dict[str, EnvironmentAnswer]:
        results = self._map(answer, "results")
        ids = list(ids)
        missing = [id for id in ids if self._prefix + id not in results]
        if missing:
            raise EnvironmentServerError(f"{self._url} left out the results of {missing[:3]}", "protocol")
        try:
            return {id: self._named(read_answer(results[self._prefix + id])) for id in ids}
        except ValueError as error:
            raise self._misunderstood(error) from None

    def _named(self, answer: EnvironmentAnswer) -> EnvironmentAnswer:
        """With our own ids in its message."""
        if isinstance(answer, EnvironmentFault):
            return replace(answer, message=answer.message.replace(self._prefix, ""))
        return answer

    def _misunderstood(self, error: ValueError) -> EnvironmentServerError:
        return EnvironmentServerError(f"{self._url} is no environment server: {error}", "protocol")

    def _map(self, answer: Mapping[str, Any], name: str) -> dict[str, Any]:
        value = answer.get(name)
        if not isinstance(value, dict):
            raise EnvironmentServerError(f"{self._url} is no environment server: {name!r} is missing", "protocol")
        return value

    def _own(self, id: str) -> str:
        return id.removeprefix(self._prefix)

    def _call(self, method: str, name: str, body: object, *, may_repeat: bool = True) -> dict[str, Any]:
        """The answer's body. Raises _BrokenCallError only for a call that may not be repeated."""
        data = None if body is None else msgspec.msgpack.encode(body)
        pause_s = self._pause_s
        for attempt in range(1, self._attempts + 1):
            sent = False
            line = self._connection_kind(self._host, self._port, timeout=_CONNECT_WITHIN_S)
            try:
                line.connect()
                line.sock.settimeout(self._timeout_s)
                sent = True
                line.request(method, f"{self._path}/v1/env/{name}", data, self._headers)
                answer = line.getresponse()
                content = answer.read()
                if answer.status != 503:  # the server has no connection to spare: it did nothing
                    return self._read(answer, content)
                problem, sent = "has no connection to spare", False
            except TimeoutError:
                problem = f"did not answer within {self._timeout_s if sent else _CONNECT_WITHIN_S:g} s"
            except (OSError, http.client.HTTPException) as error:
                problem = f"{'broke the connection' if sent else 'cannot be reached'} ({error or type(error).__name__})"
            finally:
                line.close()
            if sent and not may_repeat:
                raise _BrokenCallError(f"{self._url} {problem}")
            if attempt < self._attempts:
                time.sleep(pause_s)
                pause_s *= 2
        raise EnvironmentServerUnreachableError(
            f"{self._url} {problem}, {self._attempts} times; is `worldvln-edge sim serve` running there?"
        )

    def _read(self, answer: http.client.HTTPResponse, content: bytes) -> dict[str, Any]:
        kind = answer.headers.get_content_type()
        try:
            body = (msgspec.msgpack.decode if kind == _MSGPACK else msgspec.json.decode)(content)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            body = None
        if not isinstance(body, dict):
            message = f"{self._url} is no environment server: it answered {answer.status} {kind}"
            raise EnvironmentServerError(message, "protocol")
        if answer.status == 200:
            return body
        error = body.get("error")
        details = error if isinstance(error, dict) else {"message": str(error)}
        code = str(details.get("code", answer.status))
        if code == "capacity":
            raise CapacityError(*(int(details.get(name, 0)) for name in ("asked", "in_use", "capacity")))
        if code == "frame_size":
            raise FrameSizeError(str(details.get("message")))
        raise EnvironmentServerError(f"{self._url} refused {answer.status}: {details.get('message')}", code)


class _BrokenCallError(RuntimeError):
    """A call that may not be repeated was cut off behind its sending."""
