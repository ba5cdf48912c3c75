"""The action decoder's manifest: latents, trajectory and pictures of every flight, in splits.

    {"items_train": [{"latent_path": "a/latents.pt", "traj_json_path": "a/preprocessed_logs.json",
                      "images_dir": "a/images", "traj_layout": "pose6", "traj_units": {"length": "m", "angle": "deg"}}],
     "items_val": [...]}

`traj_layout` and `traj_units` are for trajectory files that do not say it themselves; they may stand in an item or at
the top, for all. An item may hold an `instruction`.
Legend: T latent frames, F = 4(T-1)+1 frames. Source: spec/training.md 1.6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from worldvln_edge.models.checkpoint_file import CheckpointError, read_torch_file
from worldvln_edge.training.data.frame_pictures import content_key, numbered_picture, read_pictures
from worldvln_edge.training.data.frame_selection import TEMPORAL_STRIDE
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.data.trajectory_file import Layout, TrajectoryUnits, read_json, read_trajectory
from worldvln_edge.training.sim.shards import FlightDataError

ALL = "ALL"
_PATHS = ("latent_path", "traj_json_path", "images_dir")


class ManifestItem(msgspec.Struct, frozen=True, kw_only=True):
    """One flight."""

    latent_path: str
    traj_json_path: str
    images_dir: str
    instruction: str = ""
    traj_layout: Layout | None = None
    traj_units: TrajectoryUnits | None = None


def is_manifest(path: Path) -> bool:
    """Whether a JSON file holds items of a manifest."""
    if path.suffix != ".json" or not path.is_file():
        return False
    return bool(list_splits(path))


def list_splits(path: Path) -> list[str]:
    """Keys of a manifest's lists of items, `items_train` and so on. Raises FlightDataError: not JSON."""
    return _splits(read_json(path))


class ActionManifest:
    """Flights of a manifest (a FlightSource that also knows where their latents are).

    Args:
        path: the JSON file; paths in it are relative to its folder.
        image_hw: size of the frames; None leaves them as they are.
        items_key: which items: a key, several with commas between, or `ALL` for every key that starts `items_`.
        require_latent_frames: leave out flights of another length; 0 takes all.

    Raises:
        FlightDataError: no manifest, or it does not have such items.
    """

    def __init__(
        self,
        path: Path,
        image_hw: tuple[int, int] | None,
        *,
        items_key: str = "items_train",
        require_latent_frames: int = 0,
    ):
        self.path, self.image_hw = Path(path), image_hw
        self.items: list[ManifestItem] = []
        self.skipped: list[RowProblem] = []
        self._names: list[str] = []
        self._latent_frames: list[int] = []
        content = read_json(self.path)
        for key in _keys(content, items_key, self.path):
            for i, raw in enumerate(content[key]):
                self._add(f"{self.path}: {key}[{i}]", raw, content, require_latent_frames)

    def __len__(self) -> int:
        return len(self.items)

    def key(self, row: int) -> str:
        numbers = range(self.frame_count(row))
        return content_key([self._picture(row, i) for i in numbers], numbers, self.image_hw)

    def name(self, row: int) -> str:
        return self._names[row]

    def frame_count(self, row: int) -> int:
        return TEMPORAL_STRIDE * (self._latent_frames[row] - 1) + 1

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3]. Raises FlightDataError that names item and picture."""
        try:
            return read_pictures([self._picture(row, i) for i in range(self.frame_count(row))], self.image_hw)
        except FlightDataError as error:
            raise FlightDataError(f"{self._names[row]}: {error}") from error

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self.items[row].instruction

    def deltas(self, row: int) -> np.ndarray:
        """float32 [F-1, 6]. Raises FlightDataError that names item and file; also for another number of frames."""
        item = self.items[row]
        path = self._place(item.traj_json_path)
        try:
            trajectory = read_trajectory(path, layout=item.traj_layout, units=item.traj_units)
        except FlightDataError as error:
            raise FlightDataError(f"{self._names[row]}: {error}") from error
        if trajectory.frames != self.frame_count(row):
            raise FlightDataError(
                f"{self._names[row]}: {path} covers {trajectory.frames} frames ({trajectory.layout}), "
                f"the latents {self.frame_count(row)}"
            )
        return trajectory.deltas()

    def latent_path(self, row: int) -> Path:
        """File of the flight's latents."""
        return self._place(self.items[row].latent_path)

    def latents(self, row: int) -> torch.Tensor:
        """Patchified VAE features: float32 [1, C, T, h, w]. Raises FlightDataError that names item and file."""
        try:
            return _read_latents(self.latent_path(row)).float()
        except FlightDataError as error:
            raise FlightDataError(f"{self._names[row]}: {error}") from error

    def _add(self, name: str, raw: Any, content: dict[str, Any], require_latent_frames: int) -> None:
        common = {key: content[key] for key in ("traj_layout", "traj_units") if key in content}
        if not isinstance(raw, dict) or not all(isinstance(raw.get(key), str) and raw[key] for key in _PATHS):
            self.skipped.append(RowProblem(name, f"needs {', '.join(_PATHS)}"))
            return
        try:
            item = msgspec.convert({**common, **raw}, ManifestItem)
            frames = _read_latents(self._place(item.latent_path)).shape[2]
        except (msgspec.ValidationError, FlightDataError) as error:
            self.skipped.append(RowProblem(name, str(error)))
            return
        if require_latent_frames and frames != require_latent_frames:
            reason = f"{frames} latent frames, {require_latent_frames} are required"
            self.skipped.append(RowProblem(name, reason, "length"))
            return
        self.items.append(item)
        self._names.append(name)
        self._latent_frames.append(frames)

    def _picture(self, row: int, frame: int) -> Path:
        return numbered_picture(self._place(self.items[row].images_dir), frame)

    def _place(self, path: str) -> Path:
        return self.path.parent / path


def _keys(content: Any, items_key: str, path: Path) -> list[str]:
    present = _splits(content)
    if not present:
        raise FlightDataError(f'{path}: no manifest; wanted an object with lists "items_train" and "items_val"')
    wanted = present if items_key == ALL else [key.strip() for key in items_key.split(",") if key.strip()]
    for key in wanted:
        if key not in present or not isinstance(content[key], list):
            raise FlightDataError(f"{path}: no list {key!r}; it has {', '.join(present)}")
    return wanted


def _splits(content: Any) -> list[str]:
    return [key for key in content if key.startswith("items_")] if isinstance(content, dict) else []


def _read_latents(path: Path) -> torch.Tensor:
    try:
        content = read_torch_file(path)
    except CheckpointError as error:
        raise FlightDataError(str(error)) from error
    latents = content.get("latents") if isinstance(content, dict) else content
    if not isinstance(latents, torch.Tensor) or latents.ndim != 5 or latents.shape[0] != 1 or not latents.shape[2]:
        raise FlightDataError(f'{path}: wanted latents [1, C, T, h, w], or an object with them under "latents"')
    return latents
