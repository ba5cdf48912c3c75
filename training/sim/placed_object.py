"""The object of a UAV-Flow task: a person or a car that stands in the scene.

Source: spec/session_protocol.md 4.2 (`use_obj`, `obj_id`, `target_pos`), 5 (`obj_info`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from worldvln_edge.training.sim.scene import Scene, Solid
from worldvln_edge.training.sim.textures import Colour

PERSON, CAR = 1, 2
_PERSON_SIZE_M = (0.6, 0.6, 1.8)
_CAR_SIZE_M = (4.4, 1.8, 1.5)
_COLOURS: tuple[Colour, ...] = ((200, 60, 60), (60, 90, 190), (230, 230, 225), (50, 130, 70), (220, 170, 60))
_TEXTURE = "object"
_PIXELS = 4


@dataclass(frozen=True, kw_only=True)
class PlacedObject:
    kind: int  # PERSON or CAR
    look: int  # chooses the colour
    position_cm: tuple[float, float, float]  # of the middle of its underside; a car stands on the ground
    yaw_deg: float = 0.0  # solids lie along the axes, so a car turns to the nearest quarter

    def __post_init__(self) -> None:
        if self.kind not in (PERSON, CAR):
            raise ValueError(f"use_obj must be 1 (a person) or 2 (a car), found {self.kind}")


def with_object(scene: Scene, placed: PlacedObject) -> Scene:
    """The scene and the object in it."""
    x, y, z = (value / 100.0 for value in placed.position_cm)
    if placed.kind == PERSON:
        solid = Solid("cylinder", (x, y, z), _PERSON_SIZE_M, _TEXTURE)
    else:
        length, width, height = _CAR_SIZE_M
        is_across = round(placed.yaw_deg / 90.0) % 2 == 1
        solid = Solid("box", (x, y, 0.0), (width, length, height) if is_across else _CAR_SIZE_M, _TEXTURE)
    colour = np.array(_COLOURS[placed.look % len(_COLOURS)], np.float64)
    textures = {**scene.textures, _TEXTURE: np.broadcast_to(colour, (_PIXELS, _PIXELS, 3)).copy()}
    return replace(scene, solids=(*scene.solids, solid), textures=textures)
