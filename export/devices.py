"""Known devices: dense peak rates, memory and bandwidth, for roofline estimates.

Rates count one multiply-add as two operations, are dense (vendors often print the number with 2:4 sparsity, twice as
high), and are those of the GPU alone (a Jetson's deep-learning accelerators do not run these graphs). Half-precision
rates of GeForce cards are those with fp32 accumulation, which is what these models need.
`basis` says which published number a row rests on and what was derived from it; `source` is where the vendor
publishes it. A boxed product's clocks and power mode change these numbers: compare before you rely on them.
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
    fp4_tops: float | None  # 4-bit weights alone do not use it: their arithmetic is fp16
    bandwidth_gb_s: float
    memory_gb: float
    compute_capability: str
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


_JETSON_ORIN = "https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-orin/"
_TO_CHECK = " To be checked against the source before it is quoted."

_DEVICES = (
    Device(
        name="orin-nano-8gb",
        fp32_tops=2.1,
        fp16_tops=16.7,
        int8_tops=33.4,
        fp8_tops=None,
        fp4_tops=None,
        bandwidth_gb_s=102,
        memory_gb=8,
        compute_capability="8.7",
        source=_JETSON_ORIN,
        basis="25 W 'Super' mode: 67 sparse INT8 TOPS and 102 GB/s; dense is half, fp16 half of that. In the older "
        "15 W mode: 40 sparse TOPS and 68 GB/s." + _TO_CHECK,
    ),
    Device(
        name="orin-nx-16gb",
        fp32_tops=1.9,
        fp16_tops=15.0,
        int8_tops=30.0,
        fp8_tops=None,
        fp4_tops=None,
        bandwidth_gb_s=102.4,
        memory_gb=16,
        compute_capability="8.7",
        source=_JETSON_ORIN,
        basis="GPU share (60 sparse INT8 TOPS at 918 MHz) of the 100 TOPS of the 25 W mode, the rest being DLA; dense "
        "is half, fp16 half of that. The 'Super' mode clocks the GPU 28 % higher." + _TO_CHECK,
    ),
    Device(
        name="agx-orin-64gb",
        fp32_tops=5.3,
        fp16_tops=42.5,
        int8_tops=85.0,
        fp8_tops=None,
        fp4_tops=None,
        bandwidth_gb_s=204.8,
        memory_gb=64,
        compute_capability="8.7",
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/gtcf21/jetson-orin/"
        "nvidia-jetson-agx-orin-technical-brief.pdf",
        basis="GPU: 170 sparse INT8 TOPS, 5.3 FP32 TFLOPS (technical brief); dense is half, fp16 half of that. "
        "DLA not counted." + _TO_CHECK,
    ),
    Device(
        name="thor-t5000",
        fp32_tops=8.0,
        fp16_tops=258.0,
        int8_tops=517.0,
        fp8_tops=517.0,
        fp4_tops=1035.0,
        bandwidth_gb_s=273,
        memory_gb=128,
        compute_capability="11.0",
        source="https://www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-thor/",
        basis="2070 sparse FP4 TFLOPS at 130 W; dense fp4, fp8 and fp16 are a half, a quarter and an eighth of it; "
        "int8 taken as fp8; fp32 from 2560 cores at 1.57 GHz." + _TO_CHECK,
    ),
    Device(
        name="rtx-4090",
        fp32_tops=82.6,
        fp16_tops=165.2,
        int8_tops=660.6,
        fp8_tops=330.3,
        fp4_tops=None,
        bandwidth_gb_s=1008,
        memory_gb=24,
        compute_capability="8.9",
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
        basis="appendix A of the architecture paper, dense, fp16 and fp8 with fp32 accumulation." + _TO_CHECK,
    ),
    Device(
        name="rtx-5090",
        fp32_tops=104.8,
        fp16_tops=209.5,
        int8_tops=838.0,
        fp8_tops=419.0,
        fp4_tops=1676.0,
        bandwidth_gb_s=1792,
        memory_gb=32,
        compute_capability="12.0",
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
        basis="3352 sparse FP4 'AI TOPS' and 1792 GB/s; dense fp4 and int8 are a half and a quarter; fp16 and fp8 with "
        "fp32 accumulation are a sixteenth and an eighth." + _TO_CHECK,
    ),
    Device(
        name="h200",
        fp32_tops=67.0,
        fp16_tops=989.5,
        int8_tops=1979.0,
        fp8_tops=1979.0,
        fp4_tops=None,
        bandwidth_gb_s=4800,
        memory_gb=141,
        compute_capability="9.0",
        source="https://www.nvidia.com/en-us/data-center/h200/",
        basis="SXM: 1979 FP16, 3958 FP8 and INT8 with sparsity, 4.8 TB/s; dense is half." + _TO_CHECK,
    ),
)

DEVICES: dict[str, Device] = {device.name: device for device in _DEVICES}


def find_device(name: str) -> Device:
    """The device called `name`. Raises DeviceError for an unknown one."""
    if name not in DEVICES:
        raise DeviceError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]
