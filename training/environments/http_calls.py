"""What the server's doors share: who may call, bodies that are bounded in size and time, work off the event loop.

A refusal is `{"error": ...}` in every door: a text for published clients, `{"code", "message"}` in `/v1/env`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from worldvln_edge.protocol import ERRORS, Limits, ProtocolError
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.training.environments.env_messages import Encoding
from worldvln_edge.training.environments.environment import CapacityError, FrameSizeError

Handler: TypeAlias = Callable[[dict[str, Any], Encoding], dict[str, object]]
MEDIA_TYPES: dict[Encoding, str] = {"json": "application/json", "msgpack": "application/msgpack"}
_ENCODE: dict[Encoding, Callable[[object], bytes]] = {
    "json": msgspec.json.Encoder().encode,
    "msgpack": msgspec.msgpack.Encoder().encode,
}
_DECODE: dict[Encoding, Callable[[bytes], Any]] = {
    "json": msgspec.json.Decoder().decode,
    "msgpack": msgspec.msgpack.Decoder().decode,
}
_log = logging.getLogger(__name__)


class RefusedRequestError(ValueError):
    """A call that is wrong as a whole; nothing was done. `status` is the HTTP status, `code` a short name."""

    def __init__(self, message: str, status: int = 400, code: str = "bad_request"):
        super().__init__(message)
        self.status, self.code = status, code


class HttpCalls:
    """Makes routes of handlers. A handler takes the decoded body, runs on a thread, and returns the answer's body.

    Args:
        access: who may call.
        limits: `max_msg_bytes` and `body_within_s` bound a request.
        threads: where handlers run; each waits for simulators most of the time.
    """

    def __init__(self, access: AccessRule, limits: Limits, threads: ThreadPoolExecutor):
        self._access, self._limits, self._threads = access, limits, threads

    def post(self, path: str, handler: Handler, *, with_codes: bool = False) -> Route:
        """POST `path`.

        Args:
            with_codes: `/v1/env`: msgpack is understood beside JSON, and errors have codes.
        """

        async def answer(request: Request) -> Response:
            encoding: Encoding = "json"
            try:
                self._access.peer(request.headers)
                if with_codes:
                    encoding = _encoding(request)
                payload = _decode(await self._read(request), encoding)
                loop = asyncio.get_running_loop()
                body = await loop.run_in_executor(self._threads, lambda: _ENCODE[encoding](handler(payload, encoding)))
                return Response(body, media_type=MEDIA_TYPES[encoding])
            except Exception as error:  # the boundary to the network: a client gets a sentence, the log the traceback
                return _refusal(error, encoding, with_codes)

        return Route(path, answer, methods=["POST"])

    async def _read(self, request: Request) -> bytes:
        most, within_s = self._limits.max_msg_bytes, self._limits.body_within_s
        too_large = RefusedRequestError(f"send a body of 0 to {most} bytes", 413, "too_large")
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > most:
            raise too_large
        body = bytearray()

        async def receive() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > most:
                    raise too_large

        try:
            await asyncio.wait_for(receive(), within_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise RefusedRequestError(f"the body did not arrive within {within_s:g} s", 408, "timeout") from None
        return bytes(body)


def _encoding(request: Request) -> Encoding:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    for encoding, media_type in MEDIA_TYPES.items():
        if kind == media_type:
            return encoding
    raise RefusedRequestError("send application/json or application/msgpack", 415, "unsupported_media")


def _decode(body: bytes, encoding: Encoding) -> dict[str, Any]:
    try:
        payload = _DECODE[encoding](body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RefusedRequestError(f"payload is not {'JSON' if encoding == 'json' else 'msgpack'}") from None
    if not isinstance(payload, dict):
        raise RefusedRequestError("payload must be a json object")
    return payload


def _refusal(error: Exception, encoding: Encoding, with_codes: bool) -> Response:
    if isinstance(error, RefusedRequestError):
        status, code, message = error.status, error.code, str(error)
    elif isinstance(error, CapacityError):
        status, code, message = 409, "capacity", str(error)
    elif isinstance(error, FrameSizeError):
        status, code, message = 413, "frame_size", str(error)
    elif isinstance(error, ProtocolError):
        status, code, message = ERRORS[error.code].http or 400, error.code, error.msg
    elif isinstance(error, ClientDisconnect):
        status, code, message = 400, "cancelled", "the client went away while it sent its request"
    else:
        _log.error("a request failed", exc_info=error)
        status, code, message = 500, "internal", "the server failed; its log says why"
    body: object = message
    if with_codes:
        sizes = {}
        if isinstance(error, CapacityError):
            sizes = {"asked": error.asked, "in_use": error.in_use, "capacity": error.capacity}
        body = {"code": code, "message": message, **sizes}
    return Response(_ENCODE[encoding]({"error": body}), status_code=status, media_type=MEDIA_TYPES[encoding])
