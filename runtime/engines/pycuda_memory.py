"""Device memory by PyCUDA, for programs that use it already. See `device_memory` for what the calls promise."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from worldvln_edge.runtime.engines.device_memory import (
    DeviceBuffer,
    DeviceEvent,
    DeviceGraph,
    DeviceMemoryError,
    DeviceSpan,
    DeviceStream,
    Strips,
    check_span,
)


class PyCudaMemory:
    """One device, on its primary context. Without CUDA graphs, which PyCUDA has not."""

    def __init__(self, device: int = 0):
        """Open a device.

        Raises:
            DeviceMemoryError: PyCUDA is not installed, there is no driver, or no such device.
        """
        try:
            self._cuda: ModuleType = importlib.import_module("pycuda.driver")
        except ImportError as error:
            raise DeviceMemoryError(
                f"PyCUDA is not installed ({error}); install it with: pip install 'worldvln-edge[pycuda]', or use the "
                "default, cuda-python"
            ) from error
        try:
            self._cuda.init()
            self._device = self._cuda.Device(device)
            self._context: Any = self._device.retain_primary_context()
        except self._cuda.Error as error:
            raise DeviceMemoryError(
                f"CUDA device {device} does not open ({error}); run this on the device that has the GPU"
            ) from error

    def close(self) -> None:
        """Let go of the primary context. Twice does no harm."""
        context, self._context = self._context, None
        if context is not None:
            context.detach()

    @contextmanager
    def _enter(self) -> Iterator[None]:
        """Make the primary context current for a while; what the caller had comes back."""
        if self._context is None:
            raise DeviceMemoryError("this device memory was closed; open another one")
        self._context.push()
        try:
            yield
        except self._cuda.Error as error:
            raise DeviceMemoryError(f"PyCUDA refuses: {error}") from error
        finally:
            self._context.pop()

    @property
    def name(self) -> str:
        return self._device.name()

    @property
    def free_bytes(self) -> int:
        with self._enter():
            free, _ = self._cuda.mem_get_info()
        return int(free)

    @property
    def compute_capability(self) -> str:
        major, minor = self._device.compute_capability()
        return f"sm{major}{minor}"

    def allocate(self, size_bytes: int) -> DeviceBuffer:
        with self._enter():
            try:
                return _PyCudaBuffer(self, self._cuda.mem_alloc(max(1, size_bytes)), size_bytes)
            except self._cuda.MemoryError as error:
                raise DeviceMemoryError(
                    f"the device has no {size_bytes} bytes left; free memory, or use a smaller precision"
                ) from error

    def copy_in(self, buffer: DeviceSpan, array: np.ndarray, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        with self._enter():
            self._cuda.memcpy_htod_async(buffer.address + offset_bytes, array, _native(stream))

    def copy_out(self, array: np.ndarray, buffer: DeviceSpan, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        with self._enter():
            self._cuda.memcpy_dtoh_async(array, buffer.address + offset_bytes, _native(stream))

    def copy_strips(
        self, target: Strips, source: Strips, *, planes: int, rows: int, width_bytes: int, stream: DeviceStream
    ) -> None:
        for strips in (target, source):
            strips.check(planes, rows, width_bytes)
        with self._enter():
            copy = self._cuda.Memcpy3D()
            copy.set_src_device(source.span.address + source.offset_bytes)
            copy.src_pitch, copy.src_height = source.row_bytes, source.plane_rows
            copy.set_dst_device(target.span.address + target.offset_bytes)
            copy.dst_pitch, copy.dst_height = target.row_bytes, target.plane_rows
            copy.width_in_bytes, copy.height, copy.depth = width_bytes, rows, planes
            copy(_native(stream))

    def stream(self) -> DeviceStream:
        with self._enter():
            return _PyCudaStream(self, self._cuda.Stream())

    def event(self) -> DeviceEvent:
        with self._enter():
            return _PyCudaEvent(self, self._cuda.Event())


class _Owned:
    """An object of PyCUDA's, which ends its part of the driver's when it is let go of inside its context."""

    def __init__(self, memory: PyCudaMemory, native: Any):
        self._memory = memory
        self._native = native

    @property
    def native(self) -> Any:
        if self._native is None:
            raise DeviceMemoryError("this was freed; make it anew")
        return self._native

    def free(self) -> None:
        if self._native is not None:
            with self._memory._enter():
                self._native = None


class _PyCudaBuffer(_Owned):
    def __init__(self, memory: PyCudaMemory, allocation: Any, size_bytes: int):
        super().__init__(memory, allocation)
        self.address = int(allocation)
        self.size_bytes = size_bytes

    def free(self) -> None:
        if self._native is not None:
            with self._memory._enter():
                allocation, self._native = self._native, None
                allocation.free()


class _PyCudaStream(_Owned):
    can_capture = False

    def __init__(self, memory: PyCudaMemory, stream: Any):
        super().__init__(memory, stream)
        self.handle = int(stream.handle)

    def wait(self) -> None:
        with self._memory._enter():
            self.native.synchronize()

    def begin_capture(self) -> None:
        raise DeviceMemoryError("PyCUDA captures no CUDA graphs; use cuda-python for them")

    def end_capture(self) -> DeviceGraph:
        raise DeviceMemoryError("PyCUDA captures no CUDA graphs; use cuda-python for them")


class _PyCudaEvent(_Owned):
    def record(self, stream: DeviceStream) -> None:
        with self._memory._enter():
            self.native.record(_native(stream))

    def wait(self) -> None:
        with self._memory._enter():
            self.native.synchronize()


def _native(stream: DeviceStream) -> Any:
    if not isinstance(stream, _PyCudaStream):
        raise DeviceMemoryError("this stream was made by another binding; make it with the same device memory")
    return stream.native
