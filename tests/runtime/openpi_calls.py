"""What the tests of openpi's protocol share: frames of one colour, and a client written from docs/protocol.md."""

from typing import Any

import msgspec
import numpy as np
from websockets.sync.client import connect

from worldvln_edge.runtime.doors.openpi_codec import encode_map
from worldvln_edge.runtime.doors.server import BackgroundServer


def pixels(*values: int) -> np.ndarray:
    """Frames of one colour each: uint8 [k, 4, 6, 3]."""
    return np.stack([np.full((4, 6, 3), value, np.uint8) for value in values])


class PolicyClient:
    """A client written from docs/protocol.md: one observation, one result."""

    def __init__(self, server: BackgroundServer | int, path: str = "/openpi", **options: Any):
        """Connect to a server, or to a port of this machine."""
        port = server if isinstance(server, int) else server.server.bound_port
        url = f"ws://127.0.0.1:{port}{path}"
        self._context = connect(url, compression=None, max_size=None, **options)
        self.socket = self._context.__enter__()
        self.metadata = msgspec.msgpack.decode(self.socket.recv(timeout=5))

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, **observation: Any) -> dict[str, Any] | str:
        """The result, or the text of an error."""
        return self.ask_bytes(encode_map(observation))

    def ask_bytes(self, data: bytes | str) -> dict[str, Any] | str:
        self.socket.send(data)
        answer = self.socket.recv(timeout=5)
        if isinstance(answer, str):
            return answer
        result = msgspec.msgpack.decode(answer)
        actions = result["actions"]
        result["actions"] = np.frombuffer(actions[b"data"], actions[b"dtype"]).reshape(actions[b"shape"])
        return result
