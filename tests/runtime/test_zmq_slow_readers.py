"""ZeroMQ clients that do not read their answers, or not in time."""

import time

from zmq_calls import FRAME, dealer, hear, wait_until

from worldvln_edge.client import SessionClient
from worldvln_edge.protocol import Hello, Limits
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.wire import encode


def test_client_that_does_not_read_is_cut_off_and_the_others_fly(context, caplog):
    limits = Limits(max_unsent_bytes=20_000)
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), high_water=2)
    with BackgroundServer(NullPolicy(), zmq=config, limits=limits) as server:
        url = server.server.zmq_urls[0]
        slow = dealer(context, url, RCVHWM=1, RCVBUF=4096)
        for index in range(20_000):
            slow.send(encode(Hello(id=index, v=[1]), "msgpack"))
        with SessionClient(url) as other:
            other.start("go")
            assert other.observe([FRAME]).segment == 0
        assert wait_until(lambda: "pile up; it is cut off" in caplog.text, 20)


def test_client_that_reads_nothing_for_long_is_cut_off(context, caplog):
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), high_water=2, stalled_after_s=0.3)
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        slow = dealer(context, server.server.zmq_urls[0], RCVHWM=1, RCVBUF=4096)
        for index in range(8_000):
            slow.send(encode(Hello(id=index, v=[1]), "msgpack"))
        assert wait_until(lambda: "reads nothing for 0.3 s; it is cut off" in caplog.text, 20)


def test_client_that_reads_late_gets_every_answer(context):
    """More answers than ZeroMQ holds for it wait in the server."""
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), high_water=2)
    with BackgroundServer(NullPolicy(), zmq=config) as server:
        late = dealer(context, server.server.zmq_urls[0], RCVHWM=1, RCVBUF=4096)
        for index in range(1000):
            late.send(encode(Hello(id=index, v=[1]), "msgpack"))
        time.sleep(0.3)
        assert [hear(late).re for _ in range(1000)] == list(range(1000))
