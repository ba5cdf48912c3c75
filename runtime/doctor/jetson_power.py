"""Power mode and clocks of a Jetson, which decide how long a segment takes more than anything else.

Source: Jetson Linux developer guide, "Supported Modes and Power Efficiency" (nvpmodel, jetson_clocks).
"""

from __future__ import annotations

import re

from worldvln_edge.runtime.doctor.finding import Finding
from worldvln_edge.runtime.doctor.gpu import jetson_model
from worldvln_edge.runtime.doctor.machine import Machine


def check_power(machine: Machine) -> list[Finding]:
    """Nothing on other computers."""
    if jetson_model(machine) is None:
        return []
    return [_mode(machine), *_gpu_clock(machine)]


def _mode(machine: Machine) -> Finding:
    answer = machine.ask("nvpmodel", "-q")
    found = None if answer is None else re.search(r"NV Power Mode:\s*(\S+)", answer.output)
    if found is None:
        return Finding(
            check="power mode",
            state="warning",
            what="nvpmodel does not say which power mode is set",
            do="run `sudo nvpmodel -q` yourself; segments take longer in the lower modes",
        )
    modes = _modes(machine)
    best = next((mode for mode in modes.values() if mode.startswith("MAXN")), None)
    if found[1].startswith("MAXN") or best is None:
        return Finding(check="power mode", state="ok", what=found[1])
    number = next(number for number, mode in modes.items() if mode == best)
    return Finding(
        check="power mode",
        state="warning",
        what=f"{found[1]}, which limits clocks and cores",
        do=f"where battery and cooling allow it: `sudo nvpmodel -m {number}` ({best}); then `worldvln-edge tune`",
    )


def _modes(machine: Machine) -> dict[int, str]:
    lines = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", machine.text("/etc/nvpmodel.conf") or "")
    return {int(number): name for number, name in lines}


def _gpu_clock(machine: Machine) -> list[Finding]:
    for folder in machine.matches("sys/class/devfreq/*"):
        here = f"/{folder.relative_to(machine.root)}"
        lowest, highest = machine.text(f"{here}/min_freq"), machine.text(f"{here}/max_freq")
        if "gpu" not in folder.name and "ga10b" not in folder.name and "gv11b" not in folder.name:
            continue
        if not (lowest and highest and lowest.isdecimal() and highest.isdecimal()):
            continue
        if int(lowest) < int(highest):
            return [
                Finding(
                    check="gpu clock",
                    state="warning",
                    what=f"between {int(lowest) / 1e6:.0f} and {int(highest) / 1e6:.0f} MHz, as the load wants",
                    do="`sudo jetson_clocks` holds it at the top; in the file of a systemd unit it outlives a restart",
                )
            ]
        return [Finding(check="gpu clock", state="ok", what=f"held at {int(highest) / 1e6:.0f} MHz")]
    return []
