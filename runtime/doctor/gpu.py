"""Which GPU is there: what nvidia-smi says, or which Jetson this is.

Source: nvidia-smi `--help-query-gpu`; NVIDIA's table of compute capabilities; /proc/device-tree/model of JetPack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from worldvln_edge.runtime.doctor.finding import Finding
from worldvln_edge.runtime.doctor.machine import Machine

_QUERY = "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap"
_JETSONS = (("Thor", "11.0"), ("Orin", "8.7"), ("Xavier", "7.2"), ("TX2", "6.2"), ("Jetson Nano", "5.3"))
"""Word in the model's name -> compute capability; Orin Nano is an Orin."""
_JETPACK_7 = 38  # release of Jetson Linux: Python 3.12, CUDA 13; Orin since 39.2
_DISPLAY_CLASS, _NVIDIA = "0x03", "0x10de"  # of PCI devices
DRIVER_OF_CUDA = {12: 525, 13: 580}
"""CUDA's major version -> oldest driver branch on x86 that runs it."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU that answers."""

    name: str
    compute_capability: tuple[int, int]
    driver: str = ""
    """Empty on a Jetson, whose driver is part of JetPack."""
    is_jetson: bool = False
    total_bytes: int | None = None
    """None where it shares the computer's memory."""
    free_bytes: int | None = None

    @property
    def sm(self) -> str:
        """As in `worldvln-edge build --target`: sm87."""
        return "sm{}{}".format(*self.compute_capability)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions of bundles that it computes (docs of `worldvln-edge export`)."""
        names = ["fp32", "fp16", "int8", "int4"]
        names += ["bf16"] if self.compute_capability >= (8, 0) else []
        names += ["fp8"] if self.compute_capability >= (8, 9) else []
        return tuple(names)


def jetson_model(machine: Machine) -> str | None:
    """`NVIDIA Jetson Orin Nano Developer Kit`, or None where this is no Jetson."""
    model = machine.text("/proc/device-tree/model") or machine.text("/sys/firmware/devicetree/base/model") or ""
    return model if "jetson" in model.lower() else None


def find_gpu(machine: Machine) -> tuple[Gpu | None, list[Finding]]:
    """The first GPU, and what to say about it."""
    jetson = jetson_model(machine)
    if jetson is not None:
        return _of_jetson(machine, jetson)
    answer = machine.ask("nvidia-smi", _QUERY, "--format=csv,noheader,nounits")
    if answer is not None and answer.code == 0 and answer.output:
        gpus = [gpu for line in answer.output.splitlines() if (gpu := _read_line(line)) is not None]
        if gpus:
            return gpus[0], [_described(gpu) for gpu in gpus]
    if answer is not None:
        first = answer.output.splitlines()[0] if answer.output else f"exit status {answer.code}"
        mismatch = "mismatch" in answer.output.lower()
        do = (
            "restart the computer: its driver was updated, and the old one is still loaded"
            if mismatch
            else "install the NVIDIA driver anew, restart, and look at `dmesg | grep -i nvrm`"
        )
        return None, [Finding(check="gpu", state="problem", what=f"nvidia-smi says: {first}", do=do)]
    if machine.has("nvidia-smi"):
        return None, [
            Finding(
                check="gpu",
                state="problem",
                what="nvidia-smi does not answer",
                do="look at `dmesg | grep -i nvrm`, and restart the computer",
            )
        ]
    if _has_nvidia_card(machine):
        return None, [
            Finding(
                check="gpu",
                state="problem",
                what="there is an NVIDIA card, but no driver (nvidia-smi is missing)",
                do=f"install the NVIDIA driver, branch {max(DRIVER_OF_CUDA.values())} or newer, and restart",
            )
        ]
    return None, [Finding(check="gpu", state="note", what="no NVIDIA GPU; graphs run on the CPU")]


def _of_jetson(machine: Machine, model: str) -> tuple[Gpu | None, list[Finding]]:
    capability = next((numbers for word, numbers in _JETSONS if word in model), None)
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", machine.text("/etc/nv_tegra_release") or "")
    software = f"Jetson Linux {release[1]}.{release[2]}" if release else "Jetson Linux of unknown version"
    what = f"{model}, {software}"
    if capability is None:
        return None, [Finding(check="gpu", state="note", what=f"{what}: a model that this release does not know")]
    major, minor = capability.split(".")
    gpu = Gpu(name=model, compute_capability=(int(major), int(minor)), is_jetson=True)
    if gpu.compute_capability < (8, 7) or (release is not None and int(release[1]) < _JETPACK_7):
        return gpu, [
            Finding(
                check="gpu",
                state="warning",
                what=f"{what} ({gpu.sm}): its TensorRT is for a Python that ONNX Runtime 1.25 does not support",
                do="flash JetPack 7.2 or newer (Orin, Thor); earlier modules run bundles on their CPU only",
            )
        ]
    return gpu, [Finding(check="gpu", state="ok", what=f"{what} ({gpu.sm})")]


def _read_line(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    found = re.fullmatch(r"(\d+)\.(\d+)", parts[-1])
    if len(parts) != 5 or found is None:
        return None
    name, driver, total, free, _ = parts

    def mib(text: str) -> int | None:
        return int(text) << 20 if text.isdecimal() else None

    return Gpu(
        name=name,
        compute_capability=(int(found[1]), int(found[2])),
        driver=driver,
        total_bytes=mib(total),
        free_bytes=mib(free),
    )


def _described(gpu: Gpu) -> Finding:
    memory = "" if gpu.total_bytes is None else f", {gpu.total_bytes / 1e9:.1f} GB"
    what = f"{gpu.name} ({gpu.sm}{memory}), driver {gpu.driver}"
    branch, oldest = gpu.driver.partition(".")[0], min(DRIVER_OF_CUDA.values())
    if branch.isdecimal() and int(branch) < oldest:
        return Finding(
            check="gpu",
            state="problem",
            what=f"{what}: too old for CUDA {min(DRIVER_OF_CUDA)}",
            do=f"install driver {max(DRIVER_OF_CUDA.values())} or newer (at least {oldest})",
        )
    return Finding(check="gpu", state="ok", what=what)


def _has_nvidia_card(machine: Machine) -> bool:
    for vendor in machine.matches("sys/bus/pci/devices/*/vendor"):
        here = f"/{vendor.parent.relative_to(machine.root)}"
        if machine.text(f"{here}/vendor") == _NVIDIA and (machine.text(f"{here}/class") or "").startswith(
            _DISPLAY_CLASS
        ):
            return True
    return False
