"""Keys and values in device memory: what engines write in place, and copies of entries that stay on the device.

All buffers lie in one allocation, so that the entries of all layers are moved by one copy.

Legend: layers, 2 = keys and values, rows = guidance rows, kv heads, capacity entries, hd head size.
Source: spec/world_model.md 6.1, 9.2.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from worldvln_edge.runtime.engines.device_memory import DeviceMemory, Strips
from worldvln_edge.runtime.engines.device_tensor import DeviceTensor
from worldvln_edge.runtime.worldvln.kv_cache import KVShape

_ZEROS_BYTES = 16 << 20
_ALIGNMENT_BYTES = 256
"""What TensorRT asks of every address."""


@dataclass(frozen=True, kw_only=True)
class DeviceCache:
    """One buffer as engines bind it: [rows, kv_heads, capacity, hd] at an address of the device."""

    address: int
    shape: tuple[int, int, int, int]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        return self.nbytes


class DeviceKVMemory:
    """See `KVMemory`. Engines are done with a call when they return, and so are `read` and `write`."""

    def __init__(self, memory: DeviceMemory, shape: KVShape):
        """
        Args:
            memory: of the device that all engines with caches run on.
            shape: of the bundle's caches.

        Raises:
            DeviceMemoryError: they do not fit on the device.
        """
        self.capacity, self.rows = shape.capacity, shape.rows
        self._memory, self._shape = memory, shape
        self._entry_bytes = shape.head_dim * shape.dtype.itemsize
        self._count, self._head_bytes = 2 * shape.layers, shape.capacity * self._entry_bytes
        # Heads of one buffer, with as many unused ones behind them as the alignment of the next buffer takes.
        even = _ALIGNMENT_BYTES // math.gcd(_ALIGNMENT_BYTES, self._head_bytes)
        self._plane_heads = -(-shape.rows * shape.kv_heads // even) * even
        with ExitStack() as undo:
            self._stream = memory.stream()
            undo.callback(self._stream.free)
            self._buffer = memory.allocate(self._count * self._plane_heads * self._head_bytes)
            undo.callback(self._buffer.free)
            self._fill_with_zeros()  # masked entries take part in attention with weight 0, and 0 * NaN is not 0
            undo.pop_all()
        self._buffers = {rows: self._buffers_of(rows) for rows in range(1, shape.rows + 1)}

    def buffers(self, rows: int) -> list[DeviceCache]:
        return self._buffers[rows]

    def read(self, start: int, entries: int, rows: int) -> DeviceTensor:
        shape = (self._count, rows, self._shape.kv_heads, entries, self._shape.head_dim)
        strip_bytes = entries * self._entry_bytes
        kept = self._memory.allocate(int(np.prod(shape)) * self._shape.dtype.itemsize)
        data = DeviceTensor(self._memory, kept, shape, self._shape.dtype)
        self._move(self._stored(data, strip_bytes), self._standing(start), rows, strip_bytes)
        return data

    def write(self, start: int, entries: int, rows: int, data: DeviceTensor) -> None:
        strip_bytes = entries * self._entry_bytes
        self._move(self._standing(start), self._stored(data, strip_bytes), rows, strip_bytes)

    def close(self) -> None:
        """Give the buffers back; nothing may run in them any more. Twice does no harm."""
        try:
            self._stream.free()
        finally:
            self._buffer.free()

    def _buffers_of(self, rows: int) -> list[DeviceCache]:
        shape = (rows, self._shape.kv_heads, self.capacity, self._shape.head_dim)
        base, step = self._buffer.address, self._plane_heads * self._head_bytes
        return [
            DeviceCache(address=base + index * step, shape=shape, dtype=self._shape.dtype)
            for index in range(self._count)
        ]

    def _standing(self, start: int) -> Strips:
        return Strips(
            span=self._buffer,
            offset_bytes=start * self._entry_bytes,
            row_bytes=self._head_bytes,
            plane_rows=self._plane_heads,
        )

    def _stored(self, data: DeviceTensor, strip_bytes: int) -> Strips:
        return Strips(span=data.span, row_bytes=strip_bytes, plane_rows=data.shape[1] * self._shape.kv_heads)

    def _move(self, target: Strips, source: Strips, rows: int, strip_bytes: int) -> None:
        """A plane is a buffer, a row is a kv head of a guidance row, a strip is its entries."""
        self._memory.copy_strips(
            target,
            source,
            planes=self._count,
            rows=rows * self._shape.kv_heads,
            width_bytes=strip_bytes,
            stream=self._stream,
        )
        self._stream.wait()

    def _fill_with_zeros(self) -> None:
        zeros = np.zeros(min(_ZEROS_BYTES, self._buffer.size_bytes), np.uint8)
        for offset in range(0, self._buffer.size_bytes, len(zeros)):
            part = zeros[: self._buffer.size_bytes - offset]
            self._memory.copy_in(self._buffer, part, self._stream, offset)
        self._stream.wait()
