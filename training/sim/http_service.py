"""HTTP in front of the simulator: GET /health, POST /reset, POST /step_actions. JSON in and out.

Each connection has a thread of its own, so a slow client keeps nobody waiting; the simulator has one thread, because
an OpenGL context lives in one. Only the standard library is used: the simulator's extra brings no web server.
Source: spec/session_protocol.md 5.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from worldvln_edge.training.sim.service import RefusedRequestError, SimulatorService, SimulatorServiceConfig

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8765
_MAX_BODY_BYTES = 2**20
_BODY_WITHIN_S = 15.0
_MAX_CONNECTIONS = 64
_log = logging.getLogger(__name__)


class UnsafeAddressError(ValueError):
    """The service would listen beyond this machine."""


class AddressInUseError(RuntimeError):
    """The address cannot be listened on."""


class SimulatorServer(ThreadingHTTPServer):
    """The service on a port. `serve_forever` answers until `shutdown` is called from another thread.

    Args:
        config: of the simulator.
        host, port: address; port 0 takes a free one, `server_port` tells which.
        allow_remote: listen beyond this machine. The service asks for no key.

    Raises:
        UnsafeAddressError: not loopback, and not allowed explicitly.
        AddressInUseError: somebody else listens there.
    """

    daemon_threads = True

    def __init__(
        self,
        config: SimulatorServiceConfig | None = None,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        allow_remote: bool = False,
    ):
        if not (allow_remote or _is_loopback(host)):
            raise UnsafeAddressError(
                f"{host} can be reached from other machines and the simulator asks for no key; allow it explicitly "
                "(--allow-remote)"
            )
        self.service = SimulatorService(config)
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="simulator")
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise AddressInUseError(
                f"cannot listen on {host}:{port} ({error.strerror}); give another --port"
            ) from error

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, object]]:
        """Status and JSON of the answer to a request."""
        path = path.partition("?")[0].rstrip("/")
        if (method, path) == ("GET", "/health"):
            return 200, self.service.health()
        actions = {"/reset": self.service.reset, "/step_actions": self.service.step_actions}
        if method != "POST" or path not in actions:
            return 404, {"error": f"unknown path: {path}"}
        try:
            return 200, self._thread.submit(actions[path], _payload(body)).result()
        except RefusedRequestError as error:
            return error.status, {"error": str(error)}
        except Exception as error:  # the boundary to the renderer: whatever it raises must not end the service
            _log.error("the simulator failed", exc_info=error)
            return 500, {"error": "the simulator failed; the service's log says why"}

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a client's connection broke", exc_info=True)

    def server_close(self) -> None:
        super().server_close()
        self._thread.submit(self.service.close)
        self._thread.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: SimulatorServer
    protocol_version = "HTTP/1.1"
    timeout = _BODY_WITHIN_S  # of a single read; the body has this time in all

    def do_GET(self) -> None:
        self._answer(*self.server.answer("GET", self.path, b""))

    def do_POST(self) -> None:
        text = self.headers.get("content-length", "")
        if not (text.isascii() and text.isdigit()) or int(text) > _MAX_BODY_BYTES:
            self.close_connection = True
            self._answer(413 if text.isdigit() else 411, {"error": f"send a body of 0 to {_MAX_BODY_BYTES} bytes"})
            return
        body = self._read(int(text))
        if body is None:
            self.close_connection = True
            self._answer(408, {"error": f"the body did not arrive within {_BODY_WITHIN_S:g} s"})
            return
        self._answer(*self.server.answer("POST", self.path, body))

    def _read(self, count: int) -> bytes | None:
        """The body, or None when it does not come in time."""
        body, until_s = b"", time.monotonic() + _BODY_WITHIN_S
        while len(body) < count:
            if time.monotonic() > until_s:
                return None
            try:
                chunk = self.rfile.read1(count - len(body))
            except TimeoutError:
                return None
            if not chunk:
                raise ConnectionError("the client went away while it sent its request")
            body += chunk
        return body

    def _answer(self, status: int, answer: dict[str, object]) -> None:
        data = msgspec.json.encode(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


def _payload(body: bytes) -> dict[str, Any]:
    try:
        payload = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RefusedRequestError("payload is not JSON") from None
    if not isinstance(payload, dict):
        raise RefusedRequestError("payload must be a json object")
    return payload


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
