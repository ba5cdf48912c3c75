"""The environment server: one pool of simulator processes behind three HTTP protocols on one port.

`/v1/env/...` for rollouts (`env_door`), WorldVLN's `/reset` and `/step_actions`, ActiveVLN's `/environments` and
`/batch/...`. Loopback without a key is the default. Environments whose client is gone are given back.
Source: spec/seed_systems.md 3.4; spec/session_protocol.md 5, 7.6.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.doors.access import AccessRule
from worldvln_edge.runtime.doors.connection_room import ConnectionRoom
from worldvln_edge.runtime.doors.http_connection import BoundedHttpConnection
from worldvln_edge.runtime.doors.listen_address import AddressInUseError, check_address
from worldvln_edge.runtime.doors.listener import Listener
from worldvln_edge.tasks import SceneRef
from worldvln_edge.training.environments.activevln_door import ActiveVLNDoor
from worldvln_edge.training.environments.env_door import EnvDoor
from worldvln_edge.training.environments.environment import MAX_FRAMES
from worldvln_edge.training.environments.http_calls import HttpCalls
from worldvln_edge.training.environments.leases import LeasedEnvironments
from worldvln_edge.training.environments.pool import LocalEnvironments, PoolConfig
from worldvln_edge.training.environments.task_files import TaskFiles
from worldvln_edge.training.environments.worldvln_door import ImageFormat, WorldVLNDoor
from worldvln_edge.training.sim.tasks import Split

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8765
_THREADS = 32


@dataclass(frozen=True, kw_only=True)
class EnvironmentServerConfig:
    pool: PoolConfig = field(default_factory=PoolConfig)
    lease_s: float = 600.0  # an environment that nobody uses for this long is given back
    image_hw: tuple[int, int] = (256, 256)  # of /reset and /step_actions; clients of /v1/env choose theirs
    image_format: ImageFormat = "jpeg"
    activevln_image_hw: tuple[int, int] = (480, 640)
    scene: SceneRef = field(default_factory=lambda: SceneRef(family="city", seed=0))
    """Where a flight of /reset takes place whose task names no scene."""
    task_root: Path | None = None
    """Folder of `<task_id>.json`; None: requests carry tasks themselves."""
    split: Split = "train"
    """Of the task generator, for ActiveVLN's episodes that have no file."""
    max_frames: int = MAX_FRAMES
    limits: Limits = field(
        default_factory=lambda: Limits(max_msg_bytes=16 * 2**20, max_connections=64, headers_within_s=60)
    )
    """`headers_within_s` also bounds how long a client may keep a connection open between two calls."""


