"""How punctual setpoints are, and how soon the drone holds when the policy dies: real processes, signals and DDS.

A setpoint process, a policy that is killed or stopped again and again, and a drone that notes when setpoints arrive.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from worldvln_edge.ros_bridge.bench.desk_drone import ArrivedSetpoint, DeskDrone
from worldvln_edge.ros_bridge.bridge_config import BridgeConfig, DdsConfig
from worldvln_edge.ros_bridge.setpoints.limits import LimitsConfig
from worldvln_edge.ros_bridge.setpoints.setpoint_config import SetpointConfig

_BLOWS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
_START_S = 20.0
_WINDOW_S = 0.1
_SPIN = "while True: pass"


class FailSafeBenchError(RuntimeError):
    """A process of the bench did not start. The message holds the end of its log."""


class FailSafeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What `ros bench` prints. Lists have one entry a repetition."""

    rate_hz: float
    realtime_priority: int
    busy_processes: int
    flown_s: float
    interval_ms: dict[str, float]
    """Between setpoints as they are published (what arrives has the drone's own delays too): p50, p99, max."""
    jitter_p99_ms: float
    """99th percentile of how far an interval lies from the period."""
    max_acceleration_m_s2: float
    """Change of velocity within 0.1 s, over all chunk borders; around holds that came at once it is not counted."""
    acceleration_limit_m_s2: float
    holds_in_flight: int
    """Holds without a fault: the machine was too busy for heartbeats."""
    hold_ms: dict[str, list[float]]
    """From the signal to the first zero velocity, by what was done to the policy."""
    silent_ms: dict[str, list[float]]
    """From the signal to the last setpoint."""
    recovered_ms: dict[str, list[float]]
    """From the start of another policy (with Python's own start) to the first setpoint that moves."""


def run_fail_safe_bench(
    folder: Path, *, setpoint: SetpointConfig, seconds: float, repetitions: int, busy_processes: int, domain_id: int
) -> FailSafeFigures:
    """
    Args:
        folder: for configuration, socket and logs.
        setpoint: rate and real-time priority are taken from it.
        seconds: of undisturbed flight, for intervals and acceleration.
        repetitions: how often the policy is killed, and how often stopped.
        busy_processes: how many processes compute all the while, in place of inference.
        domain_id: DDS domain, which should be nobody else's.

    Raises:
        FailSafeBenchError: a process did not start.
        DeskTimeoutError: setpoints did not come.
    """
    config = BridgeConfig(
        limits=LimitsConfig(geofence_min_m=(-20, -20, 0), geofence_max_m=(20, 20, 10)),
        setpoint=setpoint,
        dds=DdsConfig(domain_id=domain_id, network_interface="lo"),
    )
    (folder / "bench.toml").write_text(_toml(config))
    hold: dict[str, list[float]] = {name: [] for name in _BLOWS}
    silent: dict[str, list[float]] = {name: [] for name in _BLOWS}
    recovered: dict[str, list[float]] = {name: [] for name in _BLOWS}
    with _Processes(folder) as processes, DeskDrone(config.dds, config.topics) as drone:
        for _ in range(busy_processes):
            processes.start("busy", ["-c", _SPIN])
        processes.start_setpoints()
        policy = processes.start_policy()
        drone.wait_for_flight(_START_S)
        began = len(drone.setpoints)
        time.sleep(seconds)
        flight = drone.setpoints[began:]
        for name, blow in [*_BLOWS.items()] * repetitions:
            time.sleep(random.uniform(0.5, 1.0))  # anywhere between two heartbeats and two ticks
            policy.send_signal(blow)
            struck_s = time.monotonic()
            time.sleep(1.0)
            hold[name].append(drone.hold_after(struck_s) * 1e3)
            silent[name].append((drone.setpoints[-1].at_s - struck_s) * 1e3)
            policy.kill()
            policy.wait()
            policy, restarted_s = processes.start_policy(), time.monotonic()
            drone.wait_for_flight(_START_S)
            recovered[name].append((time.monotonic() - restarted_s) * 1e3)
    intervals_ms = np.diff([setpoint.stamp_ns for setpoint in flight]) / 1e6
    return FailSafeFigures(
        rate_hz=setpoint.rate_hz,
        realtime_priority=setpoint.realtime_priority,
        busy_processes=busy_processes,
        flown_s=seconds,
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


def _toml(config: BridgeConfig) -> str:
    """The sections that the bench sets; TOML without a writer, for there are only numbers, lists and one name."""
    sections: dict[str, dict[str, object]] = {
        "limits": {
            "geofence_min_m": list(config.limits.geofence_min_m),
            "geofence_max_m": list(config.limits.geofence_max_m),
        },
        "setpoint": {"rate_hz": config.setpoint.rate_hz, "realtime_priority": config.setpoint.realtime_priority},
        "dds": {"domain_id": config.dds.domain_id, "network_interface": '"lo"'},
    }
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
        for name, values in sections.items()
    ]
    return "\n".join(lines)


class _Processes:
    """All that were started, ended with the `with`."""

    def __init__(self, folder: Path):
        self._folder, self._socket_path = folder, folder / "setpoints.sock"
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
        options = ["--config", str(self._folder / "bench.toml"), "--socket", str(self._socket_path)]
        process = self.start("setpoints", ["-m", "worldvln_edge", "ros", "setpoints", "--via", "dds", *options])
        give_up_s = time.monotonic() + _START_S
        while not self._socket_path.is_socket():
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise FailSafeBenchError(f"the setpoint process did not start: {self._log('setpoints').read_text()}")
            time.sleep(0.01)

    def start_policy(self) -> subprocess.Popen[bytes]:
        return self.start("policy", ["-m", "worldvln_edge.ros_bridge.bench.stand_in_policy", str(self._socket_path)])

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def table_lines(figures: FailSafeFigures) -> Iterator[str]:
    """The figures as lines of text, worst case first where there are several."""
    yield (
        f"setpoints at {figures.rate_hz:g} Hz for {figures.flown_s:g} s, {figures.busy_processes} busy processes, "
        f"real-time priority {figures.realtime_priority}"
    )
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
