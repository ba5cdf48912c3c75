"""A GPU and a TensorRT package made of host memory: the edge of the machine, for tests of what lies in front of it.

The engine here has one graph: `doubled = 2 * x`, and a cache into which `x` is written at `write_index`.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from worldvln_edge.runtime.device_memory import check_span

BATCH, HEADS, CAPACITY, SIZE = 1, 2, 8, 3
CACHE = (BATCH, HEADS, CAPACITY, SIZE)


class FakeBuffer:
    def __init__(self, memory: "FakeMemory", address: int, size_bytes: int):
        self.memory, self.address, self.size_bytes = memory, address, size_bytes

    def free(self) -> None:
        self.memory.spaces.pop(self.address, None)


class FakeStream:
    handle = 77

    def __init__(self, memory: "FakeMemory", can_capture: bool):
        self.memory, self.can_capture = memory, can_capture

    def wait(self) -> None:
        self.memory.waits += 1

    def begin_capture(self) -> None:
        self.memory.captured = []

    def end_capture(self) -> "FakeGraph":
        work, self.memory.captured = self.memory.captured, None
        self.memory.captures += 1
        return FakeGraph(self.memory, work)


class FakeGraph:
    def __init__(self, memory: "FakeMemory", work: list):
        self.memory, self.work = memory, work

    def launch(self, stream: FakeStream) -> None:
        self.memory.launches += 1
        for step in self.work:
            step()


class FakeMemory:
    """Device memory whose addresses are keys of host arrays; counts what is done."""

    def __init__(self, compute_capability: str = "sm89", can_capture: bool = True):
        self.compute_capability, self.can_capture = compute_capability, can_capture
        self.spaces: dict[int, np.ndarray] = {}
        self.next_address = 1 << 20
        self.bytes_in = self.bytes_out = self.waits = self.captures = self.launches = 0
        self.captured: list | None = None

    def allocate(self, size_bytes: int) -> FakeBuffer:
        address, self.next_address = self.next_address, self.next_address + size_bytes + 256
        self.spaces[address] = np.zeros(size_bytes, np.uint8)
        return FakeBuffer(self, address, size_bytes)

    def copy_in(self, buffer, array, stream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        self.spaces[buffer.address][offset_bytes : offset_bytes + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.bytes_in += array.nbytes

    def copy_out(self, array, buffer, stream, offset_bytes: int = 0) -> None:
        check_span(buffer, array, offset_bytes)
        array.reshape(-1).view(np.uint8)[:] = self.spaces[buffer.address][offset_bytes : offset_bytes + array.nbytes]
        self.bytes_out += array.nbytes

    def stream(self) -> FakeStream:
        return FakeStream(self, self.can_capture)

    def event(self):
        raise NotImplementedError("engines need no event")

    def view(self, address: int, dtype, shape: tuple[int, ...]) -> np.ndarray:
        """What lies at an address; writes through. KeyError for memory that was given back."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.spaces[address][:count].view(dtype).reshape(shape)


@dataclass
class FakeEngine:
    memory: FakeMemory
    is_portable: bool = False
    profiles: tuple = (((2, 3),) * 3, ((1, 3), (4, 3), (5, 3)))
    contexts: list = field(default_factory=list)

    names = ("x", "write_index", "kv_length", "past_key_0", "doubled", "present_key_0")
    num_io_tensors = len(names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name in ("doubled", "present_key_0") else "in"

    def get_tensor_dtype(self, name: str) -> str:
        return "INT64" if name in ("write_index", "kv_length") else "FLOAT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        fixed = {"write_index": (1,), "kv_length": (1,), "past_key_0": CACHE, "present_key_0": CACHE}
        return fixed.get(name, (-1, 3))

    def get_tensor_profile_shape(self, name: str, profile: int):
        return self.profiles[profile] if name == "x" else (self.get_tensor_shape(name),) * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return "past_key_0" if name == "present_key_0" and not self.is_portable else None

    def create_execution_context(self, strategy: str) -> "FakeContext":
        assert strategy == "user managed"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    def __init__(self, engine: FakeEngine):
        self.engine, self.memory = engine, engine.memory
        self.addresses: dict[str, int] = {}
        self.shape, self.profile, self.scratch = None, 0, 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def update_device_memory_size_for_shapes(self) -> int:
        return 100 * self.shape[0]

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        assert self.memory.spaces[address].size == size_bytes
        self.scratch = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.memory.captured is not None:
            self.memory.captured.append(self._compute)
        else:
            self._compute()
        return True

    def _compute(self) -> None:
        view, at = self.memory.view, self.addresses
        view(self.scratch, np.uint8, (1,))
        x = view(at["x"], np.float32, self.shape)
        view(at["doubled"], np.float32, self.shape)[:] = 2 * x
        past, present = (view(at[f"{kind}_key_0"], np.float32, CACHE) for kind in ("past", "present"))
        start = int(view(at["write_index"], np.int64, (1,))[0])
        present[:] = past
        present[:, :, start : start + len(x)] = x


def fake_tensorrt(engine: FakeEngine | None, messages: tuple = ()) -> SimpleNamespace:
    """Stands for the package; `engine` None refuses to load."""

    class Logger:
        INFO = 3

    class Runtime:
        def __init__(self, logger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
            for severity, text in messages:
                self.logger.log(severity, text)
            return engine

    return SimpleNamespace(
        __version__="1.0",
        ILogger=Logger,
        Runtime=Runtime,
        DataType=SimpleNamespace(FLOAT="FLOAT", INT64="INT64"),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    )
