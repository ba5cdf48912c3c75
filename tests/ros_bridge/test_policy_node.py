"""The policy process against a real server and a setpoint process that the test plays."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="flies against a server, which needs the extra serve")

from forward_server import ForwardPolicy
from memory_port import MemoryPort
from setpoint_flights import LIMITS

from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, ServerConfig
from worldvln_edge.ros_bridge.diagnostics import Level
from worldvln_edge.ros_bridge.policy_heartbeat import PolicyHeartbeat
from worldvln_edge.ros_bridge.policy_node import PolicyNode
from worldvln_edge.ros_bridge.server_connection import server_client
from worldvln_edge.ros_bridge.setpoints.policy_link import (
    Alive,
    Chunk,
    LinkError,
    LinkListener,
    PolicyLink,
    Progress,
    Stop,
)
from worldvln_edge.runtime.doors.server import BackgroundServer
from worldvln_edge.runtime.sessions.null_policy import NullPolicy


class Desk:
    """A policy node with its heartbeat in threads; the test's setpoint process flies 30 actions a second."""

    def __init__(self, folder: Path, url: str, *, horizons: int = 1):
        self.port = MemoryPort()
        self.listener = LinkListener(folder / "line.sock")
        config = BridgeConfig(limits=LIMITS, server=ServerConfig(url=url, horizons=horizons))
        self.link = PolicyLink(self.listener.path)
        assert self.listener.accept()
        self.node = PolicyNode(config, self.port, self.link, server_client(config.server))
        self.heartbeat = PolicyHeartbeat(self.link, server_client(config.server))
        self.chunks: list[Chunk] = []
        self.alive: list[int] = []
        self.stops = 0
        self.has_camera, self.flies, self.encoding, self.sources = True, True, "rgb8", ["camera"]
        self.faults: tuple[str, ...] = ()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._fly), threading.Thread(target=self.node.run)]

    def __enter__(self) -> "Desk":
        for thread in self._threads:
            thread.start()
        self.heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.node.stop()
        self._threads[1].join()
        self.heartbeat.stop()
        self._stopping.set()
        self._threads[0].join()
        self.link.close()
        self.listener.close()

    def instruct(self, text: str = "Fly ahead.") -> None:
        self.wait(lambda: "camera/rate" in self.port.checks)
        self.port.receive["instruction"](text)

    def wait(self, is_so) -> None:
        give_up_s = time.monotonic() + 15
        while not is_so():
            assert time.monotonic() < give_up_s, (self.port.checks, len(self.chunks))
            time.sleep(0.005)

    def wait_for_diagnostic(self, text: str) -> None:
        self.wait(lambda: text in self.port.checks["policy/flight"].text)

    def wait_for_end(self, text: str) -> None:
        self.wait_for_diagnostic(text)
        self.wait(lambda: self.stops >= 2)  # the first one begins the flight

    def _fly(self) -> None:
        progress = 0.0
        while not self._stopping.wait(0.01):
            for message in self.listener.receive():
                if isinstance(message, Chunk):
                    self.chunks.append(message)
                    progress = 0.0
                elif isinstance(message, Alive):
                    self.alive.append(message.seen_ns)
                elif isinstance(message, Stop):
                    self.stops += 1
            if self.has_camera:
                for source in self.sources:
                    self.port.show_image(encoding=self.encoding, source=source)
            number = self.chunks[-1].number if self.chunks and self.flies else None
            progress = min(progress + 0.3, 16.0)
            mode, reason = ("fly", "") if number is not None else ("hold", "no odometry yet")
            self.listener.send(
                Progress(
                    at_ns=time.monotonic_ns(),
                    mode=mode,
                    reason=reason,
                    chunk=number,
                    progress=progress,
                    faults=self.faults,
                )
            )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with BackgroundServer(ForwardPolicy()) as server:
        yield server.url


@pytest.fixture
def desk(tmp_path: Path, url: str) -> Iterator[Desk]:
    with Desk(tmp_path, url) as desk:
        yield desk


def test_an_instruction_becomes_three_chunks_and_then_stop(desk):
    desk.instruct()
    desk.wait_for_end("flown: Fly ahead.")
    assert [chunk.number for chunk in desk.chunks] == [1, 2, 3]
    assert all(len(chunk.actions) == 16 and chunk.fps == 16 for chunk in desk.chunks)
    assert desk.port.checks["policy/flight"].level == Level.OK


def test_with_two_horizons_an_instruction_is_flown_on_behind_the_first(tmp_path, url):
    with Desk(tmp_path, url, horizons=2) as desk:
        desk.instruct()
        desk.wait_for_end("flown: Fly ahead.")
        assert [chunk.number for chunk in desk.chunks] == [1, 2, 3, 4, 5, 6]


def test_a_drone_that_has_arrived_is_not_flown_to_the_last_horizon(tmp_path):
    with BackgroundServer(NullPolicy()) as server, Desk(tmp_path, server.url, horizons=8) as desk:
        desk.instruct()
        desk.wait_for_end("flown: Fly ahead.")
        assert len(desk.chunks) < 24


