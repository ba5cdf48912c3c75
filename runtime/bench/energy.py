"""Energy that the board counts: Intel and AMD processors (RAPL), Jetson boards (INA3221 sensors). Absent elsewhere.

RAPL counts microjoules of a processor package. A Jetson tells volts and milliamperes of its supply, which are sampled
and integrated while the meter runs.
Source: Linux documentation, power/powercap and hwmon; NVIDIA's Jetson power documentation (VDD_IN is the whole module).
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Protocol

_RAPL = Path("sys/class/powercap")
_HWMON = Path("sys/class/hwmon")
_SUPPLIES = ("VDD_IN", "POM_5V_IN")  # of the whole module, on Orin and on older boards
_SAMPLE_S = 0.05


class EnergyMeter(Protocol):
    source: str
    """What is counted, for the reader of a report."""

    def start(self) -> None: ...

    def stop(self) -> float:
        """Joules since `start`."""
        ...


def find_energy_meter(root: Path = Path("/")) -> EnergyMeter | None:
    """The meter of this board; None where there is none or it may not be read (RAPL: root only, on most systems).

    Args:
        root: of the file system.
    """
    domains = [zone for zone in sorted((root / _RAPL).glob("intel-rapl:*")) if _is_package(zone)]
    if domains and all(_readable(zone / "energy_uj") for zone in domains):
        return RaplMeter(domains)
    for folder in sorted((root / _HWMON).glob("hwmon*")):
        for label in sorted(folder.glob("in*_label")):
            if _readable(label) and label.read_text().strip() in _SUPPLIES:
                channel = label.name.removeprefix("in").removesuffix("_label")
                voltage_mv, current_ma = folder / f"in{channel}_input", folder / f"curr{channel}_input"
                if _readable(voltage_mv) and _readable(current_ma):
                    return SupplyMeter(voltage_mv, current_ma, label.read_text().strip())
    return None


class RaplMeter:
    """Sum of the processor packages; memory that has a domain of its own is not in it."""

    def __init__(self, packages: list[Path]):
        self._packages = packages
        self._before: list[int] = []
        self.source = f"RAPL, {len(packages)} processor package{'s' if len(packages) > 1 else ''}"

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> float:
        """The counters start over at a limit, about once an hour at full load; one such turn is accounted for."""
        joules = 0.0
        for zone, before, after in zip(self._packages, self._before, self._read(), strict=True):
            turn = int((zone / "max_energy_range_uj").read_text()) if after < before else 0
            joules += (after - before + turn) / 1e6
        return joules

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._packages]


class SupplyMeter:
    """Volts times amperes of one supply, sampled every 50 ms on a thread of its own."""

    def __init__(self, voltage_mv: Path, current_ma: Path, label: str):
        self._voltage_mv, self._current_ma = voltage_mv, current_ma
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._joules = 0.0
        self.source = f"INA3221, {label}"

    def start(self) -> None:
        self._ended.clear()
        self._joules = 0.0
        self._thread = threading.Thread(target=self._sample, name="energy-meter", daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._joules

    def _sample(self) -> None:
        at, watts, is_last = time.perf_counter(), self._watts(), False
        while not is_last:
            is_last = self._ended.wait(_SAMPLE_S)
            now, then = time.perf_counter(), self._watts()
            self._joules += (now - at) * (watts + then) / 2
            at, watts = now, then

    def _watts(self) -> float:
        return int(self._voltage_mv.read_text()) * int(self._current_ma.read_text()) / 1e6


def _is_package(zone: Path) -> bool:
    name = zone / "name"
    return _readable(name) and name.read_text().startswith("package-")


def _readable(path: Path) -> bool:
    try:
        with path.open() as file:
            file.read(1)
    except OSError:
        return False
    return True
