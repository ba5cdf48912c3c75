"""What named GPUs can do, from their data sheets: dense bf16 peak and memory. For MFU and for plans."""

from __future__ import annotations

from typing import NamedTuple

from worldvln_edge.config import ConfigError


class Gpu(NamedTuple):
    peak_flops: float
    """Dense bf16 with fp32 accumulation, FLOP/s."""
    memory_gb: float
    """10^9 bytes."""


GPUS = {
    "a100-40gb": Gpu(312e12, 40),
    "a100": Gpu(312e12, 80),
    "h100": Gpu(989e12, 80),
    "h200": Gpu(989e12, 141),
    "b200": Gpu(2250e12, 180),
    "l40s": Gpu(362e12, 48),
    "rtx-4090": Gpu(165e12, 24),
    "rtx-6000-ada": Gpu(364e12, 48),
}


def gpu(name: str) -> Gpu:
    """The GPU called `name`. Raises ConfigError for an unknown one."""
    if name not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def peak_of_device(device_name: str) -> float | None:
    """Peak of a device by the name that CUDA gives it, e.g. "NVIDIA H100 80GB HBM3"; None if it is not in the table."""
    words = device_name.lower().replace("-", " ").split()
    best = None
    for name, entry in GPUS.items():
        wanted = [word for word in name.split("-") if not word.endswith("gb")]
        if all(word in words for word in wanted):
            best = entry.peak_flops
    return best
