"""How punctual setpoints are, and how soon the drone holds when the policy dies: real processes, signals and DDS.

A setpoint process, a policy that is killed or stopped again and again, and a drone that notes when setpoints arrive.
With a bundle the policy is the real one, and a server plans its segments meanwhile; without, a stand-in (see
`stand_in_policy`), so that the bridge can be measured where no model is.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from worldvln_edge.client import AnswerTimeoutError, ServerError, ServerUnreachableError
from worldvln_edge.ros_bridge.bench.desk_drone import ArrivedSetpoint, DeskDrone
from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, DdsConfig, ServerConfig
from worldvln_edge.ros_bridge.server_connection import server_client
from worldvln_edge.ros_bridge.setpoints.limits import LimitsConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig

_BLOWS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
_START_S = 60.0
_INSTRUCTION = "Fly forward."
_FLIGHT_S = 6.0
"""With a model: how long a flight of the undisturbed part is, before it is asked for again."""
_WINDOW_S = 0.1
_SPIN = "while True: pass"
_CONFIG = "bench.json"


class FailSafeBenchError(RuntimeError):
    """A process of the bench did not start. The message holds the end of its log."""


class FailSafeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What `ros bench` prints. Lists have one entry a repetition."""

    rate_hz: float
    realtime_priority: int
    bundle: str | None
    """What the server planned with; None: the stand-in."""
    busy_processes: int
    load_average: float
    """Of the machine, over the last minute, at the end."""
    flown_s: float
    interval_ms: dict[str, float]
    """Between setpoints as they are published (what arrives has the drone's own delays too): p50, p99, max."""
    jitter_p99_ms: float
    """99th percentile of how far an interval lies from the period."""
    max_acceleration_m_s2: float
    """Change of velocity within 0.1 s, over all chunk borders; around holds that came at once it is not counted."""
    acceleration_limit_m_s2: float
    holds_in_flight: int
    """Holds without a fault: the machine was too busy for heartbeats; with a model also waits for the next chunk."""
    hold_ms: dict[str, list[float]]
    """From the signal to the first zero velocity, by what was done to the policy."""
    silent_ms: dict[str, list[float]]
    """From the signal to the last setpoint."""
    recovered_ms: dict[str, list[float]]
    """From the start of another policy (with Python's own start) to the first setpoint that moves."""


def run_fail_safe_bench(
    folder: Path,
    *,
    setpoint: SetpointConfig,
    seconds: float,
    repetitions: int,
    busy_processes: int,
    domain_id: int,
    bundle: Path | None = None,
    threads: int = 1,
) -> FailSafeFigures:
    """
    Args:
        folder: for configuration, socket and logs.
        setpoint: rate and real-time priority are taken from it.
        seconds: of undisturbed flight, for intervals and acceleration.
        repetitions: how often the policy is killed, and how often stopped.
        busy_processes: how many processes compute all the while, in place of inference.
        domain_id: DDS domain, which should be nobody else's.
        bundle: served, and flown by the real policy process.
        threads: of the server.

    Raises:
        FailSafeBenchError: a process did not start.
        DeskTimeoutError: setpoints did not come.
    """
    config = BridgeConfig(
        limits=LimitsConfig(geofence_min_m=(-20, -20, 0), geofence_max_m=(20, 20, 10)),
        setpoint=setpoint,
        dds=DdsConfig(domain_id=domain_id, network_interface="lo"),
        server=ServerConfig(url=f"ws://127.0.0.1:{_free_port()}", answer_timeout_s=_START_S, frame_format="rgb8"),
    )
    (folder / _CONFIG).write_bytes(msgspec.json.encode(config))
    hold: dict[str, list[float]] = {name: [] for name in _BLOWS}
    silent: dict[str, list[float]] = {name: [] for name in _BLOWS}
    recovered: dict[str, list[float]] = {name: [] for name in _BLOWS}
    with _Processes(folder) as processes, DeskDrone(config.dds, config.topics) as drone:
        for _ in range(busy_processes):
            processes.start("busy", ["-c", _SPIN])
        if bundle is not None:
            processes.start_server(bundle, config.server, threads)
        processes.start_setpoints()
        policy = processes.start_policy(bundle is not None)
        _fly(drone, bundle)
        began, ends_s = len(drone.setpoints), time.monotonic() + seconds
        while (left_s := ends_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _FLIGHT_S))
            _fly(drone, bundle)
        flight = drone.setpoints[began:]
        for name, blow in [*_BLOWS.items()] * repetitions:
            _fly(drone, bundle)
            # Anywhere between two heartbeats and two ticks; with a model while it still flies.
            time.sleep(random.uniform(0.5, 1.0) if bundle is None else random.uniform(0.0, 0.2))
            policy.send_signal(blow)
            struck_s = time.monotonic()
            time.sleep(1.0)
            hold[name].append(drone.hold_after(struck_s) * 1e3)
            silent[name].append((drone.setpoints[-1].at_s - struck_s) * 1e3)
            policy.kill()
            policy.wait()
            dead = drone.instruction_readers()
            policy, restarted_s = processes.start_policy(bundle is not None), time.monotonic()
            if bundle is not None:
                drone.wait_for_another_reader(dead, _START_S)
            _fly(drone, bundle)
            recovered[name].append((time.monotonic() - restarted_s) * 1e3)
    intervals_ms = np.diff([setpoint.stamp_ns for setpoint in flight]) / 1e6
    return FailSafeFigures(
        rate_hz=setpoint.rate_hz,
        realtime_priority=setpoint.realtime_priority,
        bundle=None if bundle is None else bundle.name,
        busy_processes=busy_processes,
        load_average=os.getloadavg()[0],
        flown_s=(flight[-1].stamp_ns - flight[0].stamp_ns) / 1e9,
        interval_ms={
            "p50": float(np.percentile(intervals_ms, 50)),
            "p99": float(np.percentile(intervals_ms, 99)),
            "max": float(intervals_ms.max()),
        },
        jitter_p99_ms=float(np.percentile(np.abs(intervals_ms - 1e3 / setpoint.rate_hz), 99)),
        holds_in_flight=sum(after.speed == 0 and before.speed > 0 for before, after in pairwise(flight)),
        max_acceleration_m_s2=_largest_acceleration(flight),
        acceleration_limit_m_s2=config.limits.max_acceleration_m_s2,
        hold_ms=hold,
        silent_ms=silent,
        recovered_ms=recovered,
    )


