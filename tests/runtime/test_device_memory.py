"""Device memory: what can be said without a device, and the calls that reach its driver."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import FakeMemory

from worldvln_edge.runtime.device_memory import CudaMemory, DeviceMemoryError, PyCudaMemory, check_span


def test_copies_may_not_leave_the_buffer() -> None:
    buffer = FakeMemory().allocate(8)
    check_span(buffer, np.zeros(4, np.uint8), 4)
    with pytest.raises(DeviceMemoryError, match="bytes 5 to 9 leaves the device buffer of 8 bytes"):
        check_span(buffer, np.zeros(4, np.uint8), 5)
    with pytest.raises(DeviceMemoryError, match="bytes -1 to 3"):
        check_span(buffer, np.zeros(4, np.uint8), -1)
    with pytest.raises(DeviceMemoryError, match="with gaps"):
        check_span(buffer, np.zeros(8, np.uint8)[::2], 0)


def has_gpu() -> bool:
    try:
        CudaMemory()
    except DeviceMemoryError:
        return False
    return True


def test_without_a_driver_the_error_says_so() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    if has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceMemoryError, match=r"no CUDA driver answers here.*run this on the device"):
        CudaMemory()


def test_missing_bindings_are_named_with_their_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DeviceMemoryError, match=r"cuda-python is not installed.*worldvln-edge\[tensorrt\]"):
        CudaMemory()
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(DeviceMemoryError, match=r"PyCUDA is not installed.*worldvln-edge\[pycuda\]"):
        PyCudaMemory()


def test_every_driver_call_that_is_made_exists_in_the_installed_binding() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    import inspect
    import re

    from worldvln_edge.runtime import device_memory

    names = set(re.findall(r'"(cu[A-Z]\w+)"', inspect.getsource(device_memory)))
    assert len(names) > 15
    assert [name for name in sorted(names) if not hasattr(driver, name)] == []
    for path in ("CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", "CUstream_flags.CU_STREAM_NON_BLOCKING"):
        kind, member = path.split(".")
        assert hasattr(getattr(driver, kind), member)


class FakeDriver:
    """The driver's calls on host memory; errors are codes, as in the binding."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=9
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            return (0, 5)

        return call

    def cuDeviceGetCount(self):
        return 0, 1

    def cuDeviceGetAttribute(self, attribute, device):
        return 0, attribute

    def cuMemAlloc(self, size):
        if size > 1000:
            return (SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"),)
        block = np.zeros(size, np.uint8)
        self.blocks[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cuMemFree(self, address):
        del self.blocks[int(address)]
        return (0,)

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        return self._move(target, source, size)

    cuMemcpyDtoHAsync = cuMemcpyHtoDAsync

    def _move(self, target, source, size):
        import ctypes

        ctypes.memmove(target, source, size)
        return (0,)


def test_bytes_travel_there_and_back_at_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    memory = CudaMemory()
    assert memory.compute_capability == "sm89"
    buffer, stream = memory.allocate(64), memory.stream()
    array, back = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    memory.copy_in(buffer, array, stream, 32)
    memory.copy_out(back, buffer, stream, 32)
    np.testing.assert_array_equal(back, array)
    event = memory.event()
    event.record(stream)
    event.wait()
    buffer.free()
    buffer.free()
    assert driver.blocks == {}
    assert {"cuEventRecord", "cuEventSynchronize", "cuDevicePrimaryCtxRetain"} <= set(driver.calls)


def test_full_memory_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver())
    with pytest.raises(DeviceMemoryError, match="cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY; free memory, or use"):
        CudaMemory().allocate(10_000)
    with pytest.raises(DeviceMemoryError, match="CUDA device 3 asked for, 1 found here"):
        CudaMemory(3)


@pytest.mark.gpu
def test_a_real_device_keeps_bytes() -> None:
    memory = CudaMemory()
    buffer, stream = memory.allocate(1 << 20), memory.stream()
    array, back = np.random.default_rng(0).random(1 << 17), np.zeros(1 << 17)
    memory.copy_in(buffer, array, stream)
    memory.copy_out(back, buffer, stream)
    stream.wait()
    np.testing.assert_array_equal(back, array)
    assert memory.compute_capability.startswith("sm")
