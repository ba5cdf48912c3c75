"""The dashboard over HTTP: the page for everybody, its data and its buttons for who may connect.

| route                                | answer                                                                        |
|--------------------------------------|-------------------------------------------------------------------------------|
| GET /dashboard                       | the page; it holds no data and needs no key                                   |
| GET /dashboard/api/states            | newline-delimited JSON, for as long as the page reads: `FlightState` lists    |
| GET /dashboard/api/{uid}/frame       | the newest frame, as its client sent it                                       |
| GET /dashboard/api/{uid}/predicted   | PNG: the predicted frames of the last segment, side by side                   |
| POST /dashboard/api/{uid}            | JSON `{"prompt": "..."}` or `{"hold": true}`                                  |

Everything below `api` asks for the server's API key, and shows and moves the sessions of that key only. A page of
another origin is refused; without keys the address must be an IP address or localhost, so that no foreign name can be
made to point here (DNS rebinding).
Source: spec/session_protocol.md 7.6.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from urllib.parse import urlsplit

import msgspec
import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from worldvln_edge.image_header import UnknownFormatError, read_image_header
from worldvln_edge.protocol import ProtocolError
from worldvln_edge.runtime.dashboard.flight_board import FlightBoard
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.entrance import client_address
from worldvln_edge.runtime.doors.http_errors import error_response
from worldvln_edge.runtime.sessions.session_manager import SessionManager

PAGE_PATH = "/dashboard"
_FILES = {
    "index.html": "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_DATA_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}
_MOST_COMMAND_BYTES = 16_384


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator wants; what is left out stays."""

    prompt: str | None = None
    hold: bool | None = None


class DashboardDoor:
    """Routes of the dashboard.

    Args:
        manager: whose sessions are shown.
        access: who may connect.
        has_keys: whether `access` asks for a key.
    """

    def __init__(self, manager: SessionManager, access: AccessRule, *, has_keys: bool):
        self._manager, self._access, self._has_keys = manager, access, has_keys
        self.board = FlightBoard()
        manager.events.subscribe(self.board.watch)

    @property
    def routes(self) -> list[BaseRoute]:
        api = f"{PAGE_PATH}/api"
        return [
            Route(PAGE_PATH, _to_page),
            Route(f"{PAGE_PATH}/{{file:str}}", _page_file),
            Route(f"{PAGE_PATH}/", _page),
            Route(f"{api}/states", self._states),
            Route(f"{api}/{{uid}}/frame", self._frame),
            Route(f"{api}/{{uid}}/predicted", self._predicted),
            Route(f"{api}/{{uid}}", self._command, methods=["POST"]),
        ]

    def _peer(self, request: Request) -> str:
        """Raises ProtocolError `unauthorized` or `forbidden`."""
        headers: Mapping[str, str] = request.headers
        host = headers.get("host", "")
        if not self._has_keys and not _is_address(host):
            raise ProtocolError("forbidden", "without API keys, open the dashboard by IP address or as localhost")
        scheme, _, place = headers.get("origin", "").partition("://")
        if scheme in ("http", "https") and place == host:  # the page itself
            headers = {name: value for name, value in headers.items() if name != "origin"}
        peer = self._access.peer(headers)
        # Of its own: a page that is looked at must not take the requests of the flight that it shows.
        self._manager.request_rate.take(f"dashboard {peer or client_address(request)}")
        return peer

    async def _states(self, request: Request) -> Response:
        try:
            peer = self._peer(request)
        except ProtocolError as error:
            return error_response(error)

        async def lines() -> AsyncIterator[bytes]:
            async for states in self.board.states(peer):
                yield msgspec.json.encode(states) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=_DATA_HEADERS)

    async def _frame(self, request: Request) -> Response:
        try:
            found = self.board.last_frame(self._peer(request), request.path_params["uid"])
        except ProtocolError as error:
            return error_response(error)
        if found is None:
            return Response(status_code=204)
        data, media_type = await run_in_threadpool(_picture, *found)
        return Response(data, media_type=media_type, headers=_DATA_HEADERS)

    async def _predicted(self, request: Request) -> Response:
        try:
            frames = await self._manager.operator.predicted_frames(self._peer(request), request.path_params["uid"])
        except ProtocolError as error:
            return error_response(error)
        if frames is None:
            return Response(status_code=204)
        strip = await run_in_threadpool(_png, np.concatenate(list(frames), axis=1))
        headers = {**_DATA_HEADERS, "x-frames": str(len(frames))}
        return Response(strip, media_type="image/png", headers=headers)

    async def _command(self, request: Request) -> Response:
        try:
            peer = self._peer(request)
            body = await self._body(request)
            try:
                command = msgspec.json.decode(body, type=Command)
            except msgspec.MsgspecError as error:
                raise ProtocolError("bad_request", f"not a command: {error}") from None
            if command.prompt is not None:
                self._check_prompt(command.prompt)
            self._manager.operator.steer(peer, request.path_params["uid"], prompt=command.prompt, hold=command.hold)
        except ProtocolError as error:
            return error_response(error)
        return Response(status_code=204)

    async def _body(self, request: Request) -> bytes:
        within_s = self._manager.limits.body_within_s
        try:
            return await asyncio.wait_for(_small_body(request), within_s)
        except asyncio.TimeoutError:
            raise ProtocolError("timeout", f"the command did not arrive within {within_s:g} s") from None
        except ClientDisconnect:
            raise ProtocolError("cancelled", "the page went away while it sent its command") from None

    def _check_prompt(self, prompt: str) -> None:
        most = self._manager.limits.max_prompt_chars
        if not prompt.strip():
            raise ProtocolError("invalid_field", "the instruction is empty")
        if len(prompt) > most:
            raise ProtocolError("too_large", f"the instruction is longer than {most} characters")


async def _small_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_COMMAND_BYTES:
            raise ProtocolError("too_large", f"a command has at most {_MOST_COMMAND_BYTES} bytes")
    return bytes(body)


async def _to_page(request: Request) -> Response:
    return RedirectResponse(f"{PAGE_PATH}/")


async def _page(request: Request) -> Response:
    return _file("index.html")


async def _page_file(request: Request) -> Response:
    name = request.path_params["file"]
    return _file(name) if name in _FILES else Response(status_code=404)


def _file(name: str) -> Response:
    data = resources.files("worldvln_edge.runtime.dashboard").joinpath("page").joinpath(name).read_bytes()
    return Response(data, media_type=_FILES[name], headers=_PAGE_HEADERS)


def _is_address(host: str) -> bool:
    """Does the Host header name this computer in a way that no foreign name server decides?"""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _picture(data: bytes | str | None, frame: np.ndarray) -> tuple[bytes, str]:
    """A frame for an `<img>`: as it was sent where browsers show that, else PNG at the model's size."""
    try:
        if isinstance(data, str):
            data = base64.b64decode(data.rpartition(",")[2])
        if data is not None:
            return data, f"image/{read_image_header(data).format.lower()}"
    except (UnknownFormatError, ValueError):
        pass
    return _png(frame), "image/png"


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