def _largest_acceleration(flight: Sequence[ArrivedSetpoint]) -> float:
    """Over windows, because the time of publication is that of the tick only to some milliseconds."""
    largest, last = 0.0, 0
    for first, before in enumerate(flight):
        while last < len(flight) and (flight[last].stamp_ns - before.stamp_ns) / 1e9 < _WINDOW_S:
            last += 1
        if last == len(flight):
            break
        window = flight[first : last + 1]
        if any(setpoint.speed == 0 for setpoint in window):
            continue
        change = float(np.linalg.norm(np.subtract(window[-1].velocity_m_s, before.velocity_m_s)))
        largest = max(largest, change / ((window[-1].stamp_ns - before.stamp_ns) / 1e9))
    return largest


def _fly(drone: DeskDrone, bundle: Path | None) -> None:
    """Until setpoints move the drone; the stand-in needs no instruction."""
    if bundle is None:
        drone.wait_for_flight(_START_S)
    else:
        drone.fly(_INSTRUCTION, _START_S, _START_S / 4)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Processes:
    """All that were started, ended with the `with`."""

    def __init__(self, folder: Path):
        self._folder, self._socket_path = folder, folder / "setpoints.sock"
        self._options = ["--via", "dds", "--config", str(folder / _CONFIG), "--socket", str(self._socket_path)]
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def start(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") as log:
            process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log)
        self._all.append(process)
        return process

    def start_setpoints(self) -> None:
        process = self.start("setpoints", ["-m", "worldvln_edge", "ros", "setpoints", *self._options])
        give_up_s = time.monotonic() + _START_S
        while not self._socket_path.is_socket():
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise FailSafeBenchError(f"the setpoint process did not start: {self._log('setpoints').read_text()}")
            time.sleep(0.01)

    def start_policy(self, is_real: bool) -> subprocess.Popen[bytes]:
        if is_real:
            return self.start("policy", ["-m", "worldvln_edge", "ros", "policy", *self._options])
        return self.start("policy", ["-m", "worldvln_edge.ros_bridge.bench.stand_in_policy", str(self._socket_path)])

    def start_server(self, bundle: Path, config: ServerConfig, threads: int) -> None:
        address = config.url.removeprefix("ws://")
        options = ["--ws", address, "--threads", str(threads)]
        process = self.start("server", ["-m", "worldvln_edge", "serve", str(bundle), *options])
        give_up_s = time.monotonic() + 2 * _START_S
        while True:
            try:
                with server_client(config)() as client:
                    client.ping()
                return
            except (ServerUnreachableError, ServerError, AnswerTimeoutError) as failure:
                if process.poll() is not None or time.monotonic() > give_up_s:
                    log = self._log("server").read_text()
                    raise FailSafeBenchError(f"the server did not start ({failure}): {log}") from failure
            time.sleep(0.2)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def table_lines(figures: FailSafeFigures) -> Iterator[str]:
    """The figures as lines of text, worst case first where there are several."""
    yield (
        f"setpoints at {figures.rate_hz:g} Hz for {figures.flown_s:.0f} s, "
        f"{figures.busy_processes} busy processes, real-time priority {figures.realtime_priority}"
    )
    planner = "a stand-in" if figures.bundle is None else f"a server with {figures.bundle}"
    yield f"planned by {planner}; load average {figures.load_average:.1f} on {os.cpu_count()} cores"
    intervals = ", ".join(f"{name} {value:.1f}" for name, value in figures.interval_ms.items())
    yield f"  interval        {intervals} ms; 99 of 100 within {figures.jitter_p99_ms:.1f} ms of the period"
    yield (
        f"  acceleration    at most {figures.max_acceleration_m_s2:.2f} m/s2 (limit "
        f"{figures.acceleration_limit_m_s2:g}), {figures.holds_in_flight} holds without a fault"
    )
    for name in _BLOWS:
        yield f"policy {name}, {len(figures.hold_ms[name])} times"
        for label, values in (
            ("hold after", figures.hold_ms[name]),
            ("silent after", figures.silent_ms[name]),
            ("flies again after", figures.recovered_ms[name]),
        ):
            yield f"  {label:<18}at most {max(values):.0f} ms, median {float(np.median(values)):.0f} ms"


def free_domain_id() -> int:
    """A DDS domain that differs from process to process."""
    return 101 + os.getpid() % 100
