"""What the machine can do at most, measured: one large matrix product and one large copy.

The product runs in ONNX Runtime, on the same provider and threads as the engines, so that an engine's rate divided by
it says how well the graph uses the machine. The graph is one MatMul, written here byte by byte, because a drone's
computer has no ONNX package. Dense products of this size reach what the library reaches at best.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import onnxruntime as ort

from worldvln_edge.runtime.engines.engine import EngineError

_OPSET, _IR_VERSION = 17, 8
_ONNX_TYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 10}
_LENGTH_DELIMITED = 2
_MIB = 1 << 20


class MachinePeak(msgspec.Struct, frozen=True, kw_only=True):
    """Best of several runs."""

    matmul_flops: float
    """FLOP per second of a square product, one multiply-add being two FLOP."""
    matmul_size: int
    matmul_dtype: str
    copy_bytes: float
    """Bytes per second of a copy in memory, read and written bytes both counted; 0: not measured."""


def measure_peak(
    *, threads: int = 0, size: int = 2048, copy_mib: int = 256, seconds: float = 1.0, device: str = "cpu"
) -> MachinePeak:
    """Measure the product in float32 (float16 on a GPU), and on the CPU the copy.

    Args:
        threads: CPU threads; 0: all cores.
        size: rows and columns of both factors.
        copy_mib: size of the array to copy; larger than the caches.
        seconds: to spend on each of both, at least three runs.
        device: cpu or cuda, as ONNX Runtime calls it.
    """
    dtype = np.dtype(np.float32 if device == "cpu" else np.float16)
    return MachinePeak(
        matmul_flops=2 * size**3 / _fastest(matmul_run(size, dtype, threads=threads, device=device), seconds),
        matmul_size=size,
        matmul_dtype=dtype.name,
        copy_bytes=_copy_rate(threads or os.cpu_count() or 1, copy_mib * _MIB, seconds) if device == "cpu" else 0.0,
    )


def matmul_run(size: int, dtype: np.dtype, *, threads: int, device: str) -> Callable[[], None]:
    """A function that multiplies two [size, size] matrices on the device and waits for the result.

    Raises:
        EngineError: ONNX Runtime does not start the device.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    provider = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    session = ort.InferenceSession(matmul_model(size, dtype), options, providers=[provider])
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on without a provider that does not start
        raise EngineError(f"ONNX Runtime took {session.get_providers()[0]} instead of {provider}; see its warnings")
    binding, draws = session.io_binding(), np.random.default_rng(0)
    # Values of a real product: zeros are multiplied faster on some devices, and denormal numbers slower.
    for name in ("a", "b"):
        factor = draws.standard_normal((size, size), np.float32).astype(dtype)
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(factor, device, 0))
    product = ort.OrtValue.ortvalue_from_shape_and_type((size, size), dtype.type, device, 0)
    binding.bind_ortvalue_output("y", product)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def matmul_model(size: int, dtype: np.dtype) -> bytes:
    """ONNX file of `y = a @ b`, [size, size] each.

    Field numbers are those of ONNX's protobuf definition (onnx.proto3).
    """
    node = _text(1, "a") + _text(1, "b") + _text(2, "y") + _text(4, "MatMul")
    dim = _message(1, _number(1, size))
    tensor = _number(1, _ONNX_TYPES[dtype]) + _message(2, dim + dim)

    def value(name: str) -> bytes:
        return _text(1, name) + _message(2, _message(1, tensor))

    graph = _message(1, node) + _text(2, "matmul")
    graph += _message(11, value("a")) + _message(11, value("b")) + _message(12, value("y"))
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, _number(2, _OPSET))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _copy_rate(threads: int, size_bytes: int, seconds: float) -> float:
    source = np.ones(size_bytes // 8, np.float64)
    target = np.zeros_like(source)  # written once before it is timed, so that its pages are there
    target[:] = 0
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return 2 * source.nbytes / _fastest(lambda: list(pool.map(lambda part: np.copyto(*part), parts)), seconds)


def _fastest(run: Callable[[], object], seconds: float) -> float:
    run()
    best, spent, runs = float("inf"), 0.0, 0
    while spent < seconds or runs < 3:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best
