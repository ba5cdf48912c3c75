"""Flights to calibrate on: shards of `worldvln-edge sim flights`, or dataset route folders.

Source: training/sim/shards.py (shards); spec/session_protocol.md 4.1 (route folders).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from worldvln_edge.export.calibrate import Flight
from worldvln_edge.export.calibration import CalibrationError
from worldvln_edge.images import ImageError, decode_image

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_PROMPT_KEYS = ("instruction", "instruction_unified", "prompt")


def read_shard_flights(folder: Path, count: int, seed: int) -> list[Flight]:
    """`count` flights of a folder of shards, drawn without repetition; one shard's frames are in memory at a time.

    Raises:
        CalibrationError: no shards, a broken one, or too few flights.
    """
    shards = sorted(path for path in Path(folder).glob("*.npz") if not path.name.startswith("."))
    if not shards:
        raise CalibrationError(f"{folder} holds no flight shards (*.npz); make some with `worldvln-edge sim flights`")
    instructions = [_shard_array(path, "instructions") for path in shards]
    places = [(shard, row) for shard, texts in enumerate(instructions) for row in range(len(texts))]
    flights = []
    held, frames = -1, np.empty(0)
    for index in _draw(len(places), count, seed, folder):
        shard, row = places[index]
        if shard != held:
            held, frames = shard, _shard_array(shards[shard], "frames")
        if frames.ndim != 5 or len(frames) != len(instructions[shard]):
            raise CalibrationError(f"{shards[shard]}: frames {list(frames.shape)}, needed are [N, F, H, W, 3]")
        flights.append((frames[row].copy(), str(instructions[shard][row])))
    return flights


def read_route_flights(root: Path, count: int, seed: int, *, frames: int) -> list[Flight]:
    """`count` routes below `root`, drawn without repetition, the first `frames` images of each.

    Raises:
        CalibrationError: no routes, too few, one without instruction, or an unreadable or odd-sized image.
    """
    root = Path(root)
    routes = sorted(path.parent for path in root.glob("*/meta.json") if (path.parent / "images").is_dir())
    if not routes:
        raise CalibrationError(f"{root} holds no routes (folders with meta.json and images/)")
    return [_read_route(routes[index], frames) for index in _draw(len(routes), count, seed, root)]


def _draw(available: int, count: int, seed: int, place: Path) -> list[int]:
    if available < count:
        raise CalibrationError(f"{place} holds {available} flights, {count} are asked for; ask for fewer")
    return sorted(int(i) for i in np.random.default_rng(seed).choice(available, count, replace=False))


def _shard_array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: no shard of flights ({error}); generate it again") from error


def _read_route(route: Path, frames: int) -> Flight:
    try:
        meta = json.loads((route / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{route / 'meta.json'}: no JSON ({error})") from error
    texts = [meta.get(key) for key in _PROMPT_KEYS] if isinstance(meta, dict) else []
    prompt = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if prompt is None:
        raise CalibrationError(f"{route / 'meta.json'}: none of {', '.join(_PROMPT_KEYS)} holds an instruction")
    paths = sorted(p for p in (route / "images").iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)[:frames]
    pictures = []
    for path in paths:
        try:
            pictures.append(decode_image(path.read_bytes()))
        except (OSError, ImageError) as error:
            raise CalibrationError(f"{path}: {error}; repair the route or take it out") from error
    if len({picture.shape for picture in pictures}) != 1:
        raise CalibrationError(f"{route}: {len(pictures)} images of differing sizes; all frames of a route are alike")
    return np.stack(pictures), prompt
