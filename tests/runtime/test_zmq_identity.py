"""Whose sessions they are over ZeroMQ: API keys, routing identities, and clients that leave."""

import time

import pytest
import zmq
from zmq_calls import FRAME, LOCAL, ask, dealer, hear, wait_until

from worldvln_edge.client import ServerError, SessionClient
from worldvln_edge.protocol import End, Hello, Observe, Ping, Pong, Start
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.wire import encode


def test_api_key_is_asked_for_in_hello_and_owns_the_sessions():
    with BackgroundServer(NullPolicy(), zmq=LOCAL, keys=["one", "two"]) as server:
        url = server.server.zmq_urls[0]
        for key, message in ((None, "hello carries it as `key`"), ("wrong", "the key is wrong")):
            with pytest.raises(ServerError, match=message) as refusal:
                SessionClient(url, key).__enter__()
            assert refusal.value.code == "unauthorized"
        with SessionClient(url, "one") as client, SessionClient(url, "two") as stranger:
            client.start("go", session="mine")
            with pytest.raises(ServerError) as refusal:
                stranger.start(session="mine", resume=True)
            assert refusal.value.code == "unknown_session"
            with SessionClient(server.url, "one") as same_owner:  # over WebSocket
                assert same_owner.start(session="mine", resume=True).state == "open"


def test_refused_hello_opens_nothing(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, keys=["secret"]) as server:
        socket = dealer(context, server.server.zmq_urls[0])
        assert ask(socket, Hello(id=1, v=[1], key="guess")).code == "unauthorized"
        assert ask(socket, Start(id=2, session="s", prompt="go")).code == "hello_required"
        assert ask(socket, Hello(id=3, v=[1], key="secret")).v == 1
        assert ask(socket, Start(id=4, session="s", prompt="go")).state == "open"


def take_over(context: zmq.Context, url: str, identity: bytes):
    """A socket under an identity that was somebody else's, as soon as ZeroMQ has let go of it; and its first answer."""
    for _ in range(30):
        socket = dealer(context, url, identity)
        socket.send(encode(Ping(id=9), "msgpack"))
        if socket.poll(100):
            return socket, hear(socket)
        socket.close(0)
    raise AssertionError("the identity was never free")


def test_whoever_comes_later_under_an_identity_inherits_nothing(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL, keys=["secret"]) as server:
        url = server.server.zmq_urls[0]
        victim = dealer(context, url, b"drone-1")
        assert ask(victim, Hello(id=1, v=[1], key="secret")).v == 1
        assert ask(victim, Start(id=2, session="s", prompt="go")).state == "open"
        thief = dealer(context, url, b"drone-1")  # while the first one is there, ZeroMQ lets no second in
        thief.send(encode(Ping(id=1), "msgpack"))
        assert not thief.poll(300)
        assert isinstance(ask(victim, Ping(id=3)), Pong)
        thief.close(0)
        victim.close(0)
        thief, refusal = take_over(context, url, b"drone-1")
        assert refusal.code == "hello_required"
        assert ask(thief, Observe(id=2, session="s", first=1, frames=[])).code == "hello_required"


def test_answers_of_a_client_that_left_do_not_reach_its_successor(context):
    with BackgroundServer(NullPolicy(infer_s=0.5), zmq=LOCAL) as server:
        url = server.server.zmq_urls[0]
        victim = dealer(context, url, b"drone-1")
        assert ask(victim, Hello(id=1, v=[1])).v == 1
        assert ask(victim, Start(id=2, session="s", prompt="go")).state == "open"
        victim.send(
            encode(Observe(id=3, session="s", first=1, frames=[FRAME.tobytes()], fmt="rgb8", w=8, h=8), "msgpack")
        )
        time.sleep(0.1)
        victim.close(0)
        thief, refusal = take_over(context, url, b"drone-1")
        assert refusal.code == "hello_required"
        assert not thief.poll(800)


def test_queued_work_of_a_client_that_left_is_dropped(context):
    policy = NullPolicy(infer_s=0.4)
    with BackgroundServer(policy, zmq=LOCAL) as server, SessionClient(server.url) as other:
        leaver = dealer(context, server.server.zmq_urls[0])
        assert ask(leaver, Hello(id=1, v=[1])).v == 1
        assert ask(leaver, Start(id=2, session="gone", prompt="go")).state == "open"
        assert ask(leaver, Start(id=3, session="busy", prompt="go")).state == "open"
        for request_id, session in ((4, "busy"), (5, "gone")):
            request = Observe(id=request_id, session=session, first=1, frames=[FRAME.tobytes()], fmt="rgb8", w=8, h=8)
            leaver.send(encode(request, "msgpack"))
        assert wait_until(lambda: server.server.manager.queue == 1)
        leaver.close(0)
        assert wait_until(lambda: server.server.manager.queue == 0, 0.35)  # not after the work before it
        state = other.start(session="gone", resume=True)
        assert (state.frames, state.emitted) == (1, -1)


def test_what_a_client_sent_before_it_left_is_still_done(context):
    with BackgroundServer(NullPolicy(), zmq=LOCAL) as server:
        manager = server.server.manager
        for _ in range(20):
            hasty = dealer(context, server.server.zmq_urls[0])
            assert ask(hasty, Hello(id=1, v=[1])).v == 1
            assert ask(hasty, Start(id=2, session="s", prompt="go")).state == "open"
            hasty.linger = 1000
            hasty.send(encode(End(id=3, session="s"), "msgpack"))
            hasty.close()
            assert wait_until(lambda: manager.sessions == 0)
        assert wait_until(lambda: not server.server.zmq._clients)
