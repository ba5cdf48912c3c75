"""Keys and values on the device are what the host's memory would hold after the same calls."""

import gc

import numpy as np
import pytest
from fake_gpu import FakeMemory
from hypothesis import given, settings
from hypothesis import strategies as st

from worldvln_edge.runtime.engines.device_kv_memory import DeviceKVMemory
from worldvln_edge.runtime.engines.device_memory import DeviceMemoryError
from worldvln_edge.runtime.engines.device_pool import PooledMemory
from worldvln_edge.runtime.worldvln.kv_cache import HostKVMemory, KVShape

SHAPE = KVShape(layers=2, rows=2, kv_heads=3, capacity=7, head_dim=4, dtype=np.dtype(np.float16))


def on_device(device: FakeMemory, kv: DeviceKVMemory, rows: int) -> list[np.ndarray]:
    """What an engine sees; writes through."""
    return [device.view(cache.address, cache.dtype, cache.shape) for cache in kv.buffers(rows)]


_MOVES = st.tuples(st.integers(1, 2), st.integers(0, 4), st.integers(0, 4), st.integers(1, 3), st.integers(1, 99))


@settings(deadline=None, max_examples=60)
@given(moves=st.lists(_MOVES, min_size=1, max_size=12))
def test_reads_and_writes_are_those_of_the_host(moves: list[tuple[int, int, int, int, int]]) -> None:
    device, host = FakeMemory(), HostKVMemory(SHAPE)
    kv = DeviceKVMemory(PooledMemory(device), SHAPE)  # type: ignore[arg-type]
    for rows, start, other, entries, value in moves:
        for buffers in (host.buffers(rows), on_device(device, kv, rows)):
            for index, buffer in enumerate(buffers):  # what a graph does
                written = buffer[:, :, start : start + entries]
                written[:] = value + np.arange(written.size).reshape(written.shape) + 100 * index
        ours, theirs = kv.read(start, entries, rows), host.read(start, entries, rows)
        assert ours.nbytes == theirs.nbytes
        np.testing.assert_array_equal(ours.numpy(), theirs.reshape(ours.shape))
        kv.write(other, entries, rows, ours)
        host.write(other, entries, rows, theirs)
        for count in (1, 2):
            for ours_now, theirs_now in zip(on_device(device, kv, count), host.buffers(count), strict=True):
                np.testing.assert_array_equal(ours_now, theirs_now)


def test_buffers_start_as_zeros_at_addresses_that_tensorrt_takes() -> None:
    device = FakeMemory()  # whose new memory is NaN
    kv = DeviceKVMemory(device, SHAPE)
    assert len(kv.buffers(1)) == len(kv.buffers(2)) == 4
    for rows in (1, 2):
        for cache in kv.buffers(rows):
            assert cache.address % 256 == 0
            assert cache.shape == (rows, 3, 7, 4)
            assert cache.nbytes == cache.size_bytes == rows * 3 * 7 * 4 * 2
    assert not any(array.any() for array in on_device(device, kv, 2))
    assert [cache.address for cache in kv.buffers(1)] == [cache.address for cache in kv.buffers(2)]


def test_copies_stay_on_the_device_and_end_with_their_last_reference() -> None:
    device = FakeMemory()
    kv = DeviceKVMemory(device, SHAPE)
    device.bytes_in = device.bytes_out = device.waits = 0
    entries = kv.read(0, 3, 2)
    kv.write(2, 3, 2, entries)
    assert (device.bytes_in, device.bytes_out, device.bytes_inside) == (0, 0, 2 * entries.nbytes)
    assert device.waits == 2  # who calls next may count on the copy
    del entries
    gc.collect()
    assert device.alive["buffer"] == 1
    kv.close()
    kv.close()
    assert device.left_behind() == {}


def test_a_device_without_room_keeps_nothing() -> None:
    device = FakeMemory()
    device.most_buffers = 0
    with pytest.raises(DeviceMemoryError, match="OUT_OF_MEMORY"):
        DeviceKVMemory(device, SHAPE)
    assert device.left_behind() == {}
