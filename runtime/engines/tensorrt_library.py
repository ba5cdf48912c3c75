"""The package `tensorrt` or `tensorrt_rtx`: loaded on use, its dtypes, and what it says while it works.

Source: TensorRT Python API; both packages share it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from worldvln_edge.runtime.engines.engine import EngineError

PACKAGES = ("tensorrt", "tensorrt_rtx")
EXTRA_OF_PACKAGE = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_ERROR = 1
"""Severities: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose."""

_log = logging.getLogger(__name__)


def load_tensorrt(package: str) -> ModuleType:
    """Import `tensorrt` or `tensorrt_rtx`; their Python API is one.

    Raises:
        EngineError: not installed, or its libraries do not load.
    """
    if package not in PACKAGES:
        raise EngineError(f"unknown TensorRT package {package!r}; choose one of {', '.join(PACKAGES)}")
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{package} does not load here ({error}); install it with: "
            f"pip install 'worldvln-edge[{EXTRA_OF_PACKAGE[package]}]'"
            + (" (on a Jetson it comes with JetPack)" if package == "tensorrt" else "")
        ) from error


class LogSpan:
    """Messages of one piece of work, oldest first: (severity, text)."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, str]] = []

    def first_error(self) -> str:
        """What went wrong, in the package's words, on one line."""
        errors = [text for severity, text in self.messages if severity <= _ERROR]
        return " ".join(errors[0].split()) if errors else "it gave no reason"


class TensorRTLog:
    """What one package says. TensorRT keeps the first logger of a process, so all engines share it; whoever wants to
    know what was said about his own call opens a `capture` around it.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.logger: Any = None
        """What TensorRT's constructors take."""
        self._open: list[LogSpan] = []

    def add(self, severity: int, text: str) -> None:
        """Called by the package, in any of its threads."""
        _log.debug("%s: %s", self.package, text)
        for span in tuple(self._open):
            span.messages.append((severity, text))

    @contextmanager
    def capture(self) -> Iterator[LogSpan]:
        """What is said until the block ends. Nothing is kept outside of such blocks, so a long flight keeps nothing."""
        span = LogSpan()
        self._open.append(span)
        try:
            yield span
        finally:
            self._open.remove(span)


@functools.cache
def tensorrt_log(package: str) -> TensorRTLog:
    """The log that everything made with a package writes to."""
    trt, log = load_tensorrt(package), TensorRTLog(package)

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.INFO):
                log.add(int(severity), message)

    log.logger = Logger()
    return log


def tensor_dtype(trt: ModuleType, dtype: Any) -> np.dtype:
    """numpy's dtype of a tensor; bfloat16, which numpy has not, is the uint16 of its bits.

    Raises:
        EngineError: a type that no graph of a bundle has at its border.
    """
    kinds = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "BF16": np.uint16,
        "INT8": np.int8,
        "UINT8": np.uint8,
        "BOOL": np.bool_,
        "INT32": np.int32,
        "INT64": np.int64,
    }
    for name, kind in kinds.items():
        if dtype == getattr(trt.DataType, name, None):
            return np.dtype(kind)
    raise EngineError(f"a tensor of type {dtype} cannot be passed in or out; export the bundle again")
