"""Device memory in five calls, so that engines know no CUDA binding: allocate, copy in, copy out, stream, event.

`cuda_memory.CudaMemory` uses NVIDIA's cuda-python and is the default. `pycuda_memory.PyCudaMemory` shares the context
of a program that uses PyCUDA already; it needs no other change. Both work on the device's primary context, which
TensorRT uses as well. Pointers are plain integers and sizes are bytes.

Buffers, streams, events and graphs belong to whoever asked for them and are given back with `free()`: once is enough,
twice does no harm.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class DeviceMemoryError(RuntimeError):
    """The device, its driver or its binding refuses. The message says which call, why, and what to do."""


class DeviceBuffer(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    def free(self) -> None: ...


class DeviceEvent(Protocol):
    def record(self, stream: DeviceStream) -> None: ...
    def wait(self) -> None:
        """Block until everything in front of the record is done."""
        ...

    def free(self) -> None: ...


class DeviceGraph(Protocol):
    """Work that was captured, ready to launch. Free it when nothing of it runs any more."""

    def launch(self, stream: DeviceStream) -> None: ...
    def free(self) -> None: ...


class DeviceStream(Protocol):
    @property
    def handle(self) -> int: ...
    @property
    def can_capture(self) -> bool:
        """Whether `begin_capture` and `end_capture` exist here."""
        ...

    def wait(self) -> None:
        """Block until everything in the stream is done."""
        ...

    def begin_capture(self) -> None: ...
    def end_capture(self) -> DeviceGraph:
        """End the capture, whatever became of it, and make its work a graph.

        Raises:
            DeviceMemoryError: something in it cannot be captured. The stream works as before.
        """
        ...

    def free(self) -> None: ...


class DeviceMemory(Protocol):
    """One GPU. Copies are asynchronous: the host array must live, unchanged, until the stream was waited for."""

    @property
    def compute_capability(self) -> str:
        """`sm89`."""
        ...

    def allocate(self, size_bytes: int) -> DeviceBuffer: ...
    def copy_in(self, buffer: DeviceBuffer, array: np.ndarray, stream: DeviceStream, offset_bytes: int = 0) -> None:
        """C-contiguous host array to the device."""
        ...

    def copy_out(self, array: np.ndarray, buffer: DeviceBuffer, stream: DeviceStream, offset_bytes: int = 0) -> None:
        """Device to a writable C-contiguous host array."""
        ...

    def stream(self) -> DeviceStream: ...
    def event(self) -> DeviceEvent: ...
    def close(self) -> None:
        """Let go of the device's context, after everything made with it was freed."""
        ...


def check_span(buffer: DeviceBuffer, array: np.ndarray, offset_bytes: int) -> None:
    """Refuse a copy that would leave the buffer or that a pointer and a size do not describe.

    Raises:
        DeviceMemoryError: out of bounds, or an array that is not C-contiguous.
    """
    if not array.flags.c_contiguous:
        raise DeviceMemoryError(f"an array {array.shape} with gaps cannot be copied; make it contiguous first")
    end = offset_bytes + array.nbytes
    if offset_bytes < 0 or end > buffer.size_bytes:
        raise DeviceMemoryError(
            f"a copy of bytes {offset_bytes} to {end} leaves the device buffer of {buffer.size_bytes} bytes"
        )
