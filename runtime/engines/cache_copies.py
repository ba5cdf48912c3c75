"""Which entries of a KV cache a call needs and writes, and their way between the host, a mirror and a second buffer.

Legend: B guidance rows, heads kv heads, M cache capacity, hd head size.
"""

from __future__ import annotations

import numpy as np

from worldvln_edge.runtime.engines.device_memory import DeviceMemory, DeviceSpan, DeviceStream, Strips
from worldvln_edge.runtime.engines.engine import to_host
from worldvln_edge.runtime.engines.engine_signature import Values

Span = tuple[int, int] | None
"""First entry that a call writes, and the one behind the last; None: not known, so the whole cache travels."""


def written_span(values: Values) -> Span:
    """Cache entries that a call writes, if its inputs say so."""
    if "write_index" not in values or "kv_length" not in values:
        return None
    return int(to_host(values["write_index"]).min()), int(to_host(values["kv_length"]).max())


def copy_entries_in(
    memory: DeviceMemory, mirror: DeviceSpan, cache_BHMD: np.ndarray, span: Span, stream: DeviceStream
) -> None:
    """What lies in front of the written entries, from a host cache into its mirror on the device."""
    for strip, offset_bytes in _strips(cache_BHMD, 0, span[0]) if span else [(cache_BHMD, 0)]:
        memory.copy_in(mirror, strip, stream, offset_bytes)


def copy_entries_out(
    memory: DeviceMemory, cache_BHMD: np.ndarray, mirror: DeviceSpan, span: Span, stream: DeviceStream
) -> None:
    """The written entries, from the device into the host's cache."""
    for strip, offset_bytes in _strips(cache_BHMD, *span) if span else [(cache_BHMD, 0)]:
        memory.copy_out(strip, mirror, stream, offset_bytes)


def copy_entries_over(
    memory: DeviceMemory,
    cache: DeviceSpan,
    written: DeviceSpan,
    shape_BHMD: tuple[int, ...],
    dtype: np.dtype,
    span: Span,
    stream: DeviceStream,
) -> None:
    """The written entries, from the buffer that a portable engine writes beside the cache into the cache."""
    start, end = span or (0, shape_BHMD[2])
    entry_bytes, strips = shape_BHMD[3] * dtype.itemsize, shape_BHMD[0] * shape_BHMD[1]
    target, source = (
        Strips(span=place, offset_bytes=start * entry_bytes, row_bytes=shape_BHMD[2] * entry_bytes, plane_rows=strips)
        for place in (cache, written)
    )
    memory.copy_strips(target, source, planes=1, rows=strips, width_bytes=(end - start) * entry_bytes, stream=stream)


def _strips(cache_BHMD: np.ndarray, start: int, end: int) -> list[tuple[np.ndarray, int]]:
    """Contiguous views of entries start..end, one a row and head, with their offset in bytes."""
    if start >= end:
        return []
    flat_NMD = cache_BHMD.reshape(-1, *cache_BHMD.shape[-2:])
    base, entry = flat_NMD[0].nbytes, flat_NMD[0, 0].nbytes
    return [(strip[start:end], n * base + start * entry) for n, strip in enumerate(flat_NMD)]
