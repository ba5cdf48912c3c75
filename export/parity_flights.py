"""Flights that a bundle is compared on: frames of held-out simulator flights, with their instructions.

The package carries eight flights of eight kinds, lossy WebP as a camera would send them: one picture with a row per
flight and a column per frame, and a JSON file beside it. Their tasks are in no training or calibration split.
Source: docs/precision.md (how the file was made).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from worldvln_edge.atomic import atomic_file
from worldvln_edge.config import HorizonConfig
from worldvln_edge.export.calibrate import Flight
from worldvln_edge.export.calibration_flights import read_shard_flights
from worldvln_edge.images import decode_image

PACKAGED_FRAMES = "held-out simulator flights of the package"
PICTURE, DESCRIPTION = "held_out_flights.webp", "held_out_flights.json"
_QUALITY = 85


class FlightsError(ValueError):
    """Flights that a bundle cannot be compared on. The message says what was found and what is needed."""


def packaged_flights() -> list[Flight]:
    """The flights of the package: uint8 [49, 64, 64, 3] and an instruction each."""
    folder = files("worldvln_edge.export") / "data"
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    mosaic = decode_image((folder / PICTURE).read_bytes())
    rows, cols = len(about["instructions"]), about["frames"]
    height, width = mosaic.shape[0] // rows, mosaic.shape[1] // cols
    frames = mosaic.reshape(rows, height, cols, width, 3).transpose(0, 2, 1, 3, 4)
    return [(np.ascontiguousarray(f), text) for f, text in zip(frames, about["instructions"], strict=True)]


def pack_flights(flights: Sequence[Flight], folder: Path, *, source: str) -> None:
    """Write the two files that `packaged_flights` reads.

    Args:
        flights: all of one size and length.
        folder: takes the files.
        source: the command that the flights come from.
    """
    mosaic = np.concatenate([np.concatenate(list(frames), axis=1) for frames, _ in flights])
    about = {"source": source, "frames": len(flights[0][0]), "instructions": [text for _, text in flights]}
    with atomic_file(Path(folder) / PICTURE) as building:
        Image.fromarray(mosaic).save(building, format="WEBP", quality=_QUALITY, method=6)
    with atomic_file(Path(folder) / DESCRIPTION) as building:
        building.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def read_frames(path: Path) -> np.ndarray:
    """Frames of a `.npy` file: uint8 [F, H, W, 3]. Raises FlightsError when it holds anything else."""
    try:
        video = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FlightsError(f"{path} is no .npy array ({error})") from error
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        found = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else "an archive"
        raise FlightsError(f"{path} holds {found}, uint8 [F, H, W, 3] is needed")
    return video


def flights_of(shards: Path | None, frames: Path | None, *, count: int, seed: int) -> tuple[list[Flight], str]:
    """Flights to compare on, and where they come from.

    Args:
        shards: folder of `worldvln-edge sim flights`; `count` of its flights are drawn.
        frames: `.npy` file of one flight, which gets the instructions of the package. Neither: the package's flights.
        count: flights that are wanted.
        seed: picks flights of the shards.

    Raises:
        FlightsError, CalibrationError: files that hold no flights.
    """
    if shards is not None:
        return read_shard_flights(shards, count, seed), f"shards {shards}"
    packaged = packaged_flights()
    if frames is None:
        return packaged, PACKAGED_FRAMES
    video = read_frames(frames)
    return [(video, instruction) for _, instruction in packaged], f"frames {frames}"


def choose_flights(available: Sequence[Flight], count: int, horizon: HorizonConfig) -> list[Flight]:
    """`count` flights with as many frames as the horizon looks at; where there are fewer, they are flown again.

    A flight that is flown again has another seed, hence other draws.

    Raises:
        FlightsError: no flights, or too few frames.
    """
    if not available:
        raise FlightsError("no flights to compare on; give frames or shards of flights")
    chosen = []
    for index in range(count):
        frames, instruction = available[index % len(available)]
        if len(frames) < horizon.num_frames:
            raise FlightsError(
                f"{len(frames)} frames given, a flight needs {horizon.num_frames}; give longer flights (--shards, "
                "--frames)"
            )
        chosen.append((frames[: horizon.num_frames], instruction))
    return chosen
