"""Flights of the simulator's shards, read row by row.

Legend: F frames of a flight, H W pixels. Source: spec/training.md 1, 4.1; training/sim/shards.py has the format.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldvln_edge.poses import actions_to_deltas
from worldvln_edge.training.data.frame_pictures import content_key, fit_frames
from worldvln_edge.training.data.frame_selection import is_clip_length
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.sim.shards import FlightDataError, list_shards, read_shard

_ARRAYS = ("frames", "actions", "instructions")
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip entry: everything in front of the lengths of its name and of its extra field."""


class SimulatorFlights:
    """All flights of a folder of shards (a FlightSource). Frames stay on disk and are read row by row.

    Args:
        folder: what `worldvln-edge sim flights` wrote.
        image_hw: size of the frames; None leaves them as they are.

    Raises:
        FlightDataError: no shards, an unfinished run, or a broken shard.
    """

    def __init__(self, folder: Path, image_hw: tuple[int, int] | None):
        self.folder, self.image_hw = Path(folder), image_hw
        self.skipped: list[RowProblem] = []
        self._instructions: list[str] = []
        self._deltas: list[np.ndarray] = []
        self._places: list[tuple[Path, int]] = []
        self._maps: dict[Path, np.ndarray] = {}
        for shard in list_shards(self.folder):
            arrays = read_shard(shard, _ARRAYS[1:])
            actions, instructions = arrays["actions"], arrays["instructions"]
            if actions.ndim != 3 or actions.shape[2] != 6 or len(instructions) != len(actions):
                raise FlightDataError(
                    f"{shard}: actions {list(actions.shape)} and {len(instructions)} instructions, wanted [N, F-1, 6] "
                    "and N; delete it and generate again"
                )
            deltas = actions_to_deltas(actions)
            if not is_clip_length(deltas.shape[1] + 1):
                raise FlightDataError(f"{shard}: flights of {deltas.shape[1] + 1} frames, which is not 4k+1")
            self._instructions += [str(text) for text in instructions]
            self._deltas += list(deltas)
            self._places += [(shard, i) for i in range(len(deltas))]

    def __len__(self) -> int:
        return len(self._places)

    def key(self, row: int) -> str:
        shard, i = self._places[row]
        return content_key([shard], [i], self.image_hw)

    def name(self, row: int) -> str:
        shard, i = self._places[row]
        return f"{shard}: flight {i}"

    def frame_count(self, row: int) -> int:
        return len(self._deltas[row]) + 1

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3]. Raises FlightDataError that names the shard."""
        shard, i = self._places[row]
        if shard not in self._maps:
            self._maps[shard] = map_frames(shard)
        if i >= len(self._maps[shard]):
            raise FlightDataError(f"{self.name(row)}: the shard holds frames of {len(self._maps[shard])} flights")
        frames = np.array(self._maps[shard][i])
        if len(frames) != self.frame_count(row):
            raise FlightDataError(f"{self.name(row)}: {len(frames)} frames for {len(self._deltas[row])} actions")
        return fit_frames(frames, self.image_hw)

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self._instructions[row]

    def deltas(self, row: int) -> np.ndarray:
        """float32 [F-1, 6]. Raises FlightDataError that names the flight where they are not finite."""
        deltas = self._deltas[row]
        if not np.isfinite(deltas).all():
            raise FlightDataError(f"{self.name(row)}: actions that are not finite; generate the shard again")
        return deltas

    def broken_shards(self) -> list[RowProblem]:
        """Shards whose checksums are wrong, which reading row by row does not look at."""
        problems = []
        for shard in dict.fromkeys(shard for shard, _ in self._places):
            try:
                with zipfile.ZipFile(shard) as archive:
                    damaged = archive.testzip()
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                damaged = str(error)
            if damaged is not None:
                problems.append(RowProblem(str(shard), f"damaged ({damaged}); delete it and generate again", "video"))
        return problems

    def __getstate__(self) -> dict[str, Any]:
        """Without the frames: a worker process maps its own."""
        return {**self.__dict__, "_maps": {}}


def map_frames(shard: Path) -> np.ndarray:
    """Frames of a shard, on disk until they are looked at: uint8 [N, F, H, W, 3].

    A shard is an uncompressed zip file, so its arrays lie in it as they are; one that was compressed is read whole.

    Raises:
        FlightDataError: not a shard, or its frames are not such an array.
    """
    try:
        with zipfile.ZipFile(shard) as archive, shard.open("rb") as file:
            entry = archive.getinfo("frames.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                return read_shard(shard, _ARRAYS[:1])["frames"]
            file.seek(entry.header_offset)
            name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name_bytes + extra_bytes, 1)
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, is_fortran, dtype = read_header(file)
            if dtype != np.uint8 or len(shape) != 5 or shape[-1] != 3 or is_fortran:
                raise FlightDataError(f"{shard}: frames are {dtype} {list(shape)}, wanted uint8 [N, F, H, W, 3]")
            return np.memmap(shard, np.uint8, "r", file.tell(), shape)
    except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
        if isinstance(error, FlightDataError):
            raise
        raise FlightDataError(f"{shard}: broken shard ({error}); delete it and generate again") from error
