"""Device memory that keeps what was given back, so that a flight stops asking the driver after its first segments.

Allocating and freeing make the driver wait for the whole device. Values between engines come and go with every call,
in the same few sizes, so their buffers are kept for the next value of that size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from contextlib import ExitStack

import numpy as np

from worldvln_edge.runtime.engines.device_memory import (
    DeviceBuffer,
    DeviceEvent,
    DeviceMemory,
    DeviceMemoryError,
    DeviceSpan,
    DeviceStream,
    Strips,
)

_GRAIN_BYTES = 512
"""Sizes are rounded up to this, so that nearly equal ones share their buffers."""


class PooledMemory:
    """A device's memory with a store of free buffers; otherwise as the memory that it is given.

    For any thread: engines allocate where a session computes, and the garbage collector frees where it likes.
    """

    def __init__(self, memory: DeviceMemory, *, most_free_bytes: int = 1 << 30):
        """
        Args:
            memory: of the device; closed together with this.
            most_free_bytes: to keep; beyond that the sizes that were not asked for the longest go back to the driver.
        """
        self._memory, self._most_free_bytes = memory, most_free_bytes
        self._free: OrderedDict[int, list[DeviceBuffer]] = OrderedDict()
        self._free_bytes = 0
        self._lent: dict[int, DeviceBuffer] = {}  # by address
        self._lock = threading.Lock()
        # Freeing takes no lock, because the collector may do it in the middle of `allocate`; appending is one step.
        self._returned: deque[tuple[int, DeviceBuffer]] = deque()
        self._is_closed = False

    @property
    def name(self) -> str:
        return self._memory.name

    @property
    def free_bytes(self) -> int:
        """With the free buffers that are kept here."""
        with self._lock:
            self._take_back()
            return self._memory.free_bytes + self._free_bytes

    @property
    def compute_capability(self) -> str:
        return self._memory.compute_capability

    def allocate(self, size_bytes: int) -> DeviceBuffer:
        """A buffer of at least this size. What it holds is undefined.

        Raises:
            DeviceMemoryError: the device has no room, even without the free buffers.
        """
        kept_bytes = max(1, -(-size_bytes // _GRAIN_BYTES)) * _GRAIN_BYTES
        with self._lock:
            self._take_back()
            if kept_bytes in self._free:
                self._free.move_to_end(kept_bytes)
                buffer = self._take_out(kept_bytes)
            else:
                buffer = self._allocate(kept_bytes)
            self._lent[buffer.address] = buffer
        return _PooledBuffer(self, buffer, kept_bytes, size_bytes)

    def _allocate(self, kept_bytes: int) -> DeviceBuffer:
        try:
            return self._memory.allocate(kept_bytes)
        except DeviceMemoryError:
            if not self._free_bytes:
                raise
        self._trim(0)
        return self._memory.allocate(kept_bytes)

    def copy_in(self, buffer: DeviceSpan, array: np.ndarray, stream: DeviceStream, offset_bytes: int = 0) -> None:
        self._memory.copy_in(buffer, array, stream, offset_bytes)

    def copy_out(self, array: np.ndarray, buffer: DeviceSpan, stream: DeviceStream, offset_bytes: int = 0) -> None:
        self._memory.copy_out(array, buffer, stream, offset_bytes)

    def copy_strips(
        self, target: Strips, source: Strips, *, planes: int, rows: int, width_bytes: int, stream: DeviceStream
    ) -> None:
        self._memory.copy_strips(target, source, planes=planes, rows=rows, width_bytes=width_bytes, stream=stream)

    def stream(self) -> DeviceStream:
        return self._memory.stream()

    def event(self) -> DeviceEvent:
        return self._memory.event()

    def close(self) -> None:
        """Give all buffers back, also those that somebody still holds, and close the memory. Twice does no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._lock, ExitStack() as frees:
            frees.callback(self._memory.close)
            self._take_back()
            for waiting in (*self._free.values(), list(self._lent.values())):
                for buffer in waiting:
                    frees.callback(buffer.free)
            self._free.clear()
            self._lent.clear()
            self._free_bytes = 0

    def give_back(self, kept_bytes: int, buffer: DeviceBuffer) -> None:
        """What a buffer's `free` does."""
        self._returned.append((kept_bytes, buffer))

    def _take_back(self) -> None:
        while self._returned:
            kept_bytes, buffer = self._returned.popleft()
            if self._lent.pop(buffer.address, None) is None:
                continue  # the pool was closed, which gave it back already
            self._free.setdefault(kept_bytes, []).append(buffer)
            self._free_bytes += kept_bytes
        self._trim(self._most_free_bytes)

    def _trim(self, most_bytes: int) -> None:
        while self._free_bytes > most_bytes:
            self._take_out(next(iter(self._free))).free()

    def _take_out(self, kept_bytes: int) -> DeviceBuffer:
        waiting = self._free[kept_bytes]
        buffer = waiting.pop()
        if not waiting:
            del self._free[kept_bytes]
        self._free_bytes -= kept_bytes
        return buffer


class _PooledBuffer:
    def __init__(self, pool: PooledMemory, buffer: DeviceBuffer, kept_bytes: int, size_bytes: int):
        self._pool, self._kept_bytes = pool, kept_bytes
        self._buffer: DeviceBuffer | None = buffer
        self.address, self.size_bytes = buffer.address, size_bytes

    def free(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._pool.give_back(self._kept_bytes, buffer)
