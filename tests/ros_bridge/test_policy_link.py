"""The line between policy and setpoint process."""

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worldvln_edge.ros_bridge.setpoints.policy_link import (
    Alive,
    Chunk,
    LinkError,
    LinkListener,
    PolicyLink,
    Progress,
    Stop,
)

_REPORT = Progress(at_ns=5, mode="fly", reason="", chunk=3, progress=1.5, faults=("geofence",))
_CHUNK = Chunk(number=1, actions=[(1.0, 2.0, 3.0, 0.0, 4.0, 0.0)] * 16, fps=16.0, seen_ns=7)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[LinkListener]:
    listener = LinkListener(tmp_path / "line.sock")
    yield listener
    listener.close()


def _connect(listener: LinkListener) -> PolicyLink:
    link = PolicyLink(listener.path)
    assert listener.accept()
    return link


def test_messages_arrive_whole_and_in_order_both_ways(listener):
    link = _connect(listener)
    sent = [Alive(seen_ns=1), _CHUNK, Stop()]
    for message in sent:
        link.send(message)
    assert listener.receive() == sent
    assert listener.receive() == []
    listener.send(_REPORT)
    assert link.receive(1.0) == _REPORT
    assert link.receive(0.01) is None


def test_a_policy_that_ends_is_noticed_after_its_last_message(listener):
    link = _connect(listener)
    link.send(Stop())
    link.close()
    assert listener.receive() == [Stop()]
    assert not listener.has_policy
    listener.send(_REPORT)  # to nobody


def test_a_newer_policy_replaces_the_older_one(listener):
    first, second = _connect(listener), _connect(listener)
    second.send(Alive(seen_ns=1))
    assert listener.receive() == [Alive(seen_ns=1)]
    with pytest.raises(LinkError, match="the line to the setpoint process is lost"):
        first.receive(1.0)


def test_whoever_sends_nonsense_is_disconnected(listener):
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    raw.connect(str(listener.path))
    listener.accept()
    raw.send(b"\xc1 nonsense")
    assert listener.receive() == []
    assert not listener.has_policy
    raw.close()


def test_a_policy_that_reads_nothing_does_not_hold_up_the_loop(listener):
    link = _connect(listener)
    began = time.monotonic()
    for _ in range(20_000):
        listener.send(_REPORT)
    assert time.monotonic() - began < 5
    assert listener.has_policy
    link.close()


def test_only_the_owner_may_connect(listener):
    assert stat.S_IMODE(os.stat(listener.path).st_mode) == 0o600


def test_a_second_setpoint_process_is_refused_and_a_dead_ones_file_is_not_in_the_way(listener, tmp_path):
    with pytest.raises(LinkError, match="a setpoint process listens here already; stop it first"):
        LinkListener(listener.path)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(tmp_path / "dead.sock"))
    dead.close()
    LinkListener(tmp_path / "dead.sock").close()
    assert not (tmp_path / "dead.sock").exists()


def test_places_where_nobody_can_meet_are_named(tmp_path):
    with pytest.raises(LinkError, match=r"none/line.sock: cannot listen here .* give a path in a folder of your own"):
        LinkListener(tmp_path / "none" / "line.sock")
    with pytest.raises(LinkError, match=r"no setpoint process listens here .* start `worldvln-edge ros setpoints`"):
        PolicyLink(tmp_path / "line.sock")


def test_sending_to_a_setpoint_process_that_is_gone_is_told(tmp_path):
    listener = LinkListener(tmp_path / "line.sock")
    link = _connect(listener)
    listener.close()
    with pytest.raises(LinkError, match="is lost"):
        link.send(Stop())
    with pytest.raises(LinkError, match="is lost"):
        link.receive(0.1)
    link.close()
    with pytest.raises(LinkError, match="is lost"):
        link.receive(0.1)
