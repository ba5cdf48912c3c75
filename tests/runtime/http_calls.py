"""What the tests of the HTTP door share: frames as texts, calls over one connection, a policy that remembers."""

import base64
import http.client
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy, NullSession
from worldvln_edge.runtime.sessions.policy import ActionChunk, NonFiniteActionsError


def frame(value: int = 127) -> str:
    """An image of one colour as a data URL; PNG, so that the colour arrives as it was."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def nonfinite(segment: int = 0) -> NonFiniteActionsError:
    """What a policy raises whose model gave NaN."""
    actions = np.full((16, 6), np.nan, np.float32)
    return NonFiniteActionsError(ActionChunk(segment=segment, actions=actions, observed_frames=1, seed=0))


class HttpCalls:
    """Calls of one client, over one kept connection."""

    def __init__(self, server: BackgroundServer, session_id: str = "s", *, headers: dict[str, str] | None = None):
        self._connection = http.client.HTTPConnection("127.0.0.1", server.server.http_port, timeout=10)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self.session_id = session_id

    def __enter__(self) -> "HttpCalls":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def send(self, body: bytes | str, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON body of the answer."""
        self._connection.request("POST", PREDICT_PATH, body, {**self._headers, **headers})
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def ask(self, images: list[str], **fields: Any) -> tuple[int, dict[str, Any]]:
        return self.send(json.dumps({"session_id": self.session_id, "images_base64": images, **fields}))

    def fly(self, images: list[str], **fields: Any) -> dict[str, Any]:
        """Body of an answer that must be 200."""
        status, answer = self.ask(images, **fields)
        assert status == 200, answer
        return answer

    def get(self, path: str) -> tuple[int, bytes]:
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        return answer.status, answer.read()


class RememberingPolicy(NullPolicy):
    """Keeps its sessions to be looked at."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.opened: list[RememberingSession] = []

    def new_session(self, prompt, *, seed=0, negative_prompt="", emit="ahead"):
        session = RememberingSession(self, prompt, seed=seed, emit=emit, negative_prompt=negative_prompt)
        self.opened.append(session)
        return session


class RememberingSession(NullSession):
    """Actions of a segment are all 1 + its index; what each one was asked with is kept."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.seen: list[int] = []
        self.asked_with: list[tuple[str, str, int]] = []
        self.fail_with: Exception | None = None

    def observe(self, frames, *, budget_s=None, **options):
        self.seen += [int(frame[0, 0, 0]) for frame in frames]
        if self.fail_with is not None:
            self.frames += len(frames)
            failure, self.fail_with = self.fail_with, None
            raise failure
        chunk = super().observe(frames)
        if chunk is None:
            return None
        self.asked_with.append((self.prompt, self.negative_prompt, self._seed))
        return ActionChunk(
            segment=chunk.segment,
            actions=np.full((16, 6), 1.0 + chunk.segment, np.float32) + np.arange(16, dtype=np.float32)[:, None] / 100,
            observed_frames=chunk.observed_frames,
            seed=chunk.seed,
        )
