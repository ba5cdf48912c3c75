"""What the tests of a server in trouble share: a flight that must go on undisturbed, and a client without the SDK."""

import contextlib
from pathlib import Path

import zmq
from websockets.sync.client import connect

from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import Limits
from worldvln_edge.runtime.bench.health_probe import HealthProbe
from worldvln_edge.runtime.bench.null_server import NullServerConfig, NullServerProcess
from worldvln_edge.runtime.bench.serve_load_client import jpeg_frames
from worldvln_edge.wire import decode_answer, encode

FRAMES = jpeg_frames((32, 32), count=33)
HEALTH_WITHIN_MS = 1000.0  # spec/session_protocol.md 9, item 5; the machine of a test may be busy


class Witness:
    """A flight: begun before the chaos, it goes on after it, and health answered in between.

    Args:
        url: where it flies; None: over WebSocket.
    """

    def __init__(self, server: NullServerProcess, url: str | None = None):
        self._server = server
        self._client = SessionClient(url or server.url)
        self._probe = HealthProbe("127.0.0.1", server.port, pause_s=0.05)

    def __enter__(self) -> "Witness":
        self._client.__enter__()
        self._client.start("go")
        assert self._client.observe(FRAMES[:1]).segment == 0
        self._probe.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._probe.__exit__(None, None, None)
        try:
            if kind is None:
                self._check()
        finally:
            self._client.close()

    def still_flies(self) -> bool:
        """Asks again for what it has, so that its session does not expire."""
        return self._client.observe([], segment=0).segment == 0

    def _check(self) -> None:
        answer = self._client.observe(FRAMES[1:17])
        assert (answer.segment, answer.frames) == (1, 17)
        assert self._client.observe(FRAMES[17:33]).done
        self._client.end()
        assert self._server.is_running
        assert self._probe.failures == []
        assert all(took and max(took) < HEALTH_WITHIN_MS for took in self._probe.took_ms.values())


class Line:
    """A client written without the SDK, over either transport."""

    def __init__(self, url: str):
        self._stack = contextlib.ExitStack()
        if url.startswith("ws"):
            self._socket = self._stack.enter_context(connect(url, compression=None))
            self._socket_send = self._socket.send
            self._socket_receive = lambda: self._socket.recv(timeout=10)
        else:
            context = self._stack.enter_context(zmq.Context())
            dealer = self._stack.enter_context(context.socket(zmq.DEALER))
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVTIMEO, 10_000)
            dealer.connect(url)
            self._socket_send, self._socket_receive = dealer.send, dealer.recv

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def send(self, data: bytes | str) -> None:
        self._socket_send(data)

    def hear(self):
        data = self._socket_receive()
        if isinstance(data, str):
            return decode_answer(data.encode(), "json")
        return decode_answer(data, "json" if data[:1] == b"{" else "msgpack")  # what looks like JSON is answered so

    def ask(self, request):
        """The answer to this request; what else arrives is dropped."""
        self.send(encode(request, "msgpack"))
        while (answer := self.hear()).re != request.id:
            pass
        return answer


def config_of(folder: Path, **limits) -> NullServerConfig:
    return NullServerConfig(limits=Limits(**limits), zmq_endpoints=(f"ipc://{folder}/s", "tcp://127.0.0.1:*"))


def urls_of(server: NullServerProcess) -> tuple[str, ...]:
    return (server.url, *server.zmq_urls)
