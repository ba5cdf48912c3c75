"""The ASGI application of one policy's server: health, metrics, and which door is found on which port.

Source: spec/session_protocol.md 2.7.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from worldvln_edge import __version__
from worldvln_edge.protocol import PROTOCOL_VERSION
from worldvln_edge.runtime.doors.http_door import PREDICT_PATH
from worldvln_edge.runtime.doors.http_errors import routing_error, server_fault
from worldvln_edge.runtime.sessions.metrics import ServerMetrics
from worldvln_edge.runtime.sessions.session_manager import SessionManager

_SWEEP_S = 5.0


def create_app(manager: SessionManager, doors: Sequence[BaseRoute], metrics: ServerMetrics) -> Starlette:
    """The ASGI application: the doors' routes, `/healthz`, `/readyz`, `/health`, `/metrics`."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def readyz(request: Request) -> Response:
        return PlainTextResponse("ready\n") if manager.is_ready else PlainTextResponse("not ready\n", status_code=503)

    async def health(request: Request) -> Response:
        return JSONResponse(health_report(manager))

    # Of its own, because the text must neither hold up the event loop nor wait behind large messages.
    writer = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    async def read_metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        loop = asyncio.get_running_loop()
        text, content_type = await loop.run_in_executor(writer, metrics.exposition, accept)
        return Response(text, headers={"content-type": content_type})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(manager))
        try:
            yield
        finally:
            sweeper.cancel()
            writer.shutdown(wait=False)
            manager.close()

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/health", health),
            Route("/metrics", read_metrics),
            *doors,
        ],
        exception_handlers={HTTPException: routing_error, Exception: server_fault},
        lifespan=lifespan,
    )


async def _sweep(manager: SessionManager) -> None:
    while True:
        await asyncio.sleep(min(_SWEEP_S, manager.limits.session_ttl_s))
        manager.expire()


def health_report(manager: SessionManager) -> dict[str, object]:
    """Body of GET /health: the reference service's keys, then ours (2.7)."""
    info = manager.policy.info
    height, width = info.image_hw
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(info.precision, info.precision)
    return {
        "status": "ok",
        "device": info.device,
        "dtype": f"torch.{dtype}",
        "ts_ckpt_loaded": True,
        "stage2_ckpt": None,
        "infinity_loaded": True,
        "active_sessions": manager.sessions,
        "num_frames": info.horizon.num_frames,
        "step": info.horizon.step,
        "points": list(info.horizon.points),
        "h_div_w_template": height / width,
        "tgt_h": height,
        "tgt_w": width,
        "rolling_tail_infer": False,
        "rolling_infer_mode": "tail_window",
        "v2v_history_injection": "official_leak",
        "ready": manager.is_ready,
        "version": __version__,
        "protocol": PROTOCOL_VERSION,
        "queue": manager.queue,
        "backend": info.backend,
    }


def split_by_port(app: ASGIApp, http_port: Callable[[], int]) -> ASGIApp:
    """With two ports, each door is found on its own only; the health routes are on both.

    Args:
        http_port: of the HTTP API, where it has a port of its own; else 0.
    """

    async def split(scope: Scope, receive: Receive, send: Send) -> None:
        if http_port() and scope["type"] != "lifespan":
            is_http_port = (scope.get("server") or ("", 0))[1] == http_port()
            is_misplaced = scope["type"] == "websocket" if is_http_port else scope.get("path") == PREDICT_PATH
            if is_misplaced:
                scope = {**scope, "path": "/not-on-this-port"}
        await app(scope, receive, send)

    return split
