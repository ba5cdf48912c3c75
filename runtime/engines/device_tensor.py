"""An output that stayed on the device: other engines of the same device read it there, anybody else can fetch it.

Its buffer is given back when nobody refers to the tensor any more.
"""

from __future__ import annotations

import weakref

import numpy as np

from worldvln_edge.runtime.engines.device_memory import DeviceBuffer, DeviceMemory


class DeviceTensor:
    """A dense array in device memory. Never changed once it is made."""

    def __init__(self, memory: DeviceMemory, buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype):
        """
        Args:
            memory: that the buffer belongs to.
            buffer: at least as large as the array; the tensor frees it.
            shape, dtype: of the array; bfloat16 is the uint16 of its bits.
        """
        self.memory, self.shape, self.dtype = memory, shape, dtype
        self.span = buffer
        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        # When the interpreter ends, the driver frees everything; the memory may be closed by then.
        weakref.finalize(self, buffer.free).atexit = False

    def numpy(self) -> np.ndarray:
        """A copy on the host.

        Raises:
            DeviceMemoryError: the device refuses.
        """
        array = np.empty(self.shape, self.dtype)
        stream = self.memory.stream()
        try:
            self.memory.copy_out(array, self.span, stream)
        finally:
            stream.wait()
            stream.free()
        return array
