"""Dataset route folders: `<root>/<route>/images/` with `meta.json`, as flight clients replay them.

The motion comes from `raw_logs.json` where it has a pose for every picture (cm, or m where `meta.json` says
`"units": "m"`), else from `preprocessed_logs.json`, whose unit differs between releases, so `meta.json` must say it.
Angles are in deg in both.
Source: spec/session_protocol.md 4.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import torch

from worldvln_edge.training.data.captions import without_tag
from worldvln_edge.training.data.frame_pictures import content_key, list_pictures, read_pictures
from worldvln_edge.training.data.frame_selection import FrameSelection, UnusableRowError, select_frames
from worldvln_edge.training.data.row_problem import RowProblem
from worldvln_edge.training.data.trajectory_file import TrajectoryUnits, read_json, read_trajectory
from worldvln_edge.training.sim.shards import FlightDataError

IMAGES, META = "images", "meta.json"
RAW_LOGS, _PREPROCESSED = "raw_logs.json", "preprocessed_logs.json"
_PROMPTS = ("instruction", "instruction_unified", "prompt")


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One usable route."""

    folder: Path
    instruction: str
    length_unit: Literal["cm", "m"] | None
    """As `meta.json` says it; None where it does not."""
    pictures: int
    """How many there are. Their names are listed when they are read: those of many long routes fill the memory."""
    frames: tuple[int, ...]
    """Pictures that the row shows."""


def list_routes(root: Path) -> list[Path]:
    """Folders with `images/` and `meta.json`, in name order. May be empty."""
    return sorted(f for f in root.glob("*/") if (f / IMAGES).is_dir() and (f / META).is_file())


class RouteFolder:
    """Routes of a folder (a FlightSource).

    Args:
        root: folder of routes.
        image_hw: size of the frames; None leaves them as they are.
        selection: which pictures of a longer route; the pictures' rate is `fps`.
        fps: pictures a second.

    Raises:
        FlightDataError: no routes.
    """

    def __init__(
        self, root: Path, image_hw: tuple[int, int] | None, *, selection: FrameSelection | None = None, fps: float = 16
    ):
        self.root, self.image_hw, self.fps = Path(root), image_hw, fps
        self.selection = selection or FrameSelection()
        self.routes: list[Route] = []
        self.skipped: list[RowProblem] = []
        folders = list_routes(self.root)
        if not folders:
            raise FlightDataError(f"{self.root}: no routes (folders with {IMAGES}/ and {META})")
        for folder in folders:
            try:
                self.routes.append(self._read_route(folder))
            except FlightDataError as error:
                self.skipped.append(RowProblem(str(folder), str(error)))
            except UnusableRowError as error:
                self.skipped.append(RowProblem(str(folder), str(error), "length"))

    def __len__(self) -> int:
        return len(self.routes)

    def key(self, row: int) -> str:
        return content_key(self._shown(row), self.routes[row].frames, self.image_hw)

    def name(self, row: int) -> str:
        return str(self.routes[row].folder)

    def frame_count(self, row: int) -> int:
        return len(self.routes[row].frames)

    def frames(self, row: int) -> np.ndarray:
        """uint8 RGB [F, H, W, 3]. Raises FlightDataError that names the picture."""
        return read_pictures(self._shown(row), self.image_hw)

    def instruction(self, row: int, generator: torch.Generator | None = None) -> str:
        return self.routes[row].instruction

    def deltas(self, row: int) -> np.ndarray | None:
        """float32 [F-1, 6]; None where no log has a pose for every picture.

        Raises:
            FlightDataError: a log that cannot be read, ends too early, or whose unit nobody says.
        """
        route = self.routes[row]
        raw, preprocessed = route.folder / RAW_LOGS, route.folder / _PREPROCESSED
        if raw.is_file() and read_json(raw):  # an empty list says nothing
            logged = read_trajectory(raw, layout="pose6", units=_units(route.length_unit or "cm"))
            if logged.frames >= route.pictures:
                return logged.deltas(route.frames)
            if logged.frames > 1 and not preprocessed.is_file():
                raise FlightDataError(f"{raw}: {logged.frames} poses for {route.pictures} pictures")
        if not preprocessed.is_file():
            return None
        if route.length_unit is None:
            raise FlightDataError(f'{preprocessed}: cm or m? Write "units": "cm" or "m" into {META}')
        logged = read_trajectory(preprocessed, layout="pose6", units=_units(route.length_unit))
        if logged.frames < route.pictures:
            raise FlightDataError(f"{preprocessed}: {logged.frames} poses for {route.pictures} pictures")
        return logged.deltas(route.frames)

    def _shown(self, row: int) -> list[Path]:
        """Pictures of a row. Raises FlightDataError where pictures came or went since the folder was opened."""
        route = self.routes[row]
        pictures = list_pictures(route.folder / IMAGES)
        if len(pictures) != route.pictures:
            raise FlightDataError(
                f"{route.folder / IMAGES}: {len(pictures)} pictures, there were {route.pictures}; start again"
            )
        return [pictures[i] for i in route.frames]

    def _read_route(self, folder: Path) -> Route:
        meta = read_json(folder / META)
        pictures = list_pictures(folder / IMAGES)
        frames = select_frames(self.selection, begin=0, end=len(pictures) - 1, fps=self.fps)
        return Route(
            folder=folder,
            instruction=_prompt(meta, folder / META),
            length_unit=_length_unit(meta, folder / META),
            pictures=len(pictures),
            frames=frames,
        )


def _prompt(meta: Any, path: Path) -> str:
    texts = [meta.get(key) for key in _PROMPTS] if isinstance(meta, dict) else []
    for text in texts:
        if isinstance(text, str) and without_tag(text):
            return without_tag(text)
    raise FlightDataError(f"{path}: no instruction; give {', '.join(_PROMPTS[:-1])} or {_PROMPTS[-1]} as text")


def _length_unit(meta: dict[str, Any], path: Path) -> Literal["cm", "m"] | None:
    unit = meta.get("units")
    if unit not in (None, "cm", "m"):
        raise FlightDataError(f'{path}: "units" must be "cm" or "m", found {str(unit)[:40]}')
    return cast("Literal['cm', 'm'] | None", unit)


def _units(length: Literal["cm", "m"]) -> TrajectoryUnits:
    return TrajectoryUnits(length=length, angle="deg")
