"""A server's process keeps its pauses short, and its memory does not stay at its highest point."""

import gc
import platform
import subprocess
import sys
import time

import pytest
from chaos_witness import FRAMES, Line

from worldvln_edge.protocol import End, Hello, Observe, Start
from worldvln_edge.runtime.bench.serve_load_client import jpeg_frames
from worldvln_edge.runtime.doors import zmq_door
from worldvln_edge.runtime.doors.native_connection import NativeConnection
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.doors.websocket_door import Outbox
from worldvln_edge.runtime.doors.zmq_client import ZmqClient
from worldvln_edge.runtime.doors.zmq_config import ZmqConfig
from worldvln_edge.runtime.sessions.null_policy import NullPolicy
from worldvln_edge.wire import encode

ONLY_GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")

_BURST = """
import asyncio, sys
from worldvln_edge.runtime.doors.memory_upkeep import give_back_free_memory
from worldvln_edge.runtime.sessions.process_memory import resident_bytes

async def burst(is_quiet):
    upkeep = asyncio.create_task(give_back_free_memory(lambda: is_quiet, 0.05))
    before = resident_bytes("VmRSS")
    messages = [bytes([index % 256]) * 100_000 for index in range(800)]
    last = messages.pop()  # what stays behind what goes: the end of the heap is in use
    messages.clear()
    peak = resident_bytes("VmHWM")
    await asyncio.sleep(0.3)
    print(peak - before, resident_bytes("VmRSS") - before)
    upkeep.cancel()

asyncio.run(burst(sys.argv[1] == "quiet"))
"""


@ONLY_GLIBC
def test_free_memory_between_what_stays_is_given_back():
    def left(kind: str) -> float:
        done = subprocess.run([sys.executable, "-c", _BURST, kind], capture_output=True, text=True, check=True)
        peak, rest = map(int, done.stdout.split())
        assert peak > 70e6
        return rest / peak

    assert left("quiet") < 0.2
    assert left("busy") > 0.3  # not while somebody waits


def test_served_process_collects_only_what_is_new():
    program = (
        "import gc, os, signal\n"
        "from worldvln_edge.runtime.doors.server import serve\n"
        "from worldvln_edge.runtime.sessions.null_policy import NullPolicy\n"
        "def ready(url):\n"
        "    print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "serve(NullPolicy(), port=0, on_ready=ready)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    frozen, new = map(int, done.stdout.split())
    assert frozen > 20_000
    assert new < 1000


@pytest.fixture
def collector_rests():
    """Only what is counted by references is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=[0, 1], ids=["websocket", "zmq"])
def url(request, monkeypatch):
    monkeypatch.setattr(zmq_door, "_SWEEP_S", 0.001)  # each client is looked at while it is there
    with BackgroundServer(NullPolicy(), zmq=ZmqConfig(endpoints=("tcp://127.0.0.1:*",))) as server:
        yield (server.url, *server.server.zmq_urls)[request.param]


def start(line: Line) -> None:
    assert line.ask(Hello(id=1, v=[1])).v == 1
    assert line.ask(Start(id=2, session="s", prompt="go", chain=True)).state == "open"


def copies_of(message: bytes) -> int:
    """Objects with these bytes that somebody holds, the test's own included."""
    found = {id(message)}
    for holder in gc.get_objects():
        found.update(id(each) for each in gc.get_referents(holder) if type(each) is bytes and each == message)
    return len(found)


def wait_until(is_so) -> bool:
    give_up_s = time.monotonic() + 5
    while not is_so() and time.monotonic() < give_up_s:
        time.sleep(0.05)
    return is_so()


def test_zmq_message_is_not_kept_until_the_next_one_comes():
    config = ZmqConfig(endpoints=("tcp://127.0.0.1:*",))
    with BackgroundServer(NullPolicy(), zmq=config) as server, Line(server.server.zmq_urls[0]) as line:
        start(line)
        message = encode(Observe(id=3, session="s", first=1, frames=jpeg_frames((256, 256))), "msgpack")
        line.send(message)
        assert line.hear().frames == 16
        assert wait_until(lambda: copies_of(message) == 1)


def test_clients_that_leave_are_freed_without_the_collector(url, collector_rests):
    def alive() -> list[object]:
        return [each for each in gc.get_objects() if type(each) in (NativeConnection, ZmqClient, Outbox)]

    before = {id(each) for each in alive()}  # of servers that other tests of this process still run

    def kept() -> list[object]:
        return [each for each in alive() if id(each) not in before]

    def holders() -> list[str]:
        return [f"{type(each).__name__} by {gc.get_referrers(each)}" for each in kept()]

    for _ in range(3):
        with Line(url) as line:
            start(line)
            line.ask(Observe(id=3, session="s", first=1, frames=FRAMES[:1]))
            assert kept()
    with Line(url) as line:  # the session tells its last client that it expires; then that one is freed, too
        line.ask(Hello(id=1, v=[1]))
        line.ask(End(id=2, session="s"))
    assert wait_until(lambda: not kept()), holders()
