"""ZeroMQ clients without the SDK, for tests of the ZeroMQ door."""

import time

import numpy as np
import zmq

from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.wire import decode_answer, encode

FRAME = np.full((8, 8, 3), 127, dtype=np.uint8)
LOCAL = ZmqConfig(endpoints=("tcp://127.0.0.1:*",))


def dealer(context: zmq.Context, url: str, identity: bytes | None = None, **options: int) -> zmq.Socket:
    socket = context.socket(zmq.DEALER)
    socket.linger = 0  # also when it is only dropped
    if identity is not None:
        socket.setsockopt(zmq.ROUTING_ID, identity)
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.connect(url)
    return socket


def ask(socket: zmq.Socket, request):
    socket.send(encode(request, "msgpack"))
    return hear(socket)


def hear(socket: zmq.Socket, encoding: str = "msgpack"):
    assert socket.poll(5000), "the server did not answer"
    return decode_answer(socket.recv_multipart()[-1], encoding)


def wait_until(condition, seconds: float = 5.0) -> bool:
    give_up_s = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up_s:
        time.sleep(0.01)
    return condition()