class EnvironmentServer(uvicorn.Server):
    """uvicorn with the doors. `serve` answers until a signal comes or `should_exit` is set.

    Args:
        config: of the pool and the doors.
        host, port: address; port 0 takes a free one, `bound_port` tells which.
        keys: API keys; every client must show one of them.
        allow_remote: listen beyond loopback without a key.

    Raises:
        UnsafeAddressError: not loopback, no key, and not allowed explicitly.
        SimulatorStartError: the simulator cannot run here.
    """

    def __init__(
        self,
        config: EnvironmentServerConfig | None = None,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        keys: Sequence[str] = (),
        allow_remote: bool = False,
    ):
        check_address(host, keys=keys, allow_remote=allow_remote)
        self.environment_config = config = config or EnvironmentServerConfig()
        self.is_listening = False
        self.bound_port = 0
        self._address = host, port
        self.pool = LocalEnvironments(config=config.pool)
        self._leased = LeasedEnvironments(self.pool, idle_s=config.lease_s)
        tasks = TaskFiles(config.task_root, split=config.split)
        self._env = EnvDoor(self._leased, tasks)
        self._activevln = ActiveVLNDoor(self._leased, tasks, image_hw=config.activevln_image_hw)
        self._worldvln = WorldVLNDoor(
            self._leased,
            tasks,
            scene=config.scene,
            image_hw=config.image_hw,
            max_frames=config.max_frames,
            image_format=config.image_format,
        )
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="environment-call")
        super().__init__(
            uvicorn.Config(
                _WithoutTrailingSlash(self._make_app(AccessRule(keys=keys))),
                host=host,
                port=port,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=math.ceil(config.pool.answer_within_s),
            )
        )
        self._room = ConnectionRoom(config.limits, self.server_state.connections)

    @property
    def url(self) -> str:
        """Base address; valid once `is_listening` is True."""
        host = self._address[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{self.bound_port}"

    def health(self) -> dict[str, object]:
        """Body of GET /v1/env/health; GET /health has the active session of `/reset` beside it."""
        pool = self.pool
        return {
            "status": "ok",
            "capabilities": ["reset", "step", "frames_last", "warmup", "leases"],
            "capacity": pool.capacity,
            "free": pool.capacity - pool.in_use,
            "processes": len(pool.pids),
            "processes_running": sum(pid is not None for pid in pool.pids),
            "max_frame_side": pool.config.max_side,
            "lease_s": self._leased.idle_s,
        }

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; uvicorn's own port would let connections in without bounds."""
        limits = self.environment_config.limits
        listener = Listener(self._connection, self._room, tls=None, patience_s=limits.headers_within_s)
        try:
            port = await listener.open(*self._address, "--port")
        except AddressInUseError:
            host, number = self._address
            raise AddressInUseError(
                f"cannot listen on {host}:{number}; is another server running there? Give another --port"
            ) from None
        self.bound_port = port.sockets[0].getsockname()[1]
        await super().startup([])
        self.servers.append(port)
        self.is_listening = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: answer what is in progress and return normally. Second: stop at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    def release(self) -> None:
        """End the simulators; call it when the server has ended, or never served."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.pool.shut_down()

    def _connection(self) -> asyncio.Protocol:
        return BoundedHttpConnection(
            self._room, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _make_app(self, access: AccessRule) -> Starlette:
        calls = HttpCalls(access, self.environment_config.limits, self._threads)
        env, activevln = self._env, self._activevln

        async def health(request: Request) -> Response:
            return _json({**self.health(), **self._worldvln.health()})

        async def env_health(request: Request) -> Response:
            return _json(self.health())

        async def no_route(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            path = request.url.path
            message = f"unknown path: {path}" if error.status_code == 404 else f"{request.method} is not for {path}"
            return _json({"error": message}, error.status_code)

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            sweeper = asyncio.create_task(self._sweep())
            try:
                yield
            finally:
                sweeper.cancel()

        return Starlette(
            routes=[
                Route("/health", health),
                Route("/v1/env/health", env_health),
                calls.post("/v1/env/create", env.create, with_codes=True),
                calls.post("/v1/env/reset", env.reset, with_codes=True),
                calls.post("/v1/env/step", env.step, with_codes=True),
                calls.post("/v1/env/warmup", env.warm_up, with_codes=True),
                calls.post("/v1/env/close", env.close, with_codes=True),
                calls.post("/reset", self._worldvln.reset),
                calls.post("/step_actions", self._worldvln.step_actions),
                calls.post("/environments", activevln.create),
                calls.post("/batch/reset", activevln.reset),
                calls.post("/batch/step", activevln.step),
                calls.post("/batch/warmup", activevln.warm_up),
                calls.post("/batch/close", activevln.close),
            ],
            exception_handlers={HTTPException: no_route},
            lifespan=lifespan,
        )

    async def _sweep(self) -> None:
        pause_s = min(5.0, self._leased.idle_s / 4)
        while True:
            await asyncio.sleep(pause_s)
            expired = await asyncio.to_thread(self._leased.expire)
            self._env.forget(expired)
            self._activevln.forget(expired)
            self._worldvln.forget(expired)


class BackgroundEnvironmentServer:
    """A server in a thread of this process, as a context manager. Arguments of EnvironmentServer; port 0 by default."""

    def __init__(
        self, config: EnvironmentServerConfig | None = None, host: str = DEFAULT_HOST, port: int = 0, **options
    ):
        self.server = EnvironmentServer(config, host, port, **options)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="environment-server", daemon=True)

    @property
    def url(self) -> str:
        return self.server.url

    def _run(self) -> None:
        try:
            asyncio.run(self.server.serve())
        except (AddressInUseError, OSError) as error:
            self._failure = error

    def __enter__(self) -> BackgroundEnvironmentServer:
        self._thread.start()
        while not self.server.is_listening:
            self._thread.join(0.005)
            if not self._thread.is_alive():
                self.server.release()
                raise self._failure or RuntimeError("the server's thread ended before it listened")
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join()
        self.server.release()


class _WithoutTrailingSlash:
    """The published simulator ignores a slash at a path's end."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["path"]) > 1:
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
