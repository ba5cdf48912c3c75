"""What a frozen network made of a row's frames, kept on disk under a name that follows from the content.

A file is `<first two letters>/<key>.safetensors`. The key covers the row (its file's resolved path, size and date, the
frame numbers, H and W: `FlightSource.key`) and the sha256 of the weights, so another video, another choice of frames or
other weights never meet a stale file. Files appear whole: several processes may write the same one. One that cannot be
read counts as absent, and is replaced.
Source: spec/training.md 1.4 (Product).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from worldvln_edge.atomic import atomic_file
from worldvln_edge.training.sim.shards import FlightDataError

_SUFFIX = ".safetensors"


class CacheSize(msgspec.Struct, frozen=True, kw_only=True):
    """What a cache takes on disk."""

    files: int
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.files} files, {self.total_bytes / 1e9:.2f} GB"


class LatentCache:
    """Tensors of rows, by content.

    Args:
        folder: made when the first file is written.
        weights_sha256: of the network whose output is kept.
        what: tells outputs of one network apart, e.g. `latents` or `features`.
    """

    def __init__(self, folder: Path, *, weights_sha256: str, what: str = "latents"):
        self.folder = Path(folder)
        self._identity = [weights_sha256, what]

    def path(self, key: str) -> Path:
        """File of a row, whether it is there or not.

        Args:
            key: `FlightSource.key(row)`.
        """
        name = hashlib.sha256(json.dumps([key, *self._identity]).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def holds(self, key: str) -> bool:
        """Whether there is a file; it may still turn out to be broken."""
        return self.path(key).is_file()

    def is_whole(self, key: str, tensor: str) -> bool:
        """Whether there is a file with that tensor and with all of the bytes that its header promises.

        Only the header is read: a cache of a large model is larger than the memory.
        """
        try:
            with safe_open(self.path(key), framework="pt") as file:
                return tensor in file.keys()  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            return False

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """Tensors of a row on the CPU, None where there are none or the file is broken."""
        try:
            return load_file(self.path(key))
        except (OSError, SafetensorError):
            return None

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors of a row; an older file is replaced.

        Raises:
            FlightDataError: the disk is full, or the folder cannot be written.
        """
        path = self.path(key)
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with atomic_file(path) as building:
                save_file(content, building)
        except (OSError, SafetensorError) as error:
            raise FlightDataError(
                f"{path}: cannot be written ({error}); make room, or put the cache elsewhere; nothing was left behind"
            ) from error

    def size(self) -> CacheSize:
        """Of the whole folder, whichever weights its files belong to."""
        sizes = [path.stat().st_size for path in self.folder.glob(f"??/*{_SUFFIX}") if not path.name.startswith(".")]
        return CacheSize(files=len(sizes), total_bytes=sum(sizes))
