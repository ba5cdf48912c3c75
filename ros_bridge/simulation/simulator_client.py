"""Client of the simulator's HTTP service (`worldvln-edge sim serve`): one drone, one flight at a time.

Source: spec/seed_systems.md 3.4.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from worldvln_edge.tasks import Task

_TIMEOUT_S = 60.0
_IDLE_S = 1.0
"""A connection that was idle for longer is not trusted: the service closes it after 5 s."""
_MAX_FRAMES = 10**6
_HEADERS = {"Content-Type": "application/msgpack"}


class SimulatorError(RuntimeError):
    """The simulator is not there, or refuses. The message says where and what it said."""


@dataclass(frozen=True, kw_only=True)
class SimulatedView:
    """What the drone sees and where it is.

    Attributes:
        frame_HW3: uint8 RGB.
        pose: float64 [6], cm and deg (spec/session_protocol.md 3).
        has_collided: in the step that led here.
    """

    frame_HW3: np.ndarray
    pose: np.ndarray
    has_collided: bool


class _Error(msgspec.Struct):
    message: str


class _Frames(msgspec.Struct):
    shape: tuple[int, int, int, int]
    data: bytes


class _Result(msgspec.Struct):
    """Of one drone: what was asked for, or why there is none."""

    error: _Error | None = None
    frames: _Frames | None = None
    poses: list[list[float]] = []
    collided: list[bool] = []


class _Answer(msgspec.Struct):
    error: _Error | None = None
    failed: dict[str, _Result] = {}
    results: dict[str, _Result] = {}


class SimulatorClient:
    """One connection, kept open. Not thread-safe.

    Args:
        url: `http://host:port`.
        image_hw: rows and columns of the frames.
        key: API key, where the service asks for one.

    Raises:
        SimulatorError: the URL is none.
    """

    def __init__(self, url: str, image_hw: tuple[int, int], key: str | None = None):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise SimulatorError(f"{url!r} is no address of a simulator; give one such as http://127.0.0.1:8765")
        self._url, self._image_hw = url, image_hw
        self._headers = _HEADERS if key is None else {**_HEADERS, "Authorization": f"Api-Key {key}"}
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
        self._id = f"ros-{os.getpid()}"
        self._is_flying = False
        self._used_s = 0.0

    def reset(self, task: Task) -> SimulatedView:
        """Stand at the start of a task. Raises SimulatorError."""
        self._end()
        told = msgspec.structs.replace(task, reference_path_raw=(), reference_path_preprocessed=())
        environment = {"task": msgspec.to_builtins(told)}
        request = {"envs": {self._id: environment}, "image_hw": self._image_hw, "max_frames": _MAX_FRAMES}
        failed = self._post("create", request).failed.get(self._id)
        if failed is not None:
            raise SimulatorError(f"{self._url} cannot fly task {task.task_id!r}: {_reason(failed.error)}")
        self._is_flying = True
        return self._view("reset", {"ids": [self._id]})

    def step(self, action: np.ndarray) -> SimulatedView:
        """Fly one action [6] (cm, deg; translation first). Raises SimulatorError."""
        rows = {"values": [[float(value) for value in action]], "kind": "body_delta"}
        return self._view("step", {"actions": {self._id: rows}})

    def close(self) -> None:
        """Give the drone back. Raises SimulatorError."""
        try:
            self._end()
        finally:
            self._connection.close()

    def _end(self) -> None:
        if self._is_flying:
            self._is_flying = False
            self._post("close", {"ids": [self._id]})

    def _view(self, call: str, request: Mapping[str, object]) -> SimulatedView:
        result = self._post(call, request).results.get(self._id, _Result())
        if result.error is not None:
            raise SimulatorError(f"{self._url} failed: {result.error.message}")
        if result.frames is None or not result.poses or not result.collided:
            raise SimulatorError(f"{self._url} answered {call} without a frame or a pose; {_WRONG}")
        frames = np.frombuffer(result.frames.data, np.uint8).reshape(result.frames.shape)
        pose = np.array(result.poses[-1], np.float64)
        return SimulatedView(frame_HW3=frames[-1], pose=pose, has_collided=result.collided[-1])

    def _post(self, call: str, request: Mapping[str, object]) -> _Answer:
        if time.monotonic() - self._used_s > _IDLE_S:
            self._connection.close()  # the service may have done so already; the request opens another
        try:
            self._connection.request("POST", f"/v1/env/{call}", msgspec.msgpack.encode(request), self._headers)
            response = self._connection.getresponse()
            body = response.read()
            self._used_s = time.monotonic()
        except (OSError, http.client.HTTPException) as failure:
            self._connection.close()
            raise SimulatorError(
                f"no simulator answers at {self._url} ({failure}); start one with `worldvln-edge sim serve`"
            ) from failure
        try:
            answer = msgspec.msgpack.decode(body, type=_Answer)
        except msgspec.MsgspecError as refusal:
            raise SimulatorError(
                f"{self._url} answered {response.status}, but not as a simulator; {_WRONG}"
            ) from refusal
        if response.status != 200:
            raise SimulatorError(f"{self._url} refused to {call}: {_reason(answer.error)}")
        return answer


_WRONG = "it must be a `worldvln-edge sim serve` of this version"


def _reason(error: Any) -> str:
    return "no reason was given" if error is None else error.message
