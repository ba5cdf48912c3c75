"""Hidden states of many sequences between two blocks: in memory while they are few, else in a temporary file.

The file is read and written, not mapped: pages of a mapping count as the process's own memory.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from worldvln_edge.export.calibration import CalibrationError

_MEMORY_BYTES = 1 << 30  # up to this size all of it stays in memory
_SPARE_BYTES = 1 << 30


class HiddenStates:
    """float32 tensors of given shapes by index, on the CPU. A context manager: the file is gone afterwards.

    Args:
        shapes: of all tensors.
        folder: takes the file, if one is needed.

    Raises:
        CalibrationError: not enough room in `folder`.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], folder: Path):
        self._shapes = list(shapes)
        self._offsets = [0]
        for shape in self._shapes:
            self._offsets.append(self._offsets[-1] + 4 * math.prod(shape))
        self.size_bytes = self._offsets.pop()
        self._held: dict[int, Tensor] = {}
        self._file: BinaryIO | None = None
        if self.size_bytes > _MEMORY_BYTES:
            free = shutil.disk_usage(folder).free
            if free < self.size_bytes + _SPARE_BYTES:
                raise CalibrationError(
                    f"{folder} has {free / 1e9:.1f} GB free, the hidden states of the flights need "
                    f"{self.size_bytes / 1e9:.1f} GB; measure on fewer flights, or give another folder for them"
                )
            handle, name = tempfile.mkstemp(dir=folder, prefix="worldvln-hidden-")
            os.unlink(name)  # a killed run leaves nothing: the file lives as long as it is open
            self._file = os.fdopen(handle, "w+b")

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        shape = self._shapes[index]
        if tuple(hidden.shape) != shape:
            raise ValueError(f"hidden state {index} has shape {list(hidden.shape)}, planned is {list(shape)}")
        hidden = hidden.detach().to("cpu", torch.float32).contiguous()
        if self._file is None:
            self._held[index] = hidden
        else:
            self._file.seek(self._offsets[index])
            self._file.write(hidden.numpy().tobytes())

    def __getitem__(self, index: int) -> Tensor:
        if self._file is None:
            return self._held[index]
        shape = self._shapes[index]
        content = bytearray(4 * math.prod(shape))
        self._file.seek(self._offsets[index])
        found = self._file.readinto(content)  # type: ignore[attr-defined]
        if found != len(content):
            raise CalibrationError(
                f"the file of hidden states ends early ({found} of {len(content)} bytes); start again"
            )
        return torch.frombuffer(content, dtype=torch.float32).reshape(shape)
