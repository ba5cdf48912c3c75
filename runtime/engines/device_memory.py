"""Device memory in six calls, so that engines know no CUDA binding: allocate, copy in, copy out, copy strips inside,
stream, event.

`cuda_memory.CudaMemory` uses NVIDIA's cuda-python and is the default. `pycuda_memory.PyCudaMemory` shares the context
of a program that uses PyCUDA already; it needs no other change. Both work on the device's primary context, which
TensorRT uses as well. Pointers are plain integers and sizes are bytes.

Buffers, streams, events and graphs belong to whoever asked for them and are given back with `free()`: once is enough,
twice does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class DeviceMemoryError(RuntimeError):
    """The device, its driver or its binding refuses. The message says which call, why, and what to do."""


class DeviceSpan(Protocol):
    """Bytes on the device: a buffer, or a part of one."""

    @property
    def address(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


class DeviceBuffer(DeviceSpan, Protocol):
    def free(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Where strips of bytes lie in a span: rows of them at one distance, planes of rows at another."""

    span: DeviceSpan
    offset_bytes: int = 0
    row_bytes: int
    """From a strip to the next one of its plane."""
    plane_rows: int
    """Rows from a plane to the next one."""

    def check(self, planes: int, rows: int, width_bytes: int) -> None:
        """Refuse strips that overlap or leave the span.

        Raises:
            DeviceMemoryError: they do.
        """
        if self.offset_bytes % self.row_bytes + width_bytes > self.row_bytes or rows > self.plane_rows:
            raise DeviceMemoryError(
                f"strips of {width_bytes} bytes from byte {self.offset_bytes} on, {rows} a plane, do not fit into rows "
                f"of {self.row_bytes} bytes, {self.plane_rows} a plane"
            )
        end = self.offset_bytes + ((planes - 1) * self.plane_rows + rows - 1) * self.row_bytes + width_bytes
        if self.offset_bytes < 0 or end > self.span.size_bytes:
            raise DeviceMemoryError(
                f"strips in bytes {self.offset_bytes} to {end} leave the device buffer of {self.span.size_bytes} bytes"
            )


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
    def name(self) -> str:
        """What the driver calls the device: `NVIDIA GeForce RTX 4090`."""
        ...

    @property
    def compute_capability(self) -> str:
        """`sm89`."""
        ...

    @property
    def free_bytes(self) -> int:
        """What the driver can still give out now, to this or any other process."""
        ...

    def allocate(self, size_bytes: int) -> DeviceBuffer: ...
    def copy_in(self, buffer: DeviceSpan, array: np.ndarray, stream: DeviceStream, offset_bytes: int = 0) -> None:
        """C-contiguous host array to the device."""
        ...

    def copy_out(self, array: np.ndarray, buffer: DeviceSpan, stream: DeviceStream, offset_bytes: int = 0) -> None:
        """Device to a writable C-contiguous host array."""
        ...

    def copy_strips(
        self, target: Strips, source: Strips, *, planes: int, rows: int, width_bytes: int, stream: DeviceStream
    ) -> None:
        """planes x rows strips of width_bytes from one place on the device to another; the two do not overlap."""
        ...

    def stream(self) -> DeviceStream: ...
    def event(self) -> DeviceEvent: ...
    def close(self) -> None:
        """Let go of the device's context, after everything made with it was freed."""
        ...


def check_span(buffer: DeviceSpan, array: np.ndarray, offset_bytes: int) -> None:
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


def copy_whole(
    memory: DeviceMemory, target: DeviceSpan, source: DeviceSpan, size_bytes: int, stream: DeviceStream
) -> None:
    """The first bytes of one span into another, on the device."""
    if size_bytes:
        places = (Strips(span=span, row_bytes=size_bytes, plane_rows=1) for span in (target, source))
        memory.copy_strips(*places, planes=1, rows=1, width_bytes=size_bytes, stream=stream)
