"""A GPU made of host memory: the edge of the machine, for tests of what lies in front of it.

It counts what is alive, so a test can say that nothing was left behind.
"""

from collections import Counter

import numpy as np

from worldvln_edge.runtime.engines.device_memory import DeviceMemoryError, DeviceSpan, Strips, check_span

_ALIGNMENT = 256


class _Thing:
    """Something of the device that counts as alive until it is freed."""

    kind = ""

    def __init__(self, memory: "FakeMemory"):
        self.memory, self.is_freed = memory, False
        memory.alive[self.kind] += 1

    def free(self) -> None:
        if not self.is_freed:
            self.is_freed = True
            self.memory.alive[self.kind] -= 1
            self.on_free()

    def on_free(self) -> None:
        pass


class FakeBuffer(_Thing):
    kind = "buffer"

    def __init__(self, memory: "FakeMemory", address: int, size_bytes: int):
        super().__init__(memory)
        self.address, self.size_bytes = address, size_bytes

    def on_free(self) -> None:
        del self.memory.spaces[self.address]


class FakeEvent(_Thing):
    kind = "event"

    def record(self, stream: "FakeStream") -> None:
        pass

    def wait(self) -> None:
        pass


class FakeGraph(_Thing):
    kind = "graph"

    def __init__(self, memory: "FakeMemory", work: list):
        super().__init__(memory)
        self.work = work

    def launch(self, stream: "FakeStream") -> None:
        assert not self.is_freed
        self.memory.launches += 1
        for step in self.work:
            step()

    def on_free(self) -> None:
        self.work.clear()


class FakeStream(_Thing):
    kind = "stream"
    handle = 77

    def __init__(self, memory: "FakeMemory", can_capture: bool):
        super().__init__(memory)
        self.can_capture = can_capture

    def wait(self) -> None:
        assert not self.is_freed
        self.memory.refuse_while_capturing("cuStreamSynchronize")
        self.memory.waits += 1

    def begin_capture(self) -> None:
        self.memory.tried_captures += 1
        if self.memory.refuses_captures == "begin":
            raise DeviceMemoryError("CUDA call cuStreamBeginCapture failed with CUDA_ERROR_ILLEGAL_STATE")
        self.memory.captured = []

    def end_capture(self) -> FakeGraph:
        work, self.memory.captured = self.memory.captured, None
        if self.memory.refuses_captures == "end":
            raise DeviceMemoryError("CUDA call cuStreamEndCapture failed with CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        self.memory.captures += 1
        assert work is not None
        return FakeGraph(self.memory, work)


class FakeMemory:
    """Device memory whose addresses are those of host arrays; counts what is done and what is alive.

    ONNX Runtime's CPU provider can therefore stand in for the one of the device. `refuses_captures` is "", "begin" or
    "end": where a capture fails. `most_buffers` bounds the allocations.
    """

    name = "Fake GPU"
    free_bytes = 8 << 30

    def __init__(self, compute_capability: str = "sm89", can_capture: bool = True):
        self.compute_capability, self.can_capture = compute_capability, can_capture
        self.spaces: dict[int, np.ndarray] = {}
        self.alive: Counter[str] = Counter()
        self.bytes_in = self.bytes_out = self.bytes_inside = self.waits = self.captures = self.tried_captures = (
            self.launches
        ) = 0
        self.captured: list | None = None
        self.refuses_captures = ""
        self.most_buffers = 1 << 30
        self.is_closed = False

    def left_behind(self) -> dict[str, int]:
        """Kinds of things that are still alive."""
        return {kind: count for kind, count in self.alive.items() if count}

    def refuse_while_capturing(self, call: str) -> None:
        if self.captured is not None:
            raise DeviceMemoryError(f"CUDA call {call} failed with CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def allocate(self, size_bytes: int) -> FakeBuffer:
        if self.alive["buffer"] >= self.most_buffers:
            raise DeviceMemoryError("CUDA call cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY; free memory")
        block = np.zeros(size_bytes + _ALIGNMENT, np.uint8)
        start = -block.ctypes.data % _ALIGNMENT
        space = block[start : start + size_bytes]
        space[:] = 0xFF  # NaN: nobody may count on what lies in new memory
        address = block.ctypes.data + start
        self.spaces[address] = space
        return FakeBuffer(self, address, size_bytes)

    def copy_in(self, buffer, array, stream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        self.refuse_while_capturing("cuMemcpyHtoDAsync")
        self.bytes_at(buffer)[offset_bytes : offset_bytes + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.bytes_in += array.nbytes

    def copy_out(self, array, buffer, stream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        array.reshape(-1).view(np.uint8)[:] = self.bytes_at(buffer)[offset_bytes : offset_bytes + array.nbytes]
        self.bytes_out += array.nbytes

    def copy_strips(
        self, target: Strips, source: Strips, *, planes: int, rows: int, width_bytes: int, stream: FakeStream
    ) -> None:
        for strips in (target, source):
            strips.check(planes, rows, width_bytes)
        self.refuse_while_capturing("cuMemcpy3DAsync")
        for plane in range(planes):
            for row in range(rows):
                self._strip(target, plane, row, width_bytes)[:] = self._strip(source, plane, row, width_bytes)
        self.bytes_inside += planes * rows * width_bytes

    def _strip(self, strips: Strips, plane: int, row: int, width_bytes: int) -> np.ndarray:
        start = strips.offset_bytes + (plane * strips.plane_rows + row) * strips.row_bytes
        return self.bytes_at(strips.span)[start : start + width_bytes]

    def bytes_at(self, span: DeviceSpan) -> np.ndarray:
        """All bytes of a span. KeyError for memory that was given back."""
        return self.view(span.address, np.uint8, (span.size_bytes,))

    def stream(self) -> FakeStream:
        return FakeStream(self, self.can_capture)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def close(self) -> None:
        self.is_closed = True

    def view(self, address: int, dtype, shape: tuple[int, ...]) -> np.ndarray:
        """What lies at an address; writes through. KeyError for memory that was given back."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for base, space in self.spaces.items():
            if base <= address and address + count <= base + space.size:
                return space[address - base : address - base + count].view(dtype).reshape(shape)
        raise KeyError(f"{count} bytes at {address} are nobody's")
