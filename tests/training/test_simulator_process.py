"""A simulator process that misbehaves is killed, and the message says how it ended."""

import time

import pytest

from worldvln_edge.training.environments import simulator_process
from worldvln_edge.training.environments.simulator_messages import Close, Ready, Step, encode
from worldvln_edge.training.environments.simulator_process import (
    SimulatorLostError,
    SimulatorProcess,
    SimulatorStartError,
)

PREPARE = f"""
import os, sys, time
from multiprocessing.connection import Connection
line = Connection(int(sys.argv[1]))
line.send_bytes({encode(Ready())!r})
"""


def a_process(monkeypatch, then: str, prepare: str = PREPARE) -> SimulatorProcess:
    """A process that is ready and then does something of its own."""
    monkeypatch.setattr(simulator_process, "_COMMAND", ("-c", prepare + then))
    return SimulatorProcess()


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("line.recv_bytes(); os._exit(3)", "ended with status 3"),
        ("line.recv_bytes(); os.abort()", "was killed by signal 6"),
        ("time.sleep(60)", "did not answer within 0.2 s and was killed"),
        (
            "line.recv_bytes(); os.write(line.fileno(), (100).to_bytes(4, 'big') + b'half'); time.sleep(60)",
            "stopped in the middle of an answer and was killed",
        ),
    ],
)
def test_end_of_a_process_is_told_and_nothing_is_left(monkeypatch, then, message):
    monkeypatch.setattr(simulator_process, "_STALLED_AFTER_S", 1)
    process = a_process(monkeypatch, then)
    process.start()
    pid = process.pid
    with pytest.raises(SimulatorLostError, match=f"simulator process {pid} {message}"):
        process.ask(Close("a"), 0.2 if "0.2" in message else 30)
    assert process.pid is None
    process.stop()


def test_process_that_reads_nothing_is_killed(monkeypatch):
    monkeypatch.setattr(simulator_process, "_STALLED_AFTER_S", 1)
    process = a_process(monkeypatch, "time.sleep(60)")
    with pytest.raises(SimulatorLostError, match="did not take a request and was killed"):
        process.ask(Step("a", bytes(2**22), "each"), 30)


def test_lost_process_is_replaced_by_the_next_request(monkeypatch):
    process = a_process(monkeypatch, "os._exit(0)")
    with pytest.raises(SimulatorLostError, match="ended with status 0"):
        process.ask(Close("a"), 30)
    monkeypatch.setattr(
        simulator_process, "_COMMAND", ("-c", PREPARE + f"line.recv_bytes(); line.send_bytes({encode(Ready())!r})")
    )
    assert process.ask(Close("a"), 30) == Ready()
    process.stop()


def test_process_that_does_not_come_up_is_told_of(monkeypatch):
    process = a_process(monkeypatch, "", prepare="raise SystemExit(5)")
    with pytest.raises(SimulatorStartError, match=r"did not start: .* ended with status 5; its stderr says more"):
        process.start()
    with pytest.raises(SimulatorLostError, match="did not start"):
        process.ask(Close("a"), 30)
    monkeypatch.setattr(simulator_process.sys, "executable", "/nowhere/python")
    with pytest.raises(SimulatorStartError, match=r"cannot start a simulator process: .*No such file"):
        process.start()


def test_idle_process_ends_by_itself_when_it_is_stopped(monkeypatch):
    process = a_process(monkeypatch, "\ntry: line.recv_bytes()\nexcept EOFError: pass")
    process.start()
    began_s = time.monotonic()
    process.stop()
    process.stop()
    assert (process.pid, time.monotonic() - began_s < 2.0) == (None, True)
