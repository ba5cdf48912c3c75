"""Frames between a simulator process and its owner: memory that both map, without a name to clean up.

The file lives in memory only (memfd) and goes with the last process that holds it, however that ends. It serves one
answer at a time: the process writes, says so, and the owner copies before it asks again.
"""

from __future__ import annotations

import mmap
import os

import numpy as np


class FrameMemory:
    """One side of the memory.

    Args:
        fd: of a file that `make_frame_memory` gave; it is closed with this object.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self._map: mmap.mmap | None = None

    def write(self, frames: np.ndarray) -> None:
        """Put frames, uint8 of any shape, at the beginning; the file grows as needed and never shrinks."""
        if os.fstat(self.fd).st_size < frames.nbytes:
            os.ftruncate(self.fd, frames.nbytes)
        view = np.frombuffer(self._mapped(frames.nbytes), np.uint8, frames.nbytes)
        view[:] = frames.reshape(-1)

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of what was written: uint8."""
        count = int(np.prod(shape))
        return np.frombuffer(self._mapped(count), np.uint8, count).reshape(shape).copy()

    def close(self) -> None:
        """Give the memory back; call once."""
        self._map = None  # unmapped with its last view
        os.close(self.fd)

    def _mapped(self, count: int) -> mmap.mmap:
        if self._map is None or len(self._map) < count:
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        return self._map


def make_frame_memory() -> FrameMemory:
    """New memory; its `fd` may be inherited by a process that makes a `FrameMemory` of it."""
    return FrameMemory(os.memfd_create("simulator-frames"))
