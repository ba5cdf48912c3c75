"""Fly against a server: connect, start a session, send the frames you see, execute the actions you get.

    with SessionClient("ws://127.0.0.1:8001") as client:
        client.start("Fly to the red car.")
        answer = client.observe([camera.read()])
        while not answer.done:
            answer = client.observe([step_and_read(action) for action in answer.actions])

A lost connection is opened again and the unanswered request repeated; the protocol makes that safe.
Source: spec/session_protocol.md 7.1 to 7.5.
"""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
from PIL import Image

from worldvln_edge.connection import (
    A,
    AnswerTimeoutError,
    ConnectionLostError,
    ServerConnection,
    ServerError,
    ServerUnreachableError,
    session_url,
)
from worldvln_edge.images import check_rgb
from worldvln_edge.protocol import (
    UNSET,
    Actions,
    Encoding,
    End,
    Observe,
    Ping,
    Pong,
    Request,
    SessionState,
    StageTimes,
    Start,
    Welcome,
)

__all__ = ["ActionAnswer", "AnswerTimeoutError", "ServerError", "ServerUnreachableError", "SessionClient"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


@dataclass(frozen=True, kw_only=True)
class ActionAnswer:
    """What came back for an observation."""

    segment: int
    """Emitted segment, -1 if none was ready: send `need` more frames."""
    actions: np.ndarray
    """float32 [step, 6] (or [0, 6]), cm and deg, order poses.ACTION_ORDER, to be applied translation first."""
    frames: int
    need: int
    done: bool
    """All segments were emitted; these actions are the last and still have to be executed."""
    head: str
    seed: int
    server_ms: StageTimes
    t_ns: int | None
    is_late: bool
    hold: str | None
    """Why the safety envelope replaced the actions by zero motion; None if it did not."""
    profile: str | None = None
    """Generation profile that was flown; None where no segment was emitted."""
    why: str | None = None
    """Why that profile, where the deadline chose it."""


class SessionClient:
    """One connection, one session at a time. Not thread-safe.

    Args:
        url: `ws://host:port`, `wss://...` or `host:port`; without a path, the native protocol's is used.
        key: API key.
        encoding: how messages are written; msgpack is smaller and faster.
        frame_format: how arrays are sent: `jpeg` (small) or `rgb8` (exact, 3 bytes a pixel).
        jpeg_quality: 1..95.
        connect_timeout_s: for one attempt.
        answer_timeout_s: longest wait for one answer.
        reconnect_s: how long to try again after a lost connection; 0 does not try.
        proxy: URL of an HTTP or SOCKS proxy; None connects directly, whatever the environment says.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        encoding: Encoding = "msgpack",
        frame_format: Literal["jpeg", "rgb8"] = "jpeg",
        jpeg_quality: int = 90,
        connect_timeout_s: float = 10.0,
        answer_timeout_s: float = 600.0,
        reconnect_s: float = 30.0,
        proxy: str | None = None,
    ):
        self.url = session_url(url)
        self._frame_format, self._jpeg_quality = frame_format, jpeg_quality
        self._reconnect_s = reconnect_s
        self._connect = lambda: ServerConnection(
            self.url,
            key=key,
            encoding=encoding,
            connect_timeout_s=connect_timeout_s,
            answer_timeout_s=answer_timeout_s,
            proxy=proxy,
        )
        self._connection: ServerConnection | None = None
        self._session: str | None = None
        self._frames, self._emitted, self._done = 0, -1, False

    @property
    def welcome(self) -> Welcome | None:
        """What the server said of itself; None without a connection."""
        return None if self._connection is None else self._connection.welcome

    @property
    def session(self) -> str | None:
        """Name of the session, to resume it from another client; None before `start`."""
        return self._session

    def __enter__(self) -> SessionClient:
        self._connection = self._connect()
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
    ) -> SessionState:
        """Open a session, replacing one of the same name, or resume one.

        Args:
            prompt: the instruction; not needed to resume.
            session: its name; default: a random one.
            emit: `ahead` plans from the first frame of a segment, `behind` waits until its last.

        Raises:
            ServerError, ServerUnreachableError.
        """
        name = session if session is not None else secrets.token_hex(16)
        request = Start(
            id=0,
            session=name,
            prompt=prompt,
            seed=seed,
            negative_prompt=negative_prompt,
            emit=emit,
            resume=resume,
        )
        state = self._ask(request, SessionState)
        self._session, self._frames, self._emitted = name, state.frames, state.emitted
        self._done = state.state == "done"
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
            t_ns, poses: capture time and pose [x, y, z, roll, yaw, pitch] (cm, deg) of every frame, for the log.

        Raises:
            ServerError: `gap`, `deadline`, `bad_image`, ... (spec/session_protocol.md 7.7).
            AnswerTimeoutError: the server is there and does not answer; the same call may be made again.
            ServerUnreachableError: the connection was lost and could not be opened again.
            ValueError: a frame is neither encoded bytes nor uint8 [H, W, 3], or `start` was not called.
        """
        if self._session is None:
            raise ValueError("no session; call start(prompt) first")
        if segment is None and not self._done:
            segment = self._emitted + 1  # named, so that repeating the request can never emit two segments
        images, size = self._encode_frames(frames)
        request = Observe(
            id=0,
            session=self._session,
            first=self._frames + 1 if first is None else first,
            frames=images,
            fmt="auto" if size is None else "rgb8",
            h=None if size is None else size[0],
            w=None if size is None else size[1],
            seg=segment,
            prompt=prompt,
            deadline_ms=deadline_ms,
            t_ns=None if t_ns is None else [int(value) for value in t_ns],
            poses=None if poses is None else [tuple(float(value) for value in pose) for pose in poses],  # type: ignore[misc]
        )
        try:
            answer = self._ask(request, Actions)
        except ServerError as error:
            if error.frames is not None:
                self._frames = error.frames
            raise
        self._frames, self._done = answer.frames, answer.done
        self._emitted = max(self._emitted, answer.seg)
        return ActionAnswer(
            segment=answer.seg,
            actions=np.asarray(answer.actions, dtype=np.float32).reshape(-1, 6),
            frames=answer.frames,
            need=answer.need,
            done=answer.done,
            head=answer.head,
            seed=answer.seed,
            server_ms=answer.ms,
            t_ns=None if answer.t_ns is UNSET else answer.t_ns,
            is_late=answer.late is True,
            hold=None if answer.hold is UNSET else answer.hold,
            profile=None if answer.profile is UNSET else answer.profile,
            why=None if answer.why is UNSET else answer.why,
        )

    def end(self) -> SessionState:
        """Free the session on the server. Harmless if it is gone already."""
        if self._session is None:
            raise ValueError("no session; call start(prompt) first")
        state = self._ask(End(id=0, session=self._session), SessionState)
        self._session, self._frames, self._emitted, self._done = None, 0, -1, False
        return state

    def ping(self) -> Pong:
        """The server's clock, load and readiness."""
        return self._ask(Ping(id=0, t_ns=time.time_ns()), Pong)

    def _encode_frames(self, frames: Sequence[np.ndarray | bytes]) -> tuple[list[bytes], tuple[int, int] | None]:
        """Images of one message, and (H, W) if they are raw rgb8."""
        arrays = [check_rgb(frame) for frame in frames if not isinstance(frame, bytes)]
        if self._frame_format == "jpeg" or not arrays:
            return [frame if isinstance(frame, bytes) else self._jpeg(frame) for frame in frames], None
        if len(arrays) < len(frames) or len({array.shape for array in arrays}) > 1:
            raise ValueError("with frame_format='rgb8' all frames of a call must be arrays of one size")
        return [np.ascontiguousarray(array).tobytes() for array in arrays], arrays[0].shape[:2]

    def _jpeg(self, image_HW3: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image_HW3).save(buffer, "JPEG", quality=self._jpeg_quality)
        return buffer.getvalue()

    def _ask(self, request: Request, kind: type[A]) -> A:
        """Send and wait for the answer; after a lost connection open it again, resume, and send again."""
        give_up_s: float | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                    if self._session is not None and not isinstance(request, Start | End):
                        self._connection.exchange(Start(id=0, session=self._session, resume=True), SessionState)
                return self._connection.exchange(request, kind)
            except AnswerTimeoutError:
                self.close()
                raise
            except (ConnectionLostError, ServerUnreachableError) as lost:
                self.close()
                now_s = time.monotonic()
                give_up_s = now_s + self._reconnect_s if give_up_s is None else give_up_s
                if now_s + pause_s > give_up_s:
                    raise ServerUnreachableError(self.url, lost) from lost
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
