"""The native WebSocket and the health routes of one policy, on one port.

Loopback without a key is the default; any other address needs a key or an explicit flag. Compression is off: images
are compressed already. SIGTERM drains: work in progress is answered, clients get `bye`, then the port closes.
Source: spec/session_protocol.md 2.7, 2.8, 7, 7.6.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute

from worldvln_edge import __version__
from worldvln_edge.protocol import PROTOCOL_VERSION, WEBSOCKET_PATH, Limits
from worldvln_edge.runtime.access import AccessRule
from worldvln_edge.runtime.policy import Policy
from worldvln_edge.runtime.session_manager import SessionManager
from worldvln_edge.runtime.websocket_door import WebSocketDoor

_log = logging.getLogger(__name__)
_SWEEP_S = 5.0
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8001


class UnsafeAddressError(ValueError):
    """The server would listen beyond this machine without a key."""


class AddressInUseError(RuntimeError):
    """The address cannot be listened on."""


def create_app(manager: SessionManager, door: WebSocketDoor) -> Starlette:
    """The ASGI application: `/v1/session` (WebSocket), `/healthz`, `/readyz`, `/health`."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def readyz(request: Request) -> Response:
        return PlainTextResponse("ready\n") if manager.is_ready else PlainTextResponse("not ready\n", status_code=503)

    async def health(request: Request) -> Response:
        return JSONResponse(health_report(manager))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(manager))
        try:
            yield
        finally:
            sweeper.cancel()
            manager.close()

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/health", health),
            WebSocketRoute(WEBSOCKET_PATH, door.serve),
        ],
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


class SessionServer(uvicorn.Server):
    """uvicorn, with the drain that the protocol asks for before connections are closed.

    Args:
        policy: what answers.
        host, port: address; port 0 takes a free one, `bound_port` tells which.
        keys: API keys; every client must show one of them. Sessions belong to the key that made them.
        allow_remote: listen beyond loopback without a key.
        origins: browser origins that may connect, such as "https://ground.example"; none by default.
        limits: spec/session_protocol.md 7.8.
        device_workers: threads that may be inside the policy at once.
        drain_s: how long work in progress may take after SIGTERM.

    Raises:
        UnsafeAddressError: not loopback, no key, and not allowed explicitly.
    """

    def __init__(
        self,
        policy: Policy,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        keys: Sequence[str] = (),
        allow_remote: bool = False,
        origins: Sequence[str] = (),
        limits: Limits | None = None,
        device_workers: int = 1,
        drain_s: float = 30.0,
    ):
        check_address(host, keys=keys, allow_remote=allow_remote)
        self.manager = SessionManager(policy, limits=limits, device_workers=device_workers)
        self.door = WebSocketDoor(self.manager, AccessRule(keys=keys, origins=origins))
        self.host, self._bound_port, self._drain_s = host, 0, drain_s
        super().__init__(
            uvicorn.Config(
                create_app(self.manager, self.door),
                host=host,
                port=port,
                ws="auto",  # websockets is a dependency of the core, so auto is that implementation
                ws_max_size=self.manager.limits.max_msg_bytes,
                ws_per_message_deflate=False,
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )

    @property
    def bound_port(self) -> int:
        """Port listened on; 0 until it is known, just after `started` turns True."""
        return self._bound_port

    @property
    def url(self) -> str:
        """WebSocket address of the native protocol; valid once `started` is True."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ws://{host}:{self.bound_port}{WEBSOCKET_PATH}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and remember where: the listeners forget it when they close."""
        await super().startup(sockets)
        self._bound_port = self.servers[0].sockets[0].getsockname()[1]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain and return normally. Second: stop at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, answer what is in progress, say bye, close."""
        if not self.force_exit:
            if not await self.manager.drain(self._drain_s):
                _log.warning("work was still in progress %.0f s after the shutdown began; it is cut off", self._drain_s)
            await self.door.say_bye_to_all()
        await super().shutdown(sockets)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, *, keys: Sequence[str], allow_remote: bool) -> None:
    """Raise UnsafeAddressError unless the host is loopback, a key is set, or the operator allowed it."""
    if not (keys or allow_remote or is_loopback(host)):
        raise UnsafeAddressError(
            f"{host} can be reached from other machines and no key is set; give a key file (--key-file), or allow it "
            "explicitly (--allow-remote)"
        )


def serve(
    policy: Policy,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    *,
    on_ready: Callable[[str], None] | None = None,
    **options: Any,
) -> None:
    """Serve until SIGTERM or SIGINT. Options are those of SessionServer.

    Args:
        on_ready: called with the server's URL once it accepts connections.

    Raises:
        UnsafeAddressError: see SessionServer.
        AddressInUseError: somebody else listens there, or the address is not this machine's.
    """
    server = SessionServer(policy, host, port, **options)

    async def run() -> None:
        serving = asyncio.create_task(_serve(server))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started and on_ready is not None:
            on_ready(server.url)
        await serving

    asyncio.run(run())


async def _serve(server: SessionServer) -> None:
    try:
        await server.serve()
    except SystemExit:  # how uvicorn says that it could not bind
        raise AddressInUseError(
            f"cannot listen on {server.config.host}:{server.config.port}; is another server running there? "
            "Give another --ws HOST:PORT"
        ) from None


class BackgroundServer:
    """A server in a thread of this process, as a context manager: for flights, tests and measurements on one machine.

    Takes the arguments of SessionServer; the port defaults to a free one.
    """

    def __init__(self, policy: Policy, host: str = DEFAULT_HOST, port: int = 0, **options: Any):
        self.server = SessionServer(policy, host, port, **options)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="session-server", daemon=True)

    @property
    def url(self) -> str:
        return self.server.url

    def _run(self) -> None:
        try:
            asyncio.run(_serve(self.server))
        except (AddressInUseError, OSError) as error:
            self._failure = error

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        # Not `started`: that turns true in the server's thread a moment before the port is known.
        while not self.server.bound_port:
            self._thread.join(0.005)
            if not self._thread.is_alive():
                raise self._failure or RuntimeError("the server's thread ended before it was ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.should_exit = True
        self._thread.join()
