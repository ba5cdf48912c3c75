"""Procedural scenes: what stands where, from a family and a seed.

`city`: a block outdoors, 60 x 60 m, 4 to 8 buildings, a skyline around it. `rooms`: a hall of 30 x 30 m with partition
walls, ceiling open or 7 to 8 m high. Both carry 3 to 5 landmarks, each a colour and a shape, no colour twice.
Coordinates are the project's (x forward, y right, z up) in m. The renderer and the collision test are built from this
layout (`scene_model.py`).
Source: spec/training.md 8.1, 8.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from worldvln_edge.training.sim.solids import Shape
from worldvln_edge.training.sim.textures import Colour, add_tiles, add_windows, blob_texture

Family = Literal["city", "rooms"]
FAMILIES: tuple[Family, ...] = ("city", "rooms")

TILE_M = 16.0
"""One texture tile covers 16 x 16 m."""
_PIXELS = 192
_GRAINS_M = (4.0, 2.0, 1.2)

LANDMARK_COLOURS: dict[str, Colour] = {
    "red": (215, 30, 30),
    "green": (25, 175, 50),
    "blue": (30, 60, 225),
    "yellow": (240, 215, 25),
    "purple": (150, 35, 190),
    "orange": (250, 125, 15),
}
# Shape and outer size in m (x, y, z) as seen on the ground.
LANDMARK_SHAPES: dict[str, tuple[Shape, tuple[float, float, float]]] = {
    "tower": ("cylinder", (1.6, 1.6, 4.6)),
    "ball": ("ball", (2.2, 2.2, 2.2)),
    "cone": ("cone", (2.4, 2.4, 3.0)),
    "box": ("box", (1.9, 1.9, 1.9)),
}

# Muted surfaces, so that a landmark's colour is its own. The first two colours make the blobs, the third the patches.
_GROUND_PALETTES: tuple[tuple[Colour, ...], ...] = (
    ((62, 64, 70), (168, 162, 150), (88, 112, 66)),
    ((84, 100, 60), (178, 164, 124), (66, 66, 70)),
    ((100, 82, 64), (196, 188, 170), (74, 96, 70)),
    ((56, 66, 62), (148, 150, 158), (180, 158, 116)),
)
_FACADE_PALETTES: tuple[tuple[Colour, ...], ...] = (
    ((126, 70, 54), (206, 164, 136)),
    ((104, 106, 114), (206, 204, 196)),
    ((146, 126, 84), (226, 210, 172)),
    ((76, 92, 112), (178, 192, 206)),
    ((96, 80, 74), (190, 150, 126)),
)
_WALL_PALETTES: tuple[tuple[Colour, ...], ...] = (
    ((132, 108, 84), (226, 212, 188)),
    ((88, 112, 118), (206, 220, 216)),
    ((118, 92, 104), (218, 200, 204)),
    ((104, 108, 84), (214, 212, 180)),
)
_FLOOR_PALETTES: tuple[tuple[Colour, ...], ...] = (
    ((96, 66, 42), (186, 146, 104)),
    ((78, 80, 88), (182, 182, 178)),
    ((70, 62, 58), (160, 148, 134)),
)
_CEILING_PALETTE: tuple[Colour, ...] = ((150, 150, 148), (236, 234, 228))


@dataclass(frozen=True)
class Solid:
    """One textured body, its axes along the world's; `base_m` is the middle of its underside."""

    shape: Shape
    base_m: tuple[float, float, float]
    size_m: tuple[float, float, float]
    texture: str

    @property
    def low_m(self) -> np.ndarray:
        """Lower corner of the bounding box: float64 [3]."""
        return np.array(self.base_m) - np.array(self.size_m) * (0.5, 0.5, 0.0)

    @property
    def high_m(self) -> np.ndarray:
        """Upper corner of the bounding box: float64 [3]."""
        return np.array(self.base_m) + np.array(self.size_m) * (0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Landmark:
    name: str  # "red tower"
    solid: int  # index into Scene.solids

    @property
    def colour(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True)
class Scene:
    family: Family
    seed: int
    half_size_m: float
    ceiling_m: float
    """Flying above it, or beyond +-half_size_m, leaves the world."""
    solids: tuple[Solid, ...]
    landmarks: tuple[Landmark, ...]
    textures: dict[str, np.ndarray]
    """Name -> float64 [N, N, 3], 0..255; one tile is TILE_M x TILE_M."""
    sky: tuple[Colour, Colour]
    """Colour at the horizon and overhead."""

    def landmark(self, name: str) -> Landmark:
        """The landmark called `name`.

        Raises:
            ValueError: the scene has none of that name; the message lists those it has.
        """
        for landmark in self.landmarks:
            if landmark.name == name:
                return landmark
        known = ", ".join(landmark.name for landmark in self.landmarks)
        raise ValueError(f"scene {self.family} {self.seed} has no landmark {name!r}; it has: {known}")

    def landmark_centre_m(self, name: str) -> np.ndarray:
        """Centre of a landmark: float64 [3]."""
        solid = self.solids[self.landmark(name).solid]
        return (solid.low_m + solid.high_m) / 2


def build_scene(family: str, seed: int) -> Scene:
    """The scene of a family and a seed; the same pair gives the same scene.

    Raises:
        ValueError: an unknown family.
    """
    if family == "city":
        return _build_city(seed)
    if family == "rooms":
        return _build_rooms(seed)
    raise ValueError(f"unknown scene family {family!r}; known: {', '.join(FAMILIES)}")


def _build_city(seed: int) -> Scene:
    rng = np.random.default_rng([1, seed])
    half = 30.0
    textures = {"ground": _blobs(rng, _pick(rng, _GROUND_PALETTES))}
    for i, palette in enumerate(_some(rng, _FACADE_PALETTES, 3)):
        textures[f"facade{i}"] = add_windows(_blobs(rng, palette), rng, per_tile=5)
    solids = [Solid("box", (0.0, 0.0, -1.0), (150.0, 150.0, 1.0), "ground")]
    solids += _skyline(rng, half)

    buildings: list[Solid] = []
    wanted = int(rng.integers(4, 9))
    for _ in range(400):
        if len(buildings) == wanted:
            break
        size = (float(rng.uniform(4.5, 9.0)), float(rng.uniform(4.5, 9.0)), float(rng.uniform(7.0, 15.0)))
        x, y = (float(v) for v in rng.uniform(-25.0, 25.0, 2))
        building = Solid("box", (x, y, 0.0), size, f"facade{int(rng.integers(3))}")
        if all(_gap(building, other) > 6.0 for other in buildings):
            buildings.append(building)
    solids += buildings
    landmarks = _place_landmarks(rng, solids, textures, obstacles=buildings, half=23.0, apart=7.0, clear=3.5)
    sky = (_jitter(rng, (196, 214, 232), 14), _jitter(rng, (92, 142, 208), 24))
    return Scene("city", seed, half, 12.0, tuple(solids), landmarks, textures, sky)


def _skyline(rng: np.random.Generator, half: float) -> list[Solid]:
    """Blocks beyond the border on all four sides: turning shows something everywhere."""
    blocks = []
    for axis, side in ((0, -1), (0, 1), (1, -1), (1, 1)):
        for slot in (-30.0, -10.0, 10.0, 30.0):
            along, depth = slot + float(rng.uniform(-3, 3)), float(rng.uniform(6, 10))
            width, height = float(rng.uniform(8, 15)), float(rng.uniform(6, 18))
            across = side * (half + 4.0 + depth / 2)
            place = (across, along) if axis == 0 else (along, across)
            ground = (depth, width) if axis == 0 else (width, depth)
            blocks.append(Solid("box", (*place, 0.0), (*ground, height), f"facade{int(rng.integers(3))}"))
    return blocks


def _build_rooms(seed: int) -> Scene:
    rng = np.random.default_rng([2, seed])
    half, wall = 15.0, 0.4
    has_ceiling = bool(rng.random() < 0.5)
    height = float(rng.uniform(7.0, 8.0)) if has_ceiling else float(rng.uniform(5.0, 7.0))
    floor = _blobs(rng, _pick(rng, _FLOOR_PALETTES))
    if rng.random() < 0.5:
        floor = add_tiles(floor, per_tile=8, contrast=0.3)
    textures = {"floor": floor}
    for i, palette in enumerate(_some(rng, _WALL_PALETTES, 3)):
        textures[f"wall{i}"] = _blobs(rng, palette)
    textures["ceiling"] = _blobs(rng, _CEILING_PALETTE)

    solids = [Solid("box", (0.0, 0.0, -1.0), (60.0, 60.0, 1.0), "floor")]
    for i, side in enumerate((-1, 1)):
        centre = side * (half + wall / 2)
        solids.append(Solid("box", (centre, 0.0, 0.0), (wall, 2 * half + 2 * wall, height), f"wall{i}"))
        solids.append(Solid("box", (0.0, centre, 0.0), (2 * half, wall, height), f"wall{2 - i}"))
    if has_ceiling:
        solids.append(Solid("box", (0.0, 0.0, height), (2 * half + 2 * wall, 2 * half + 2 * wall, 0.4), "ceiling"))

    partitions: list[Solid] = []
    wanted = int(rng.integers(2, 5))
    for _ in range(200):
        if len(partitions) == wanted:
            break
        length, at, side = float(rng.uniform(5.0, 10.0)), float(rng.uniform(-10.0, 10.0)), int(rng.choice([-1, 1]))
        along = side * (half - length / 2)  # from an outer wall inwards
        tall = height if rng.random() < 0.6 else 3.0
        if rng.random() < 0.5:
            partition = Solid("box", (at, along, 0.0), (wall, length, tall), f"wall{int(rng.integers(3))}")
        else:
            partition = Solid("box", (along, at, 0.0), (length, wall, tall), f"wall{int(rng.integers(3))}")
        if all(_gap(partition, other) > 5.0 for other in partitions):
            partitions.append(partition)
    solids += partitions
    landmarks = _place_landmarks(rng, solids, textures, obstacles=partitions, half=12.0, apart=5.5, clear=2.5)
    sky = (_jitter(rng, (206, 214, 222), 12), _jitter(rng, (130, 160, 200), 20))
    return Scene("rooms", seed, half, height - 0.2, tuple(solids), landmarks, textures, sky)


def _place_landmarks(
    rng: np.random.Generator,
    solids: list[Solid],
    textures: dict[str, np.ndarray],
    *,
    obstacles: list[Solid],
    half: float,
    apart: float,
    clear: float,
) -> tuple[Landmark, ...]:
    """Append 3 to 5 landmarks to `solids` and their textures to `textures`."""
    colours = list(rng.permutation(list(LANDMARK_COLOURS)))[: int(rng.integers(3, 6))]
    placed: list[Solid] = []
    landmarks = []
    for colour in colours:
        kind = str(rng.choice(list(LANDMARK_SHAPES)))
        shape, size = LANDMARK_SHAPES[kind]
        base = np.array(LANDMARK_COLOURS[colour], np.float64)
        texture = f"landmark_{colour}"
        # Blobs of the same colour, lighter and darker: structure to track without losing the name's colour.
        textures[texture] = blob_texture(
            rng, (tuple(base * 0.62), tuple(base)), pixels=_PIXELS, tile_m=TILE_M, grains_m=(1.2, 0.7)
        )
        spread = apart
        for attempt in range(2000):
            if attempt % 200 == 199:
                spread *= 0.85  # a crowded scene: better a little closer than one landmark less
            x, y = (float(v) for v in rng.uniform(-half, half, 2))
            solid = Solid(shape, (x, y, 0.0), size, texture)
            free = all(_gap(solid, other) > clear for other in obstacles)
            if free and all(_gap(solid, other) > spread for other in placed):
                placed.append(solid)
                landmarks.append(Landmark(f"{colour} {kind}", len(solids)))
                solids.append(solid)
                break
    return tuple(landmarks)


def _gap(a: Solid, b: Solid) -> float:
    """Horizontal distance between the bounding boxes of two solids, m; 0 when they overlap."""
    apart = np.maximum(a.low_m - b.high_m, b.low_m - a.high_m)[:2]
    return float(np.hypot(*np.maximum(apart, 0.0)))


def _blobs(rng: np.random.Generator, palette: tuple[Colour, ...]) -> np.ndarray:
    jittered = [_jitter(rng, colour, 14) for colour in palette]
    return blob_texture(rng, jittered, pixels=_PIXELS, tile_m=TILE_M, grains_m=_GRAINS_M)


def _jitter(rng: np.random.Generator, colour: Colour, amount: int) -> Colour:
    red, green, blue = np.clip(np.array(colour) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(red), int(green), int(blue)


def _pick(rng: np.random.Generator, options: tuple) -> tuple:
    return options[int(rng.integers(len(options)))]


def _some(rng: np.random.Generator, options: tuple, count: int) -> list:
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]
