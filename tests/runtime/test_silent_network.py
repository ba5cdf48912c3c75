"""A network that drops everything and says nothing: both sides notice, and the flight is what it would have been."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from crashing_server import SeeingPolicy
from network_path import NetworkPath

from worldvln_edge.async_client import AsyncSessionClient
from worldvln_edge.client import AnswerTimeoutError, ServerUnreachableError, SessionClient
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.session_server import SessionServer
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig

SILENT_FOR_S = 0.6
NOTICED_WITHIN_S = 10.0  # four thirds of it, the close, a new connection, and a busy machine
FRAMES = [np.full((8, 8, 3), index, np.uint8) for index in range(33)]
CALLS = (FRAMES[:1], FRAMES[1:17], FRAMES[17:])
TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "zmq"])


@pytest.fixture
def server() -> Iterator[BackgroundServer]:
    zmq = ZmqConfig(endpoints=("tcp://127.0.0.1:*",), heartbeat_s=SILENT_FOR_S / 3, silent_for_s=SILENT_FOR_S)
    server = BackgroundServer(SeeingPolicy(infer_s=0.3), zmq=zmq)
    server.server.config.ws_ping_interval, server.server.config.ws_ping_timeout = SILENT_FOR_S / 3, SILENT_FOR_S
    with server:
        yield server


@pytest.fixture
def path(server: BackgroundServer, transport: str) -> Iterator[NetworkPath]:
    is_zmq = transport == "zmq"
    port = int(server.server.zmq_urls[0].rpartition(":")[2]) if is_zmq else server.server.bound_port
    with NetworkPath(port) as path:
        yield path


def url_of(path: NetworkPath, transport: str) -> str:
    return f"{'tcp' if transport == 'zmq' else 'ws'}://127.0.0.1:{path.port}"


def client_of(path: NetworkPath, transport: str, **options) -> SessionClient:
    options = {"silent_for_s": SILENT_FOR_S, "connect_timeout_s": 1.0, **options}
    return SessionClient(url_of(path, transport), frame_format="rgb8", **options)


def fly(client: SessionClient, before_call: Callable[[int], None] = lambda index: None) -> list:
    client.start("go", seed=3)
    answers = []
    for index, frames in enumerate(CALLS):
        before_call(index)
        answers.append(client.observe(frames))
    return outcome(answers)


def outcome(answers) -> list:
    return [(answer.segment, answer.frames, answer.need, answer.done, answer.actions.tolist()) for answer in answers]


@pytest.fixture
def undisturbed(server: BackgroundServer) -> list:
    with SessionClient(server.url, frame_format="rgb8") as client:
        return fly(client)


@TRANSPORTS
@pytest.mark.parametrize("when", ["before the request", "while it computes"])
def test_client_notices_resumes_over_a_fresh_connection_and_flies_the_same(path, transport, when, undisturbed):
    def disturb(index: int) -> None:
        if index == 1:
            if when == "before the request":
                path.go_silent()
            else:  # the server has the frames and will answer into the void
                threading.Timer(0.1, path.go_silent).start()

    began = time.monotonic()
    with client_of(path, transport) as client:
        assert fly(client, disturb) == undisturbed
    assert len(path.lines) == 2
    assert time.monotonic() - began < NOTICED_WITHIN_S


@TRANSPORTS
def test_asynchronous_client_does_so_too(path, transport, undisturbed):
    async def flight() -> list:
        url = url_of(path, transport)
        async with AsyncSessionClient(url, frame_format="rgb8", silent_for_s=SILENT_FOR_S) as client:
            await client.start("go", seed=3)
            answers = [await client.observe(CALLS[0])]
            path.go_silent()
            return outcome([*answers, await client.observe(CALLS[1]), await client.observe(CALLS[2])])

    assert asyncio.run(asyncio.wait_for(flight(), NOTICED_WITHIN_S)) == undisturbed
    assert len(path.lines) == 2


@TRANSPORTS
def test_network_that_is_away_for_a_while_is_waited_for(path, transport, undisturbed):
    def disturb(index: int) -> None:
        if index == 1:
            path.go_silent(for_all=True)
            threading.Timer(2.5, path.come_back).start()

    with client_of(path, transport) as client:
        assert fly(client, disturb) == undisturbed
    assert len(path.lines) > 2  # those in between were opened into the silence


@TRANSPORTS
def test_network_that_stays_away_is_said_within_the_time_set(path, transport):
    with client_of(path, transport, reconnect_s=1.0, connect_timeout_s=0.5) as client:
        client.start("go")
        path.go_silent(for_all=True)
        began = time.monotonic()
        with pytest.raises(ServerUnreachableError, match="no worldvln-edge server answers"):
            client.observe(CALLS[0])
        assert time.monotonic() - began < NOTICED_WITHIN_S


@TRANSPORTS
def test_server_frees_the_dead_connection_and_keeps_the_acknowledged_frames(server, path, transport):
    with client_of(path, transport, reconnect_s=0) as client:
        client.start("go", session="flight", seed=3)
        first = client.observe(CALLS[0])
        path.go_silent()
        began = time.monotonic()
        assert path.lines[0].server_closed.wait(NOTICED_WITHIN_S)
        assert time.monotonic() - began > SILENT_FOR_S / 3  # it was its heartbeat that found out
    with client_of(path, transport) as client:
        state = client.start(session="flight", resume=True)
        assert (state.frames, state.emitted) == (1, 0)
        again = client.observe([], segment=0)
        assert np.array_equal(again.actions, first.actions)
        assert client.observe(CALLS[1]).frames == 17
        assert client.ping().sessions == 1


@TRANSPORTS
def test_message_that_fills_every_buffer_is_not_waited_for_for_ever(path, transport):
    large = [np.full((640, 640, 3), index, np.uint8) for index in range(16)]  # 20 MB
    with client_of(path, transport) as client:
        client.start("go")
        client.observe(CALLS[0])
        path.go_silent()
        began = time.monotonic()
        assert client.observe(large).frames == 17
        assert time.monotonic() - began < NOTICED_WITHIN_S
    assert len(path.lines) == 2


@TRANSPORTS
def test_nor_does_the_asynchronous_client_wait_for_it(path, transport):
    large = [np.full((640, 640, 3), index, np.uint8) for index in range(16)]

    async def flight() -> int:
        url = url_of(path, transport)
        async with AsyncSessionClient(url, frame_format="rgb8", silent_for_s=SILENT_FOR_S) as client:
            await client.start("go")
            await client.observe(CALLS[0])
            path.go_silent()
            return (await client.observe(large)).frames

    assert asyncio.run(asyncio.wait_for(flight(), NOTICED_WITHIN_S)) == 17
    assert len(path.lines) == 2


@TRANSPORTS
def test_asynchronous_client_gives_such_a_message_up_with_its_answer(path, transport):
    large = [np.full((640, 640, 3), index, np.uint8) for index in range(16)]

    async def flight() -> tuple[float, int]:
        options = {"silent_for_s": 60.0, "answer_timeout_s": 0.8}
        async with AsyncSessionClient(url_of(path, transport), frame_format="rgb8", **options) as client:
            await client.start("go")
            await client.observe(CALLS[0])
            path.go_silent()
            began = time.monotonic()
            with pytest.raises(AnswerTimeoutError):
                await client.observe(large)
            took_s = time.monotonic() - began  # the close is not waited for either
            return took_s, (await client.observe(CALLS[1])).frames

    took_s, frames = asyncio.run(asyncio.wait_for(flight(), 2 * NOTICED_WITHIN_S))
    assert took_s < 5.0
    assert frames == 17


@TRANSPORTS
def test_answer_that_is_given_up_before_the_link_can_be_had_again_over_a_fresh_one(path, transport, undisturbed):
    with client_of(path, transport, silent_for_s=60.0, answer_timeout_s=0.8) as client:
        client.start("go", seed=3)
        answers = [client.observe(CALLS[0])]
        path.go_silent()
        began = time.monotonic()
        with pytest.raises(AnswerTimeoutError, match=r"did not answer within 0\.8 s"):
            client.observe(CALLS[1])
        assert time.monotonic() - began < 5.0  # nor does it wait long for the close
        answers += [client.observe(CALLS[1]), client.observe(CALLS[2])]
    assert outcome(answers) == undisturbed


@TRANSPORTS
def test_quiet_link_that_works_is_kept(path, transport):
    with client_of(path, transport) as client:
        client.start("go")
        time.sleep(3 * SILENT_FOR_S)  # nothing but heartbeats
        assert client.observe(CALLS[0]).segment == 0
    assert len(path.lines) == 1


def test_server_pings_as_the_protocol_page_says():
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    config = SessionServer(SeeingPolicy()).config
    said = f"pings every {config.ws_ping_interval:g} s and closes a connection whose pong does not come within "
    assert f"{said}{config.ws_ping_timeout:g} s" in page
