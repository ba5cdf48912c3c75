"""How many clients a ZeroMQ door takes, and who makes way."""

import contextlib
import socket as socketlib
import threading
import time

import pytest
import zmq
from http_calls import HttpCalls
from zmq_calls import FRAME, LOCAL, ask, dealer, wait_until

from worldvln_edge.client import ServerUnreachableError, SessionClient
from worldvln_edge.protocol import Hello, Limits, Ping
from worldvln_edge.runtime.doors.connection_room import SPARE_CONNECTIONS
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.wire import encode


def test_full_server_is_named_and_tried_again(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=Limits(max_connections=1)) as server:
        url = server.server.zmq_urls[0]
        with SessionClient(url) as client:
            with pytest.raises(ServerUnreachableError, match="as many connections as it accepts"):
                SessionClient(url).__enter__()
            late = SessionClient(url, reconnect_s=5)
            threading.Timer(0.3, client.close).start()
            assert late.ping().ready
            late.close()


def test_clients_are_counted_and_silent_strangers_make_way(context):
    limits = Limits(max_connections=2, min_idle_s=0.2)
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=limits) as server:
        url = server.server.zmq_urls[0]
        first, second, third = (dealer(context, url) for _ in range(3))
        assert ask(first, Hello(id=1, v=[1])).v == 1
        assert ask(second, Ping(id=1)).code == "hello_required"
        refusal = ask(third, Hello(id=1, v=[1]))
        assert (refusal.code, refusal.retry) == ("overloaded", True)
        time.sleep(0.25)
        assert ask(first, Ping(id=2)).re == 2
        assert ask(third, Hello(id=2, v=[1])).v == 1  # in the place of the one who never said hello
        assert ask(first, Ping(id=3)).re == 3


def test_client_that_leaves_makes_way_at_once(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=Limits(max_connections=1)) as server:
        url = server.server.zmq_urls[0]
        for _ in range(5):
            with SessionClient(url) as client:
                assert client.ping().ready


def test_many_clients_that_come_and_go_leave_nothing_behind(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        sockets = [dealer(context, server.server.zmq_urls[0]) for _ in range(60)]
        for socket in sockets:
            assert ask(socket, Hello(id=1, v=[1])).v == 1
        door = server.server.zmq
        assert len(door._clients) == 60
        for socket in sockets:
            socket.close(0)
        assert wait_until(lambda: not door._clients and not door._client_on and not len(door._links))


LIMITED = Limits(max_connections=4, headers_within_s=60)  # so nothing here ends because its time is up
ROOM = LIMITED.max_connections + SPARE_CONNECTIONS


def check_server_serves(server: BackgroundServer, url: str) -> None:
    began_s = time.monotonic()
    with SessionClient(url) as client, HttpCalls(server) as calls:
        client.start("go")
        assert client.observe([FRAME]).segment == 0
        assert [calls.get(route)[0] for route in ("/health", "/readyz", "/metrics")] == [200] * 3
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("start", [b"", b"\xff\0\0\0\0\0\0\0\x01\x7f"], ids=["silent", "half a greeting"])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_connections_without_a_handshake_are_bounded_and_a_good_client_still_gets_in(folder, transport, start):
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*", f"ipc://{folder}/s"))
    with BackgroundServer(NullPolicy(), zmq=config, limits=LIMITED) as server, contextlib.ExitStack() as stack:
        url = server.server.zmq_urls[transport == "ipc"]
        lines = []
        for _ in range(ROOM + 50):
            family = socketlib.AF_UNIX if transport == "ipc" else socketlib.AF_INET
            line = stack.enter_context(socketlib.socket(family, socketlib.SOCK_STREAM))
            line.connect(f"{folder}/s" if transport == "ipc" else ("127.0.0.1", int(url.rpartition(":")[2])))
            line.settimeout(5)
            with contextlib.suppress(ConnectionError):
                line.sendall(start)
            lines.append(line)
        check_server_serves(server, url)
        assert wait_until(lambda: len(server.server.zmq._links) <= ROOM)
        for line in lines[:50]:  # those that waited longest had to go
            with contextlib.suppress(ConnectionResetError):
                while line.recv(100):  # the server's greeting comes first
                    pass


def test_connections_that_say_nothing_are_bounded_and_clients_are_not_given_up_for_them(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=LIMITED) as server:
        url = server.server.zmq_urls[0]
        client = dealer(context, url)
        assert ask(client, Hello(id=1, v=[1])).v == 1
        silent = [dealer(context, url, RECONNECT_IVL=-1) for _ in range(ROOM + 20)]
        links = server.server.zmq._links
        assert wait_until(lambda: len(links) == ROOM)
        check_server_serves(server, url)
        assert ask(client, Ping(id=2)).re == 2  # and it need not say hello again
        for socket in silent:
            socket.close(0)
        assert wait_until(lambda: len(links) == 1)


def test_handshake_that_is_not_finished_ends_in_time():
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=Limits(headers_within_s=0.3)) as server:
        port = int(server.server.zmq_urls[0].rpartition(":")[2])
        with socketlib.create_connection(("127.0.0.1", port), timeout=5) as line:
            began_s = time.monotonic()
            while line.recv(100):
                pass
        assert 0.2 < time.monotonic() - began_s < 3


def is_cut(socket: zmq.Socket) -> bool:
    """Whether a socket that does not connect again has lost its connection: it takes nothing any more."""
    try:
        socket.send(encode(Ping(id=3), "msgpack"), zmq.DONTWAIT)
    except zmq.Again:
        return True
    return False


def test_forgotten_client_makes_way_again(context):
    limits = Limits(max_connections=1, min_idle_s=0.1)
    with BackgroundServer(NullPolicy(), zmq=LOCAL, limits=limits) as server:
        url, links = server.server.zmq_urls[0], server.server.zmq._links
        first = dealer(context, url, RECONNECT_IVL=-1)
        assert ask(first, Hello(id=1, v=[1])).v == 1
        time.sleep(0.15)
        second = dealer(context, url)
        assert ask(second, Hello(id=1, v=[1])).v == 1  # the first one is forgotten, and still connected
        assert len(links) == 2
        silent = [dealer(context, url, RECONNECT_IVL=-1) for _ in range(1 + SPARE_CONNECTIONS)]
        assert wait_until(lambda: len(links) == 1 + SPARE_CONNECTIONS)
        assert ask(second, Ping(id=2)).re == 2
        assert wait_until(lambda: is_cut(first))  # its connection was the first to go
        for socket in silent:
            socket.close(0)
