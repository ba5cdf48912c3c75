"""Processor, memory, disk and temperature.

Source: proc(5); Linux kernel documentation of cpufreq and of the thermal sysfs.
"""

from __future__ import annotations

import os
import re

from worldvln_edge.runtime.doctor.finding import Finding
from worldvln_edge.runtime.doctor.machine import Machine
from worldvln_edge.runtime.sessions.available_memory import available_bytes

_LEAST_MEMORY = 1.5e9
"""The server with the packaged `nano` and a few sessions."""
_LEAST_DISK = 2e9
_HOT_C = 85.0


def check_host(machine: Machine) -> list[Finding]:
    """All of this module."""
    findings = [_processor(machine), _memory(machine), _disk(machine), _temperature(machine)]
    return [finding for finding in findings if finding is not None]


def _processor(machine: Machine) -> Finding:
    info = machine.text("/proc/cpuinfo") or ""
    cores = len(re.findall(r"^processor\s*:", info, re.MULTILINE)) or os.cpu_count() or 1
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    what = f"{name[1].strip() if name else 'unnamed processor'}, {cores} cores"
    governors = {
        machine.text(str(path.relative_to(machine.root)))  # None of a core that is switched off
        for path in machine.matches("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")
    }
    slow = sorted(name for name in governors if name and name != "performance")
    if slow:
        return Finding(
            check="processor",
            state="warning",
            what=f"{what}; clocks follow the load (governor {', '.join(slow)}): calls after a pause are slow",
            do="on a Jetson `sudo jetson_clocks`, elsewhere `sudo cpupower frequency-set -g performance`",
        )
    return Finding(check="processor", state="ok", what=what)


def _memory(machine: Machine) -> Finding | None:
    left = available_bytes(machine.root)
    if left is None:
        return None
    what = f"{left / 1e9:.1f} GB left for this process"
    if left < _LEAST_MEMORY:
        return Finding(
            check="memory",
            state="problem",
            what=what,
            do=f"stop other programs, or raise the container's limit; the server needs {_LEAST_MEMORY / 1e9} GB",
        )
    return Finding(check="memory", state="ok", what=what)


def _disk(machine: Machine) -> Finding | None:
    try:
        numbers = os.statvfs(machine.root)
    except OSError:
        return None
    free = numbers.f_bavail * numbers.f_frsize
    what = f"{free / 1e9:.0f} GB free on {machine.root}"
    if free < _LEAST_DISK:
        return Finding(
            check="disk",
            state="warning",
            what=what,
            do="make room: recordings, journals and new engines would fail to be written",
        )
    return Finding(check="disk", state="ok", what=what)


def _temperature(machine: Machine) -> Finding | None:
    celsius: dict[str, float] = {}
    for zone in machine.matches("sys/class/thermal/thermal_zone*"):
        here = f"/{zone.relative_to(machine.root)}"
        raw = machine.text(f"{here}/temp") or ""
        if re.fullmatch(r"-?\d+", raw):
            celsius[machine.text(f"{here}/type") or zone.name] = int(raw) / 1000
    if not celsius:
        return None
    hottest = max(celsius, key=lambda name: celsius[name])
    what = f"{celsius[hottest]:.0f} C at {hottest}"
    if celsius[hottest] >= _HOT_C:
        return Finding(
            check="temperature",
            state="warning",
            what=f"{what}: the clocks will be throttled",
            do="let it cool down; check fan and heat sink, or choose a lower power mode",
        )
    return Finding(check="temperature", state="ok", what=what)