def test_chunks_rest_on_the_newest_frame_and_heartbeats_on_the_servers_answers(desk):
    desk.instruct()
    desk.wait(lambda: len(desk.chunks) == 2)
    ages_s = [time.monotonic() - chunk.seen_ns / 1e9 for chunk in desk.chunks]
    assert 0 < ages_s[1] < ages_s[0] < 15
    assert desk.alive == sorted(desk.alive)
    assert time.monotonic() - desk.alive[-1] / 1e9 < 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"has_camera": False}, "camera/rate: the last image came 0.5 s ago; check the camera and its link"),
        ({"encoding": "32FC1"}, "camera/images: encoding '32FC1' is not known; publish one of rgb8"),
        ({"sources": ["camera", "back"]}, "2 publishers on the camera topic: back, camera; stop all but one"),
        ({"faults": ("geofence",)}, "the setpoint process latched geofence; see its diagnostics"),
        ({"flies": False}, "the setpoint process does not fly the chunk (no odometry yet); see its diagnostics"),
    ],
)
def test_what_breaks_the_flight_ends_it_and_is_named(desk, change, text):
    desk.instruct()
    desk.wait(lambda: desk.chunks)
    for name, value in change.items():
        setattr(desk, name, value)
    desk.wait_for_end(text)
    assert desk.port.checks["policy/flight"].level == Level.ERROR


def test_stop_and_another_instruction_end_a_flight(desk):
    desk.instruct()
    desk.wait(lambda: desk.chunks)
    desk.port.receive["instruction"]("Turn left.")
    desk.wait_for_end("flown: Turn left.")
    desk.instruct("Fly on.")
    desk.wait(lambda: len(desk.chunks) > 4)
    desk.port.receive["command"]("stop")
    desk.wait_for_end("the flight was stopped; send the next instruction")


def test_a_stop_right_behind_the_instruction_is_heard(desk):
    desk.wait(lambda: "camera/rate" in desk.port.checks)
    desk.port.receive["instruction"]("Fly ahead.")
    desk.port.receive["command"]("stop")
    desk.wait_for_diagnostic("the flight was stopped; send the next instruction")
    assert desk.chunks == []
    desk.instruct("Fly on.")
    desk.wait(lambda: desk.chunks)


def test_a_stop_while_the_server_plans_keeps_its_actions_from_being_flown(tmp_path):
    with BackgroundServer(ForwardPolicy(infer_s=1.0)) as server, Desk(tmp_path, server.url) as desk:
        desk.instruct()
        time.sleep(0.5)
        desk.port.receive["command"]("stop")
        desk.wait_for_end("the flight was stopped")
        assert desk.chunks == []
        assert server.server.manager.sessions == 0


def test_a_fault_that_was_reset_while_the_server_plans_ends_the_flight_all_the_same(tmp_path):
    with BackgroundServer(ForwardPolicy(infer_s=1.0)) as server, Desk(tmp_path, server.url) as desk:
        desk.instruct()
        desk.wait(lambda: desk.stops == 1)  # the flight has begun
        desk.faults = ("odometry_jump",)
        time.sleep(0.1)
        desk.faults = ()
        desk.wait_for_end("the setpoint process latched odometry_jump")
        assert desk.chunks == []


def test_a_policy_that_could_not_beat_does_not_go_on_without_a_heartbeat(tmp_path, url):
    listener = LinkListener(tmp_path / "line.sock")
    link = PolicyLink(listener.path)
    link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least: full after some beats
    link._socket.settimeout(0.05)
    heartbeat = PolicyHeartbeat(link, server_client(ServerConfig(url=url)))
    heartbeat.start()  # to a setpoint process that stands still
    give_up_s = time.monotonic() + 15
    try:
        while link._socket.fileno() >= 0:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        with pytest.raises(LinkError, match="the line to the setpoint process is lost"):
            link.receive(0.02)  # as the flight's own thread does all the time
    finally:
        heartbeat.stop()
        listener.close()


def test_images_whose_stamps_are_on_another_clock_are_named(desk, monkeypatch):
    show = desk.port.show_image
    monkeypatch.setattr(desk.port, "show_image", lambda **options: show(age_s=1000.0, **options))
    time.sleep(0.1)
    desk.instruct()
    desk.wait_for_end("check that header.stamp is on the clock of this computer (or set topics.use_sim_time)")


def test_a_server_that_is_not_there_is_named_and_there_is_no_heartbeat(tmp_path):
    with Desk(tmp_path, "ws://127.0.0.1:9") as desk:
        desk.instruct()
        desk.wait_for_diagnostic("the server ended the flight: no worldvln-edge server answers at ws://127.0.0.1:9")
        assert desk.alive == []


def test_whoever_asks_for_a_flight_sees_how_far_it_is_and_how_it_ended(desk):
    desk.wait(lambda: "camera/rate" in desk.port.checks)
    flight = desk.node.request("Fly ahead.")
    assert flight.progress.state == "waiting"
    desk.wait(lambda: flight.progress.chunk == 2 and flight.progress.actions_flown > 3)
    assert flight.progress.state == "flying"
    assert flight.outcome is None
    assert flight.wait(15)
    assert flight.was_flown
    assert flight.outcome.message == "flown: Fly ahead."
    assert flight.progress.chunk == 3


def test_a_flight_ends_when_whoever_asked_cancels_it_and_when_another_is_asked_for(desk):
    desk.wait(lambda: "camera/rate" in desk.port.checks)
    cancelled = desk.node.request("Fly ahead.")
    desk.wait(lambda: cancelled.progress.chunk == 1)
    cancelled.cancel()
    assert cancelled.wait(10)
    assert cancelled.outcome.message == "the flight was stopped"
    desk.wait(lambda: desk.stops == 2)
    flights = [desk.node.request(text) for text in ("Fly on.", "Turn left.", "Turn right.")]
    desk.wait(lambda: flights[-1].progress.state == "flying")
    assert [flight.wait(10) for flight in flights[:2]] == [True, True]
    assert flights[0].outcome.message == flights[1].outcome.message == "another instruction came"
    desk.node.stop()
    assert flights[2].wait(10)
    assert not flights[2].was_flown
