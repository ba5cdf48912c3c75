"""What a client knows of its session, and what it does next: shared by the blocking and the asynchronous client.

Nothing here touches the network. `Flight` makes requests and takes answers in; `Flight.ask` is a generator that yields
one `Step` after another (open, exchange, close, pause), is sent what came of it, and returns the answer. A client only
carries the steps out.
Source: spec/session_protocol.md 7.2 to 7.4.
"""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from worldvln_edge.client_config import ClientConfig
from worldvln_edge.client_errors import (
    AnswerTimeoutError,
    ConnectionLostError,
    ServerError,
    ServerUnreachableError,
)
from worldvln_edge.images import check_rgb
from worldvln_edge.protocol import UNSET, Actions, End, Observe, Request, SessionState, StageTimes, Start

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
    is_settled: bool = False
    """Chained sessions: the drone has hardly moved for some steps, so it has probably arrived."""


@dataclass(frozen=True)
class Open:
    """Open a connection. Reports ServerUnreachableError."""


@dataclass(frozen=True)
class Exchange:
    """Send `request`, wait for an answer of type `kind`. Reports ConnectionLostError, AnswerTimeoutError."""

    request: Request
    kind: type


@dataclass(frozen=True)
class Close:
    """Close the connection, if there is one."""


@dataclass(frozen=True)
class Pause:
    seconds: float


Step = Open | Exchange | Close | Pause
Steps = Generator[Step, Any, Any]
REPORTED = (AnswerTimeoutError, ConnectionLostError, ServerError, ServerUnreachableError)
"""Errors of a step that are thrown into the generator; all others end the call."""


class _Patience:
    """Attempts until `total_s` after the first failure, with pauses that grow."""

    def __init__(self, total_s: float):
        self._total_s = total_s
        self._give_up_s: float | None = None
        self._next_pause_s = _FIRST_PAUSE_S

    def allows_another(self) -> bool:
        now_s = time.monotonic()
        if self._give_up_s is None:
            self._give_up_s = now_s + self._total_s
        return now_s + self._next_pause_s <= self._give_up_s

    def pause_s(self) -> float:
        pause_s, self._next_pause_s = self._next_pause_s, min(2 * self._next_pause_s, _LONGEST_PAUSE_S)
        return pause_s


class Flight:
    """One session as its client sees it."""

    def __init__(self, config: ClientConfig):
        self._config = config
        self.session: str | None = None
        self.frames, self.emitted, self.is_done = 0, -1, False

    def start_request(
        self,
        prompt: str | None,
        *,
        session: str | None,
        seed: int,
        negative_prompt: str,
        emit: Literal["ahead", "behind"],
        resume: bool,
        chain: bool,
        max_horizons: int | None,
    ) -> Start:
        name = session if session is not None else secrets.token_hex(16)
        return Start(
            id=0,
            session=name,
            prompt=prompt,
            seed=seed,
            negative_prompt=negative_prompt,
            emit=emit,
            resume=resume,
            chain=chain,
            max_horizons=max_horizons,
        )

    def started(self, request: Start, state: SessionState) -> None:
        self.session, self.frames, self.emitted = request.session, state.frames, state.emitted
        self.is_done = state.state == "done"

    def observe_request(
        self,
        frames: Sequence[np.ndarray | bytes],
        *,
        first: int | None,
        segment: int | None,
        prompt: str | None,
        deadline_ms: float | None,
        t_ns: Sequence[int] | None,
        poses: Sequence[Sequence[float]] | None,
    ) -> Observe:
        """Raises ValueError: no session, or a frame that is none."""
        session = self._require_session()
        if segment is None and not self.is_done:
            segment = self.emitted + 1  # named, so that repeating the request can never emit two segments
        images, size = self._encode_frames(frames)
        return Observe(
            id=0,
            session=session,
            first=self.frames + 1 if first is None else first,
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

    def observed(self, answer: Actions) -> ActionAnswer:
        self.frames, self.is_done = answer.frames, answer.done
        self.emitted = max(self.emitted, answer.seg)
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
            is_settled=answer.settled is True,
        )

    def refused(self, error: ServerError) -> None:
        """An observation was refused; its frames may have been stored all the same."""
        if error.frames is not None:
            self.frames = error.frames

    def end_request(self) -> End:
        return End(id=0, session=self._require_session())

    def ended(self) -> None:
        self.session, self.frames, self.emitted, self.is_done = None, 0, -1, False

    def ask(self, request: Request, kind: type, *, is_open: bool) -> Steps:
        """Send and wait for the answer; after a lost connection open it again, resume, and send again.

        A server that was just started, and is not ready yet, is asked again too.

        Args:
            is_open: whether there is a connection now.

        Raises:
            AnswerTimeoutError, ServerError, ServerUnreachableError.
        """
        patience = _Patience(self._config.reconnect_s)
        while True:
            try:
                if not is_open:
                    yield Open()
                    is_open = True
                    if self.session is not None and not isinstance(request, Start | End):
                        yield Exchange(Start(id=0, session=self.session, resume=True), SessionState)
                answer = yield Exchange(request, kind)
                return answer
            except AnswerTimeoutError:
                yield Close()
                raise
            except ServerError as refusal:
                if refusal.code != "not_ready" or not patience.allows_another():
                    raise
            except (ConnectionLostError, ServerUnreachableError) as lost:
                yield Close()
                is_open = False
                if not patience.allows_another():
                    raise ServerUnreachableError(self._config.url, lost) from lost
            yield Pause(patience.pause_s())

    def _require_session(self) -> str:
        if self.session is None:
            raise ValueError("no session; call start(prompt) first")
        return self.session

    def _encode_frames(self, frames: Sequence[np.ndarray | bytes]) -> tuple[list[bytes], tuple[int, int] | None]:
        """Images of one message, and (H, W) if they are raw rgb8."""
        arrays = [check_rgb(frame) for frame in frames if not isinstance(frame, bytes)]
        if self._config.frame_format == "jpeg" or not arrays:
            return [frame if isinstance(frame, bytes) else self._jpeg(frame) for frame in frames], None
        if len(arrays) < len(frames) or len({array.shape for array in arrays}) > 1:
            raise ValueError("with frame_format='rgb8' all frames of a call must be arrays of one size")
        return [np.ascontiguousarray(array).tobytes() for array in arrays], arrays[0].shape[:2]

    def _jpeg(self, image_HW3: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image_HW3).save(buffer, "JPEG", quality=self._config.jpeg_quality)
        return buffer.getvalue()
