"""Pooled device memory: what was given back is used again, within a bound, and nothing outlives its closing."""

import gc

import numpy as np
import pytest
from fake_gpu import FakeMemory

from worldvln_edge.runtime.engines.device_memory import DeviceMemoryError
from worldvln_edge.runtime.engines.device_pool import PooledMemory
from worldvln_edge.runtime.engines.device_tensor import DeviceTensor


def test_a_freed_buffer_is_the_next_one_of_its_size() -> None:
    device = FakeMemory()
    pool = PooledMemory(device)
    first = pool.allocate(1000)
    address = first.address
    first.free()
    first.free()
    again, other = pool.allocate(1010), pool.allocate(1010)
    assert again.address == address != other.address
    assert (again.size_bytes, device.alive["buffer"]) == (1010, 2)
    assert pool.allocate(5000).address not in (again.address, other.address)


def test_free_buffers_are_bounded_and_the_longest_unused_size_goes_first() -> None:
    device = FakeMemory()
    pool = PooledMemory(device, most_free_bytes=4096)
    for size in (1024, 2048, 1024, 1536):  # 1024 was asked for after 2048
        pool.allocate(size).free()
    pool.allocate(1).free()
    assert sorted(space.size for space in device.spaces.values()) == [512, 1024, 1536]
    buffers = [pool.allocate(1024) for _ in range(8)]
    for buffer in buffers:
        buffer.free()
    pool.allocate(512)
    assert sum(space.size for space in device.spaces.values()) <= 4096 + 512


def test_a_full_device_is_asked_again_without_the_free_buffers() -> None:
    device = FakeMemory()
    pool = PooledMemory(device)
    device.most_buffers = 2
    held = pool.allocate(512)
    pool.allocate(1024).free()
    assert pool.allocate(2048).size_bytes == 2048
    with pytest.raises(DeviceMemoryError, match="OUT_OF_MEMORY"):
        pool.allocate(4096)
    held.free()
    assert pool.allocate(4096).size_bytes == 4096


def test_closing_gives_back_what_is_free_and_what_is_held() -> None:
    device = FakeMemory()
    pool = PooledMemory(device)
    held = pool.allocate(100)
    pool.allocate(200).free()
    pool.close()
    pool.close()
    assert device.left_behind() == {}
    assert device.is_closed
    held.free()
    pool.allocate(100)  # what was freed late is not taken for free
    assert device.alive["buffer"] == 1


def test_a_tensor_gives_its_buffer_back_with_its_last_reference() -> None:
    device = FakeMemory()
    tensor = DeviceTensor(device, device.allocate(24), (2, 3), np.dtype(np.float32))
    values, stream = np.arange(6, dtype=np.float32).reshape(2, 3), device.stream()
    device.copy_in(tensor.span, values, stream)
    stream.free()
    np.testing.assert_array_equal(tensor.numpy(), values)
    assert device.left_behind() == {"buffer": 1}
    del tensor
    gc.collect()
    assert device.left_behind() == {}


def test_the_pool_is_the_device_otherwise() -> None:
    device = FakeMemory("sm87")
    pool = PooledMemory(device)
    assert (pool.name, pool.compute_capability) == ("Fake GPU", "sm87")
    assert pool.stream().handle == device.stream().handle
    pool.event().free()
    assert device.alive["event"] == 0
