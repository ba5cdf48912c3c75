"""Known devices: dense peak rates, memory and bandwidth, for roofline estimates.

Rates count one multiply-add as two operations, are dense (vendors often print the number with 2:4 sparsity, twice as
high), and are those of the GPU alone (a Jetson's deep-learning accelerators do not run these graphs). Half-precision
rates of GeForce cards are those with fp32 accumulation, which is what these models need.
`source` is the vendor's document; `basis` says what it prints and what was derived from that. A boxed product's clocks
and power mode change these numbers: compare before you rely on them.
"""

from __future__ import annotations

from dataclasses import dataclass


class DeviceError(LookupError):
    """A device that is not in the table."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak figures of one device. Rates in 1e12 operations a second; None where the device has no such units."""

    name: str
    fp32_tops: float
    fp16_tops: float  # also bf16
    int8_tops: float | None
    fp8_tops: float | None
    bandwidth_gb_s: float
    memory_gb: float
    source: str
    basis: str

    def rate(self, precision: str) -> float:
        """Operations per second at which products of `precision` weights run.

        Args:
            precision: fp32, fp16, bf16, int8, fp8 or int4. Weight-only int4 computes in fp16. Where a device lacks
                8-bit units of a kind, fp16 is what the values are widened to.

        Raises:
            ValueError: another precision.
        """
        tops = {
            "fp32": self.fp32_tops,
            "fp16": self.fp16_tops,
            "bf16": self.fp16_tops,
            "int4": self.fp16_tops,
            "int8": self.int8_tops or self.fp16_tops,
            "fp8": self.fp8_tops or self.fp16_tops,
        }.get(precision)
        if tops is None:
            raise ValueError(f"no rate for precision {precision!r}; choose fp32, fp16, bf16, int8, fp8 or int4")
        return tops * 1e12

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bandwidth_gb_s * 1e9

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9


_DEVICES = (
    Device(
        name="orin-nano-8gb",
        fp32_tops=2.1,
        fp16_tops=16.7,
        int8_tops=33.4,
        fp8_tops=None,
        bandwidth_gb_s=102,
        memory_gb=8,
        source="https://developer.nvidia.com/blog/nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost/",
        basis="'Super' mode, 25 W: 67 INT8 TOPS sparse, 33 dense, 17 FP16 TFLOPS, 102 GB/s, GPU at 1020 MHz; FP32 is "
        "that of 1024 cores at that clock. In the older 15 W mode: 40 sparse, 20 dense, 10 FP16, 68 GB/s.",
    ),
    Device(
        name="orin-nx-16gb",
        fp32_tops=1.9,
        fp16_tops=15.0,
        int8_tops=30.0,
        fp8_tops=None,
        bandwidth_gb_s=102.4,
        memory_gb=16,
        source="https://developer.nvidia.com/downloads/jetson-orin-nx-module-series-data-sheet",
        basis="data sheet DS-10712-001, MAXN: 100 INT8 TOPS sparse of which 40 are the DLAs', so 60 the GPU's (1024 "
        "cores at 918 MHz); dense is half, fp16 half of that. MAXN_SUPER clocks the GPU at 1173 MHz, 28 % higher.",
    ),
    Device(
        name="agx-orin-64gb",
        fp32_tops=5.3,
        fp16_tops=42.5,
        int8_tops=85.0,
        fp8_tops=None,
        bandwidth_gb_s=204.8,
        memory_gb=64,
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/gtcf21/jetson-orin/"
        "nvidia-jetson-agx-orin-technical-brief.pdf",
        basis="GPU: 170 INT8 TOPS sparse, 5.3 FP32 TFLOPS, 204.8 GB/s, 1.3 GHz (also data sheet DS-10662-001); dense "
        "is half, fp16 half of that. The DLAs' 105 sparse TOPS are not counted.",
    ),
    Device(
        name="thor-t5000",
        fp32_tops=8.0,
        fp16_tops=258.0,
        int8_tops=517.0,
        fp8_tops=517.0,
        bandwidth_gb_s=273,
        memory_gb=128,
        source="https://developer.nvidia.com/blog/introducing-nvidia-jetson-thor-the-ultimate-platform-for-physical-ai/",
        basis="1035 TFLOPS sparse FP8 and sparse INT8, 517 dense FP8 and sparse FP16, 273 GB/s, at 130 W; dense INT8 "
        "and FP16 are half of the sparse ones; FP32 is that of 2560 cores at 1.57 GHz.",
    ),
    Device(
        name="rtx-4090",
        fp32_tops=82.6,
        fp16_tops=165.2,
        int8_tops=660.6,
        fp8_tops=330.3,
        bandwidth_gb_s=1008,
        memory_gb=24,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
        basis="appendix A, dense: FP16 with FP32 accumulate 165.2, FP8 with FP32 accumulate 330.3 (version 2.02 of the "
        "paper corrected it), INT8 660.6, FP32 82.6 (non-tensor), 1008 GB/s.",
    ),
    Device(
        name="rtx-5090",
        fp32_tops=104.8,
        fp16_tops=209.5,
        int8_tops=838.0,
        fp8_tops=419.0,
        bandwidth_gb_s=1792,
        memory_gb=32,
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
        basis="appendix, dense: FP16 with FP32 accumulate 209.5, FP8 with FP32 accumulate 419, 3352 FP4 TOPS sparse, "
        "INT8 838 (a quarter of it), 1792 GB/s, FP32 104.8 (non-tensor).",
    ),
    Device(
        name="h200",
        fp32_tops=67.0,
        fp16_tops=989.5,
        int8_tops=1979.0,
        fp8_tops=1979.0,
        bandwidth_gb_s=4800,
        memory_gb=141,
        source="https://www.nvidia.com/en-us/data-center/h200/",
        basis="SXM: 1979 FP16 TFLOPS, 3958 FP8 and INT8, all with sparsity, so dense is half; 67 FP32, 4.8 TB/s.",
    ),
)

DEVICES: dict[str, Device] = {device.name: device for device in _DEVICES}


def find_device(name: str) -> Device:
    """The device called `name`. Raises DeviceError for an unknown one."""
    if name not in DEVICES:
        raise DeviceError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]
