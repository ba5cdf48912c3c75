"""How a refusal looks over HTTP: a JSON body with `detail` and `code`, and never a traceback.

Source: spec/session_protocol.md 2.3, 7.7.
"""

from __future__ import annotations

import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from worldvln_edge.protocol import ERRORS, ProtocolError
from worldvln_edge.runtime.doors.http_request import InvalidRequestError
from worldvln_edge.runtime.sessions.policy_calls import internal_error

_STATUS_WITHOUT_HTTP = 400


def error_response(error: ProtocolError, *, detail: str | None = None) -> Response:
    """The answer to a refused request.

    Args:
        error: its code gives the status; `retry_ms` becomes Retry-After as well.
        detail: text for `detail`; default: the error's message, or the list of problems of a 422.
    """
    body: dict[str, object] = {"detail": error.msg if detail is None else detail, "code": error.code}
    if isinstance(error, InvalidRequestError):
        body["detail"] = msgspec.to_builtins(error.problems)
    status = ERRORS[error.code].http or _STATUS_WITHOUT_HTTP
    if error.frames is not None and status >= 500:  # the frames are kept, so a client must not send them again
        body["num_received_frames"] = error.frames
    extra = {"expected": error.expected, "retry_ms": error.retry_ms, "error_id": error.error_id}
    body |= {name: value for name, value in extra.items() if value is not None}
    headers = {}
    if error.retry_ms is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_ms / 1000))
    return JSONResponse(body, status_code=status, headers=headers)


async def routing_error(request: Request, error: Exception) -> Response:
    """404 and 405, as the research service words them."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)


async def server_fault(request: Request, error: Exception) -> Response:
    """A fault of ours: the log has it under the id that the client gets."""
    return error_response(internal_error(error))
