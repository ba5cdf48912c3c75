"""Device memory: what can be said without a device, and the calls that reach its driver."""

import ctypes
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from fake_gpu import FakeMemory

from worldvln_edge.runtime.engines.cuda_memory import CudaMemory
from worldvln_edge.runtime.engines.device_memory import DeviceMemoryError, Strips, check_span
from worldvln_edge.runtime.engines.pycuda_memory import PyCudaMemory


def test_copies_may_not_leave_the_buffer() -> None:
    buffer = FakeMemory().allocate(8)
    check_span(buffer, np.zeros(4, np.uint8), 4)
    with pytest.raises(DeviceMemoryError, match="bytes 5 to 9 leaves the device buffer of 8 bytes"):
        check_span(buffer, np.zeros(4, np.uint8), 5)
    with pytest.raises(DeviceMemoryError, match="bytes -1 to 3"):
        check_span(buffer, np.zeros(4, np.uint8), -1)
    with pytest.raises(DeviceMemoryError, match="with gaps"):
        check_span(buffer, np.zeros(8, np.uint8)[::2], 0)


def test_strips_may_neither_overlap_nor_leave_the_buffer() -> None:
    buffer = FakeMemory().allocate(64)
    Strips(span=buffer, offset_bytes=8, row_bytes=8, plane_rows=3).check(planes=2, rows=3, width_bytes=8)
    with pytest.raises(DeviceMemoryError, match="strips in bytes 8 to 66 leave the device buffer of 64 bytes"):
        Strips(span=buffer, offset_bytes=8, row_bytes=8, plane_rows=4).check(planes=2, rows=4, width_bytes=2)
    with pytest.raises(DeviceMemoryError, match="strips in bytes -8 to"):
        Strips(span=buffer, offset_bytes=-8, row_bytes=8, plane_rows=1).check(planes=1, rows=1, width_bytes=8)
    with pytest.raises(DeviceMemoryError, match="strips of 9 bytes from byte 0 on, 1 a plane, do not fit"):
        Strips(span=buffer, row_bytes=8, plane_rows=1).check(planes=1, rows=1, width_bytes=9)
    with pytest.raises(DeviceMemoryError, match=r"strips of 8 bytes from byte 0 on, 3 a plane, .* 2 a plane"):
        Strips(span=buffer, row_bytes=8, plane_rows=2).check(planes=1, rows=3, width_bytes=8)


def has_gpu() -> bool:
    try:
        CudaMemory().close()
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

    from worldvln_edge.runtime.engines import cuda_memory

    names = set(re.findall(r'"(cu[A-Z]\w+)"', inspect.getsource(cuda_memory)))
    assert len(names) > 20
    assert [name for name in sorted(names) if not hasattr(driver, name)] == []
    copy = driver.CUDA_MEMCPY3D()
    fields = set(re.findall(r"copy\.(\w+)", inspect.getsource(cuda_memory)))
    assert len(fields) == 11
    assert sorted(fields - set(dir(copy))) == []
    assert hasattr(driver.CUmemorytype, "CU_MEMORYTYPE_DEVICE")
    assert int(driver.CUdeviceptr(1 << 40)) == 1 << 40
    for path in ("CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", "CUstream_flags.CU_STREAM_NON_BLOCKING"):
        kind, member = path.split(".")
        assert hasattr(getattr(driver, kind), member)


