"""Computers to examine, made of what a real one answers: files below a root, programs in a folder, Python packages."""

from pathlib import Path

from worldvln_edge.runtime.doctor.machine import Machine


class Computer:
    """Folder of one computer; what is not put there is not installed."""

    def __init__(self, folder: Path):
        self.root, self._programs, self._modules = folder / "root", folder / "bin", folder / "modules"
        for each in (self.root, self._programs, self._modules):
            each.mkdir(parents=True)

    @property
    def machine(self) -> Machine:
        return Machine(root=self.root, programs=str(self._programs), modules=self._modules)

    def file(self, path: str, text: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def program(self, name: str, output: str, *, code: int = 0) -> None:
        """One that prints the same whatever it is asked."""
        path = self._programs / name
        path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\nexit {code}\n")
        path.chmod(0o755)

    def module(self, name: str, source: str, *, version: str = "", distribution: str = "") -> None:
        """A Python package, in front of one that is really installed."""
        (self._modules / f"{name}.py").write_text(source)
        if version:
            self.distribution(distribution or name, version)

    def distribution(self, name: str, version: str) -> None:
        """What pip knows of a package."""
        folder = self._modules / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def onnx_runtime(self, version: str, *providers: str) -> None:
        """One that says what it has; it computes nothing."""
        self.module(
            "onnxruntime", f"__version__ = {version!r}\ndef get_available_providers(): return {list(providers)}\n"
        )


def plain_computer(folder: Path) -> Computer:
    """A processor, 16 GB of memory, a synchronised clock."""
    computer = Computer(folder)
    computer.file("/proc/cpuinfo", "processor : 0\nmodel name : Some CPU\n\nprocessor : 1\nmodel name : Some CPU\n")
    computer.file("/proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable: 15000000 kB\n")
    computer.program("timedatectl", "yes")
    return computer


def jetson(folder: Path, *, model: str = "NVIDIA Jetson Orin Nano Developer Kit", release: int = 39) -> Computer:
    """Fresh from the card: middle power mode, clocks that follow the load, no TensorRT, no time server."""
    computer = plain_computer(folder)
    computer.file("/proc/device-tree/model", f"{model}\0")
    computer.file("/etc/nv_tegra_release", f"# R{release} (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
    computer.file("/etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n")
    computer.file("/sys/class/devfreq/17000000.gpu/min_freq", "306000000")
    computer.file("/sys/class/devfreq/17000000.gpu/max_freq", "1020000000")
    computer.file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "schedutil\n")
    computer.file("/sys/class/thermal/thermal_zone0/type", "cpu-thermal")
    computer.file("/sys/class/thermal/thermal_zone0/temp", "91500")
    computer.program("nvpmodel", "NV Power Mode: 15W\n0")
    computer.program("timedatectl", "no")
    return computer
