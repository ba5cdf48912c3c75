"""Device memory in five calls, so that engines know no CUDA binding: allocate, copy in, copy out, stream, event.

`CudaMemory` uses NVIDIA's cuda-python and is the default. `PyCudaMemory` shares the context of a program that uses
PyCUDA already; it needs no other change. Both work on the device's primary context, which TensorRT uses as well.
Pointers are plain integers and sizes are bytes.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Protocol

import numpy as np


class DeviceMemoryError(RuntimeError):
    """The device, its driver or its binding refuses. The message says which call, why, and what to do."""


class DeviceBuffer(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    def free(self) -> None:
        """Give the memory back; once is enough, twice does no harm."""
        ...


class DeviceEvent(Protocol):
    def record(self, stream: DeviceStream) -> None: ...
    def wait(self) -> None:
        """Block until everything in front of the record is done."""
        ...


class DeviceGraph(Protocol):
    def launch(self, stream: DeviceStream) -> None: ...


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
    def end_capture(self) -> DeviceGraph: ...


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


class CudaMemory:
    """NVIDIA's cuda-python, on the primary context of one device."""

    def __init__(self, device: int = 0):
        """Open a device.

        Raises:
            DeviceMemoryError: cuda-python is not installed, there is no driver, or no such device.
        """
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise DeviceMemoryError(
                f"cuda-python is not installed ({error}); install it with: pip install 'worldvln-edge[tensorrt]'"
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
        self._enter()

    def _call(self, name: str, *arguments: object) -> Any:
        status, *values = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            hint = "; free memory, or use a smaller precision" if "OUT_OF_MEMORY" in status.name else ""
            raise DeviceMemoryError(f"CUDA call {name} failed with {status.name}{hint}")
        return values[0] if values else None

    def _enter(self) -> None:
        """The current context belongs to a thread, and inference may move between threads."""
        self._call("cuCtxSetCurrent", self._context)

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

    def copy_in(self, buffer: DeviceBuffer, array: np.ndarray, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        self._enter()
        self._call("cuMemcpyHtoDAsync", buffer.address + offset_bytes, array.ctypes.data, array.nbytes, stream.handle)

    def copy_out(self, array: np.ndarray, buffer: DeviceBuffer, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        self._enter()
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, buffer.address + offset_bytes, array.nbytes, stream.handle)

    def stream(self) -> DeviceStream:
        self._enter()
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return _CudaStream(self, self._call("cuStreamCreate", int(flags)))

    def event(self) -> DeviceEvent:
        self._enter()
        return _CudaEvent(self, self._call("cuEventCreate", 0))


class _CudaBuffer:
    def __init__(self, memory: CudaMemory, pointer: Any, size_bytes: int):
        self._memory = memory
        self._pointer = pointer
        self.address = int(pointer)
        self.size_bytes = size_bytes

    def free(self) -> None:
        if self._pointer is not None:
            self._memory._enter()
            self._memory._call("cuMemFree", self._pointer)
            self._pointer = None


class _CudaStream:
    can_capture = True

    def __init__(self, memory: CudaMemory, stream: Any):
        self._memory = memory
        self.handle = int(stream)

    def wait(self) -> None:
        self._memory._enter()
        self._memory._call("cuStreamSynchronize", self.handle)

    def begin_capture(self) -> None:
        self._memory._enter()
        mode = self._memory._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._memory._call("cuStreamBeginCapture", self.handle, mode)

    def end_capture(self) -> DeviceGraph:
        self._memory._enter()
        graph = self._memory._call("cuStreamEndCapture", self.handle)
        try:
            return _CudaGraph(self._memory, self._memory._call("cuGraphInstantiate", graph, 0))
        finally:
            self._memory._call("cuGraphDestroy", graph)


class _CudaGraph:
    def __init__(self, memory: CudaMemory, executable: Any):
        self._memory = memory
        self._executable = executable

    def launch(self, stream: DeviceStream) -> None:
        self._memory._enter()
        self._memory._call("cuGraphLaunch", self._executable, stream.handle)


class _CudaEvent:
    def __init__(self, memory: CudaMemory, event: Any):
        self._memory = memory
        self._event = event

    def record(self, stream: DeviceStream) -> None:
        self._memory._enter()
        self._memory._call("cuEventRecord", self._event, stream.handle)

    def wait(self) -> None:
        self._memory._enter()
        self._memory._call("cuEventSynchronize", self._event)


class PyCudaMemory:
    """PyCUDA, on the primary context, for programs that use it already. Without CUDA graphs, which it has not."""

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
            self._context = self._device.retain_primary_context()
        except self._cuda.Error as error:
            raise DeviceMemoryError(
                f"CUDA device {device} does not open ({error}); run this on the device that has the GPU"
            ) from error

    def _enter(self) -> _PyCudaContext:
        return _PyCudaContext(self._context)

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

    def copy_in(self, buffer: DeviceBuffer, array: np.ndarray, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        with self._enter():
            self._cuda.memcpy_htod_async(buffer.address + offset_bytes, array, _pycuda_stream(stream))

    def copy_out(self, array: np.ndarray, buffer: DeviceBuffer, stream: DeviceStream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        with self._enter():
            self._cuda.memcpy_dtoh_async(array, buffer.address + offset_bytes, _pycuda_stream(stream))

    def stream(self) -> DeviceStream:
        with self._enter():
            return _PyCudaStream(self, self._cuda.Stream())

    def event(self) -> DeviceEvent:
        with self._enter():
            return _PyCudaEvent(self, self._cuda.Event())


class _PyCudaContext:
    """Makes the primary context current for a while and restores what the caller had."""

    def __init__(self, context: Any):
        self._context = context

    def __enter__(self) -> None:
        self._context.push()

    def __exit__(self, *error: object) -> None:
        self._context.pop()


class _PyCudaBuffer:
    def __init__(self, memory: PyCudaMemory, allocation: Any, size_bytes: int):
        self._memory = memory
        self._allocation = allocation
        self.address = int(allocation)
        self.size_bytes = size_bytes

    def free(self) -> None:
        if self._allocation is not None:
            with self._memory._enter():
                self._allocation.free()
            self._allocation = None


class _PyCudaStream:
    can_capture = False

    def __init__(self, memory: PyCudaMemory, stream: Any):
        self._memory = memory
        self.native = stream
        self.handle = int(stream.handle)

    def wait(self) -> None:
        with self._memory._enter():
            self.native.synchronize()

    def begin_capture(self) -> None:
        raise DeviceMemoryError("PyCUDA captures no CUDA graphs; use cuda-python for them")

    def end_capture(self) -> DeviceGraph:
        raise DeviceMemoryError("PyCUDA captures no CUDA graphs; use cuda-python for them")


class _PyCudaEvent:
    def __init__(self, memory: PyCudaMemory, event: Any):
        self._memory = memory
        self._event = event

    def record(self, stream: DeviceStream) -> None:
        with self._memory._enter():
            self._event.record(_pycuda_stream(stream))

    def wait(self) -> None:
        with self._memory._enter():
            self._event.synchronize()


def _pycuda_stream(stream: DeviceStream) -> Any:
    if not isinstance(stream, _PyCudaStream):
        raise DeviceMemoryError("this stream was made by another binding; make it with the same device memory")
    return stream.native