def move_box(target: tuple[int, int, int], source: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    """What a driver does with (address, pitch, height) on both sides and (depth, height, width) of the copy."""
    for plane in range(size[0]):
        for row in range(size[1]):
            to, origin = (base + (plane * height + row) * pitch for base, pitch, height in (target, source))
            ctypes.memmove(to, origin, size[2])


def check_strips_of(memory) -> None:
    """Two heads of two planes, entries 1 and 2 of 4, into a dense buffer and back to other entries."""
    stream = memory.stream()
    cache, dense = memory.allocate(2 * 3 * 4 * 8), memory.allocate(2 * 2 * 2 * 8)
    values = np.arange(2 * 3 * 4, dtype=np.float64).reshape(2, 3, 4)
    memory.copy_in(cache, values, stream)

    def standing(entry: int) -> Strips:
        return Strips(span=cache, offset_bytes=entry * 8, row_bytes=4 * 8, plane_rows=3)

    packed = Strips(span=dense, row_bytes=2 * 8, plane_rows=2)
    size = {"planes": 2, "rows": 2, "width_bytes": 16, "stream": stream}
    memory.copy_strips(packed, standing(1), **size)
    memory.copy_strips(standing(2), packed, **size)
    back, kept = np.zeros_like(values), np.zeros((2, 2, 2))
    memory.copy_out(back, cache, stream)
    memory.copy_out(kept, dense, stream)
    stream.wait()
    np.testing.assert_array_equal(kept, values[:, :2, 1:3])
    expected = values.copy()
    expected[:, :2, 2:4] = values[:, :2, 1:3]
    np.testing.assert_array_equal(back, expected)
    with pytest.raises(DeviceMemoryError, match="strips of 16 bytes from byte 24 on, 2 a plane, do not fit"):
        memory.copy_strips(standing(3), packed, **size)
    for thing in (cache, dense, stream):
        thing.free()


class FakeDriver:
    """The driver's calls on host memory; errors are codes, as in the binding. Counts what lives."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=9
    )
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUDA_MEMCPY3D = SimpleNamespace
    CUdeviceptr = int
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    ENDS: ClassVar = {
        "cuStreamDestroy": "cuStreamCreate",
        "cuEventDestroy": "cuEventCreate",
        "cuGraphDestroy": "cuStreamEndCapture",
        "cuGraphExecDestroy": "cuGraphInstantiate",
        "cuDevicePrimaryCtxRelease": "cuDevicePrimaryCtxRetain",
    }

    def __init__(self, *failing: str) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.calls: list[str] = []
        self.alive: Counter[str] = Counter()
        self.failing = set(failing)

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            if name in self.failing:
                return (SimpleNamespace(name="CUDA_ERROR_UNKNOWN"),)
            if name in self.ENDS.values():
                self.alive[name] += 1
            if name in self.ENDS:
                self.alive[self.ENDS[name]] -= 1
            return (0, 5)

        return call

    def left_behind(self) -> dict[str, int]:
        return {name: count for name, count in self.alive.items() if count}

    def cuDeviceGetCount(self):
        return 0, 1

    def cuDeviceGetAttribute(self, attribute, device):
        return 0, attribute

    def cuMemGetInfo(self):
        return 0, 700, 1000

    def cuDeviceGetName(self, length, device):
        return 0, b"NVIDIA Test".ljust(length, b"\0")

    def cuMemcpy3DAsync(self, copy, stream):
        move_box(
            (copy.dstDevice, copy.dstPitch, copy.dstHeight),
            (copy.srcDevice, copy.srcPitch, copy.srcHeight),
            (copy.Depth, copy.Height, copy.WidthInBytes),
        )
        return (0,)

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
        ctypes.memmove(target, source, size)
        return (0,)

    cuMemcpyDtoHAsync = cuMemcpyHtoDAsync


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
    for thing in (buffer, event, stream) * 2:
        thing.free()
    memory.close()
    memory.close()
    assert driver.blocks == driver.left_behind() == {}
    assert {"cuEventRecord", "cuEventSynchronize", "cuDevicePrimaryCtxRetain"} <= set(driver.calls)


def test_strips_travel_inside_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    memory = CudaMemory()
    assert memory.name == "NVIDIA Test"
    assert memory.free_bytes == 700
    check_strips_of(memory)
    memory.close()
    assert driver.blocks == driver.left_behind() == {}
    check_strips_of(FakeMemory())  # the fake that other tests trust does the same


def test_full_memory_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver())
    with pytest.raises(DeviceMemoryError, match="cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY; free memory, or use"):
        CudaMemory().allocate(10_000)
    with pytest.raises(DeviceMemoryError, match="CUDA device 3 asked for, 1 found here"):
        CudaMemory(3)


def test_a_captured_graph_is_freed_and_its_description_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    memory = CudaMemory()
    stream = memory.stream()
    stream.begin_capture()
    graph = stream.end_capture()
    assert driver.left_behind() == {"cuDevicePrimaryCtxRetain": 1, "cuStreamCreate": 1, "cuGraphInstantiate": 1}
    graph.launch(stream)
    graph.free()
    graph.free()
    with pytest.raises(DeviceMemoryError, match="cuGraphLaunch on something that was freed"):
        graph.launch(stream)
    stream.free()
    memory.close()
    assert driver.left_behind() == {}
    with pytest.raises(DeviceMemoryError, match="this device memory was closed"):
        memory.stream()


def test_what_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver("cuCtxSetCurrent")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    with pytest.raises(DeviceMemoryError, match="cuCtxSetCurrent failed with CUDA_ERROR_UNKNOWN"):
        CudaMemory()
    assert driver.left_behind() == {}
    driver.failing = {"cuGraphInstantiate"}
    stream = CudaMemory().stream()
    stream.begin_capture()
    with pytest.raises(DeviceMemoryError, match="cuGraphInstantiate failed"):
        stream.end_capture()
    assert driver.alive["cuStreamEndCapture"] == 0


class PyCudaThing:
    handle = 7

    def synchronize(self) -> None:
        pass

    def record(self, stream: "PyCudaThing") -> None:
        pass


class PyCudaAllocation:
    def __init__(self, driver: "FakePyCuda", size: int):
        block = np.zeros(size, np.uint8)
        self.driver, self.address = driver, block.ctypes.data
        driver.blocks[self.address] = block

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        del self.driver.blocks[self.address]


class FakePyCuda:
    """What of `pycuda.driver` is used; things end with their last reference, inside a pushed context only."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        self.alive: Counter[str] = Counter()
        self.blocks: dict[int, np.ndarray] = {}
        self.pushed = 0

    def init(self) -> None:
        pass

    def Device(self, index: int):
        return SimpleNamespace(
            retain_primary_context=lambda: self, compute_capability=lambda: (8, 7), name=lambda: "NVIDIA Test"
        )

    def mem_get_info(self) -> tuple[int, int]:
        assert self.pushed  # it asks the current context
        return 700, 1000

    def push(self) -> None:
        self.pushed += 1

    def pop(self) -> None:
        self.pushed -= 1

    def detach(self) -> None:
        self.alive["context"] -= 1

    def thing(self, kind: str) -> PyCudaThing:
        assert self.pushed
        self.alive[kind] += 1
        native = PyCudaThing()
        weakref.finalize(native, self.end, kind)
        return native

    def end(self, kind: str) -> None:
        if self.pushed:  # outside of its context it would not be given back
            self.alive[kind] -= 1

    def Stream(self):
        return self.thing("stream")

    def Event(self):
        return self.thing("event")

    def mem_alloc(self, size: int) -> "PyCudaAllocation":
        return PyCudaAllocation(self, size)

    def memcpy_htod_async(self, target: int, array: np.ndarray, stream: PyCudaThing) -> None:
        ctypes.memmove(target, array.ctypes.data, array.nbytes)

    def memcpy_dtoh_async(self, array: np.ndarray, source: int, stream: PyCudaThing) -> None:
        ctypes.memmove(array.ctypes.data, source, array.nbytes)

    class Memcpy3D:
        def set_src_device(self, address: int) -> None:
            self.source = address

        def set_dst_device(self, address: int) -> None:
            self.target = address

        def __call__(self, stream: PyCudaThing) -> None:
            move_box(
                (self.target, self.dst_pitch, self.dst_height),
                (self.source, self.src_pitch, self.src_height),
                (self.depth, self.height, self.width_in_bytes),
            )


def test_pycuda_frees_inside_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakePyCuda()
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    memory = PyCudaMemory()
    assert memory.compute_capability == "sm87"
    stream, event = memory.stream(), memory.event()
    event.record(stream)
    event.wait()
    for thing in (event, stream) * 2:
        thing.free()
    assert driver.alive == {"stream": 0, "event": 0}
    with pytest.raises(DeviceMemoryError, match="this was freed"):
        stream.wait()
    memory.close()
    memory.close()
    assert driver.alive["context"] == -1
    with pytest.raises(DeviceMemoryError, match="this device memory was closed"):
        memory.event()


def test_pycuda_moves_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakePyCuda()
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    memory = PyCudaMemory()
    assert memory.name == "NVIDIA Test"
    assert memory.free_bytes == 700
    check_strips_of(memory)
    assert driver.blocks == {}


@pytest.fixture
def cuda() -> Iterator[CudaMemory]:
    try:
        memory = CudaMemory()
    except DeviceMemoryError as error:
        pytest.skip(str(error))
    yield memory
    memory.close()


@pytest.mark.gpu
def test_a_real_device_keeps_bytes(cuda: CudaMemory) -> None:
    memory = cuda
    buffer, stream = memory.allocate(1 << 20), memory.stream()
    array, back = np.random.default_rng(0).random(1 << 17), np.zeros(1 << 17)
    memory.copy_in(buffer, array, stream)
    memory.copy_out(back, buffer, stream)
    stream.wait()
    np.testing.assert_array_equal(back, array)
    assert memory.compute_capability.startswith("sm")
    for thing in (buffer, stream):
        thing.free()


@pytest.mark.gpu
def test_a_real_device_moves_strips(cuda: CudaMemory) -> None:
    assert cuda.name
    assert 0 < cuda.free_bytes < 1 << 50
    check_strips_of(cuda)
