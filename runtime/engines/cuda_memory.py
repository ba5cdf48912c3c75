"""Device memory by NVIDIA's cuda-python: the default. See `device_memory` for what the calls promise."""

from __future__ import annotations

import importlib
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


class CudaMemory:
    """One device, on its primary context."""

    def __init__(self, device: int = 0):
        """Open a device.

        Raises:
            DeviceMemoryError: cuda-python is not installed, there is no driver, or no such device.
        """
        self._context: Any = None
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise DeviceMemoryError(
                f"cuda-python is not installed ({error}); install it with: pip install 'worldvln-edge[tensorrt]' "
                "(the extra gpu has it, too)"
            ) from error
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # the binding's own, when the driver library is missing
            raise DeviceMemoryError(
                f"no CUDA driver answers here ({error}); run this on the device that has the GPU, with NVIDIA's driver"
            ) from error
        count = self._call("cuDeviceGetCount")
        if not 0 <= device < count:
            raise DeviceMemoryError(f"CUDA device {device} asked for, {count} found here; give one that exists")
        self._device = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        try:
            self._enter()
        except DeviceMemoryError:
            self.close()
            raise

    def close(self) -> None:
        """Release the primary context; the driver ends it when nobody else holds it. Twice does no harm."""
        if self._context is not None:
            self._context = None
            self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, name: str, *arguments: object) -> Any:
        status, *values = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            hint = "; free memory, or use a smaller precision" if "OUT_OF_MEMORY" in status.name else ""
            raise DeviceMemoryError(f"CUDA call {name} failed with {status.name}{hint}")
        return values[0] if values else None

    def _enter(self) -> None:
        """The current context belongs to a thread, and inference may move between threads."""
        if self._context is None:
            raise DeviceMemoryError("this device memory was closed; open another one")
        self._call("cuCtxSetCurrent", self._context)

    @property
    def name(self) -> str:
        return bytes(self._call("cuDeviceGetName", 256, self._device)).split(b"\0")[0].decode(errors="replace")

    @property
    def free_bytes(self) -> int:
        self._enter()
        return int(self._call("cuMemGetInfo"))  # free, total

    @property
    def compute_capability(self) -> str:
        attributes = self._cuda.CUdevice_attribute
        major = attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        numbers = [self._call("cuDeviceGetAttribute", attribute, self._device) for attribute in (major, minor)]
        return f"sm{numbers[0]}{numbers[1]}"

    def allocate(self, size_bytes: int) -> DeviceBuffer:
        self._enter()
        return _CudaBuffer(self, self._call("cuMemAlloc", max(1, size_bytes)), size_bytes)

    def copy_in(self, buffer: DeviceSpan, array: np.ndarray, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        self._enter()
        self._call("cuMemcpyHtoDAsync", buffer.address + offset_bytes, array.ctypes.data, array.nbytes, stream.handle)

    def copy_out(self, array: np.ndarray, buffer: DeviceSpan, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        self._enter()
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, buffer.address + offset_bytes, array.nbytes, stream.handle)

    def copy_strips(
        self, target: Strips, source: Strips, *, planes: int, rows: int, width_bytes: int, stream: DeviceStream
    ) -> None:
        for strips in (target, source):
            strips.check(planes, rows, width_bytes)
        # Not cuMemcpy2D, which may refuse pitches that cuMemAllocPitch did not choose.
        copy = self._cuda.CUDA_MEMCPY3D()
        copy.srcMemoryType = copy.dstMemoryType = self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice = self._cuda.CUdeviceptr(source.span.address + source.offset_bytes)
        copy.srcPitch, copy.srcHeight = source.row_bytes, source.plane_rows
        copy.dstDevice = self._cuda.CUdeviceptr(target.span.address + target.offset_bytes)
        copy.dstPitch, copy.dstHeight = target.row_bytes, target.plane_rows
        copy.WidthInBytes, copy.Height, copy.Depth = width_bytes, rows, planes
        self._enter()
        self._call("cuMemcpy3DAsync", copy, stream.handle)

    def stream(self) -> DeviceStream:
        self._enter()
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return _CudaStream(self, self._call("cuStreamCreate", int(flags)))

    def event(self) -> DeviceEvent:
        self._enter()
        return _CudaEvent(self, self._call("cuEventCreate", 0))

    def _free(self, call: str, thing: Any) -> None:
        self._enter()
        self._call(call, thing)


class _Owned:
    """Something of the driver's that one call gives back."""

    _freed_by: str

    def __init__(self, memory: CudaMemory, thing: Any):
        self._memory = memory
        self._thing = thing

    def free(self) -> None:
        thing, self._thing = self._thing, None  # before the call: what refused to go once is not tried again
        if thing is not None:
            self._memory._free(self._freed_by, thing)

    def _call(self, name: str, *arguments: object) -> Any:
        if self._thing is None:
            raise DeviceMemoryError(f"CUDA call {name} on something that was freed; make it anew")
        self._memory._enter()
        return self._memory._call(name, *arguments)


class _CudaBuffer(_Owned):
    _freed_by = "cuMemFree"

    def __init__(self, memory: CudaMemory, pointer: Any, size_bytes: int):
        super().__init__(memory, pointer)
        self.address = int(pointer)
        self.size_bytes = size_bytes


class _CudaStream(_Owned):
    _freed_by = "cuStreamDestroy"
    can_capture = True

    def __init__(self, memory: CudaMemory, stream: Any):
        super().__init__(memory, stream)
        self.handle = int(stream)

    def wait(self) -> None:
        self._call("cuStreamSynchronize", self.handle)

    def begin_capture(self) -> None:
        mode = self._memory._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self.handle, mode)

    def end_capture(self) -> DeviceGraph:
        graph = self._call("cuStreamEndCapture", self.handle)
        try:
            return _CudaGraph(self._memory, self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._memory._call("cuGraphDestroy", graph)


class _CudaGraph(_Owned):
    _freed_by = "cuGraphExecDestroy"

    def launch(self, stream: DeviceStream) -> None:
        self._call("cuGraphLaunch", self._thing, stream.handle)


class _CudaEvent(_Owned):
    _freed_by = "cuEventDestroy"

    def record(self, stream: DeviceStream) -> None:
        self._call("cuEventRecord", self._thing, stream.handle)

    def wait(self) -> None:
        self._call("cuEventSynchronize", self._thing)
