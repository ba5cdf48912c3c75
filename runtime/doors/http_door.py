"""The compatible HTTP API: published research clients fly against it unmodified.

One POST carries new frames and brings back the next segment's actions; its prompt opens the session. Bodies are bounded
in size and time before they are parsed, and parsed and decoded off the event loop.
Source: spec/session_protocol.md 2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from worldvln_edge.images import ImageError, decode_image_string
from worldvln_edge.protocol import Limits, ProtocolError
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.entrance import client_address
from worldvln_edge.runtime.doors.http_errors import error_response
from worldvln_edge.runtime.doors.http_request import PredictRequest, parse_predict_request
from worldvln_edge.runtime.sessions.device_queue import Ticket
from worldvln_edge.runtime.sessions.frame_decoding import decode_each, image_limits
from worldvln_edge.runtime.sessions.implicit_session import (
    ImplicitAnswer,
    ImplicitCall,
    ReadinessRule,
    Wording,
    door_session_name,
)
from worldvln_edge.runtime.sessions.session_events import SentFrame
from worldvln_edge.runtime.sessions.session_manager import SessionManager
from worldvln_edge.wire import check_session_name

PREDICT_PATH = "/v1/predict_delta_actions"
_LARGE_BYTES = 256 * 1024  # bodies above this are parsed on a thread: the event loop must go on answering
_NOT_READY_RETRY_MS = 2000
_WORDING = Wording(
    reset_needs_prompt="reset_session requires instruction/prompt",
    first_call_needs_prompt="First call of a session must provide instruction/prompt",
    frames_needed="images_base64 is required",
)
_FAILURES = {
    "internal": "InfinityStar inference failed: internal error",
    "nonfinite_actions": "stage2 latent2action inference failed: actions are not finite",
}


class HttpDoor:
    """POST /v1/predict_delta_actions.

    Args:
        manager: the sessions.
        access: who may call.
        resets_on_one_frame: a prompt together with exactly one image starts afresh (2.5).
    """

    def __init__(self, manager: SessionManager, access: AccessRule, *, resets_on_one_frame: bool = True):
        self._manager, self._access = manager, access
        self._resets_on_one_frame = resets_on_one_frame
        self._bodies = _BodyRoom(manager.limits.max_stored_bytes)

    async def predict(self, request: Request) -> Response:
        """Answer one call; every refusal is a JSON body with `detail` and `code` (2.3)."""
        with self._bodies.hold() as take:
            return await self._predict(request, take)

    async def _predict(self, request: Request, take: Callable[[int], None]) -> Response:
        arrived_s = asyncio.get_running_loop().time()
        try:
            peer = self._access.peer(request.headers)
            self._manager.request_rate.take(peer or client_address(request))
            fields = await self._read(request, take)
            if not self._manager.is_ready:
                raise ProtocolError("not_ready", "the server is not ready", retry_ms=_NOT_READY_RETRY_MS)
            call = self._checked_call(fields)
        except ProtocolError as error:
            self._manager.meter.refused(error.code)
            return error_response(error)
        ticket = Ticket()
        watch = asyncio.create_task(_cancel_when_gone(request.receive, ticket))
        try:
            answer = await self._manager.call(peer, call, ticket=ticket, arrived_s=arrived_s)
        except ProtocolError as error:
            return error_response(error, detail=_FAILURES.get(error.code))
        finally:
            watch.cancel()
        return JSONResponse(self._answer(answer, with_prompt=fields.debug))

    async def _read(self, request: Request, take: Callable[[int], None]) -> PredictRequest:
        limits = self._manager.limits
        if _content_length(request.headers) > limits.max_msg_bytes:
            raise _too_large(limits)
        if not _is_json(request.headers.get("content-type")):
            raise ProtocolError("unsupported_media", "send application/json")
        try:
            body = await asyncio.wait_for(_receive(request, limits, take), limits.body_within_s)
        except asyncio.TimeoutError:
            raise ProtocolError("timeout", f"the body did not arrive within {limits.body_within_s:g} s") from None
        except ClientDisconnect:
            raise ProtocolError("cancelled", "the client went away while it sent its request") from None
        if len(body) > _LARGE_BYTES:
            return await asyncio.to_thread(parse_predict_request, body, limits)
        return parse_predict_request(body, limits)

    def _checked_call(self, fields: PredictRequest) -> ImplicitCall:
        limits = self._manager.limits
        if not fields.session_id:
            raise ProtocolError("bad_request", "session_id is required")
        try:
            check_session_name(fields.session_id, limits)
        except ProtocolError:
            raise ProtocolError("bad_request", "session_id too long or has control characters") from None
        for text in (fields.prompt, fields.negative_prompt):
            if text is not None and len(text) > limits.max_prompt_chars:
                raise ProtocolError("too_large", f"prompt is longer than {limits.max_prompt_chars} characters")
        if len(fields.images_base64) > limits.max_images:
            raise ProtocolError("too_large", f"more than {limits.max_images} images")
        return ImplicitCall(
            session=door_session_name("http", fields.session_id),
            frames=_ImageStrings(fields.images_base64, limits),
            wording=_WORDING,
            prompt=fields.prompt,
            negative_prompt=fields.negative_prompt,
            seed=fields.seed,
            reset=fields.reset_session,
            restarts_on_one_frame=self._resets_on_one_frame,
            needs_frames=True,
            first=None if fields.prefix_mode else fields.first_frame,  # a prefix sent again asks for the next segment
            is_prefix=fields.prefix_mode,
            rule=ReadinessRule(ahead=fields.allow_future_segments, last_ahead=fields.allow_future_last_segment),
        )

    def _answer(self, answer: ImplicitAnswer, *, with_prompt: bool) -> dict[str, object]:
        """Body of 200 (2.2)."""
        horizon, chunk, ms = self._manager.policy.info.horizon, answer.chunk, answer.ms
        left = horizon.segments - 1 - answer.emitted
        body: dict[str, object] = {
            "actions": [] if chunk is None else chunk.actions.tolist(),
            "segment_index": -1 if chunk is None else chunk.segment,
            "num_received_frames": answer.frames,
            "prefix_latents": 0 if chunk is None else prefix_latents(chunk.segment, horizon.points),
            "done": answer.frames >= horizon.num_frames or left == 0,
            "used_prompt": answer.prompt if with_prompt else None,
            "segments_left": left,
            "need_frames": answer.need,
            "timing": {
                "queue_ms": ms.queue,
                "decode_ms": ms.decode,
                "infer_ms": ms.infer,
                "total_ms": ms.total,
                "head": "latent" if chunk is None else chunk.head,
            },
        }
        return body if answer.hold is None else body | {"hold": answer.hold}


def prefix_latents(segment: int, points: tuple[int, ...]) -> int:
    """Latent frames up to the end of an emitted segment (1)."""
    return (points[segment + 1] - 1) // 4 + 1


class _ImageStrings:
    """`FrameBatch` of data URLs or bare base64 texts."""

    def __init__(self, texts: list[str], limits: Limits):
        self._texts, self._limits = texts, image_limits(limits)

    def __len__(self) -> int:
        return len(self._texts)

    def decode(self, new: slice, *, keep: int, room_bytes: int) -> list[np.ndarray]:
        return decode_each(self._texts[new], self._decode_one, room_bytes=room_bytes, keep=keep)

    def sent(self, new: slice) -> list[SentFrame]:
        return [SentFrame(text) for text in self._texts[new]]

    def _decode_one(self, text: str) -> np.ndarray:
        try:
            return decode_image_string(text, self._limits)
        except ImageError as error:
            detail = str(error) if error.code == "too_large" else f"decode images_base64 failed: {error}"
            raise ProtocolError(error.code, detail) from None


class _BodyRoom:
    """Bytes of request bodies that the door holds at the same time, from their arrival to their answer."""

    def __init__(self, most_bytes: int):
        self._most_bytes, self._held_bytes = most_bytes, 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes room for more bytes or raises ProtocolError `overloaded`; all is given back."""
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            if self._held_bytes + count > self._most_bytes:
                raise ProtocolError("overloaded", "too many large requests arrive at once", retry_ms=1000)
            mine += count
            self._held_bytes += count

        try:
            yield take
        finally:
            self._held_bytes -= mine


async def _receive(request: Request, limits: Limits, take: Callable[[int], None]) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limits.max_msg_bytes:
            raise _too_large(limits)
        take(len(chunk))
        body += chunk
    return bytes(body)


def _too_large(limits: Limits) -> ProtocolError:
    return ProtocolError("too_large", f"request body is larger than {limits.max_msg_bytes} bytes")


def _content_length(headers: Mapping[str, str]) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _is_json(content_type: str | None) -> bool:
    """A missing header is taken for JSON."""
    if content_type is None:
        return True
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


async def _cancel_when_gone(receive: Receive, ticket: Ticket) -> None:
    """After the body the only message is that the client closed its connection: nobody waits for the work."""
    while (await receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()
