"""Textured solids as triangle meshes in m: box, ball, cylinder, cone.

Meshes instead of MuJoCo's primitives for two reasons: texture coordinates in m on every face (a primitive smears a 2-D
texture down its sides), and speed (a `plane` geom alone costs 3 ms a frame in a software renderer, a mesh 0.1 ms).

Legend: V vertices, F triangles, counter-clockwise seen from outside; z = 0 is the bottom, x = y = 0 the axis.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Shape = Literal["box", "ball", "cylinder", "cone"]
_SIDES = 18
_RINGS = 10


@dataclass(frozen=True)
class SolidMesh:
    vertices: np.ndarray  # float64 [V, 3], m
    texcoords_m: np.ndarray  # float64 [V, 2], m along the surface
    faces: np.ndarray  # int [F, 3]

    @property
    def normals(self) -> np.ndarray:
        """Unit normals of the vertices: float64 [V, 3]; edges stay sharp because their vertices are not shared."""
        corners = self.vertices[self.faces]
        area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        total = np.zeros_like(self.vertices)
        for corner in range(3):
            np.add.at(total, self.faces[:, corner], area)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.where(length > 1e-12, total / np.maximum(length, 1e-12), (0.0, 0.0, 1.0))


def solid_mesh(shape: Shape, size_m: tuple[float, float, float]) -> SolidMesh:
    """Mesh of a solid standing on z = 0 with the outer size (x, y, z) in m.

    Raises:
        ValueError: an unknown shape, or a size that is not positive.
    """
    if min(size_m) <= 0:
        raise ValueError(f"a {shape} needs a positive size, found {size_m} m")
    if shape == "box":
        return _box(size_m)
    if shape in _PROFILES:
        return _revolve(np.array(_PROFILES[shape]), size_m)
    raise ValueError(f"unknown shape {shape!r}; known: box, {', '.join(_PROFILES)}")


def _ball_profile() -> list[tuple[float, float]]:
    angles = np.linspace(-np.pi / 2, np.pi / 2, _RINGS + 1)
    return [(round(float(np.cos(a)), 9), float(0.5 + 0.5 * np.sin(a))) for a in angles]


# (radius, height), bottom to top, as shares of the outer radius and height. A point given twice is a sharp edge.
_PROFILES: dict[str, list[tuple[float, float]]] = {
    "ball": _ball_profile(),
    "cylinder": [(0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (1.0, 1.0), (0.0, 1.0)],
    "cone": [(0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)],
}


def _box(size_m: tuple[float, float, float]) -> SolidMesh:
    half = np.array(size_m) / 2
    vertices: list[np.ndarray] = []
    texcoords: list[tuple[float, float]] = []
    faces: list[int] = []
    for axis in range(3):
        u_axis, v_axis = ((1, 2), (0, 2), (0, 1))[axis]
        for sign in (-1.0, 1.0):
            corners = np.zeros((4, 3))
            corners[:, axis] = sign * half[axis]
            corners[:, u_axis] = np.array([-1, 1, 1, -1]) * half[u_axis]
            corners[:, v_axis] = np.array([-1, -1, 1, 1]) * half[v_axis]
            normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
            order = [0, 1, 2, 0, 2, 3] if normal[axis] * sign > 0 else [0, 2, 1, 0, 3, 2]
            faces += [len(vertices) + i for i in order]
            vertices += list(corners)
            # u runs along the face in a fixed direction, v is the height on walls, so that floors line up.
            texcoords += [(c[u_axis] + half[u_axis], c[v_axis] + half[v_axis]) for c in corners]
    standing = np.array(vertices)
    standing[:, 2] += half[2]
    return SolidMesh(standing, np.array(texcoords), np.array(faces, np.int64).reshape(-1, 3))


def _revolve(profile: np.ndarray, size_m: tuple[float, float, float]) -> SolidMesh:
    radius, height = np.array(size_m[:2]) / 2, size_m[2]
    around = np.linspace(0.0, 2 * np.pi, _SIDES + 1)  # the seam is there twice, with two texture coordinates
    step = np.diff(profile * (radius.mean(), height), axis=0)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])
    vertices, texcoords, faces = [], [], []
    for (share, z), v in zip(profile, along, strict=True):
        for angle in around:
            vertices.append((share * radius[0] * np.cos(angle), share * radius[1] * np.sin(angle), z * height))
            texcoords.append((angle * radius.mean(), v))
    row = _SIDES + 1
    for ring in range(len(profile) - 1):
        (low, low_z), (high, high_z) = profile[ring], profile[ring + 1]
        if low == high and low_z == high_z:
            continue
        for side in range(_SIDES):
            a, b = ring * row + side, (ring + 1) * row + side
            if low > 0:
                faces.append((a, a + 1, b + 1))
            if high > 0:
                faces.append((a, b + 1, b))
    return SolidMesh(np.array(vertices), np.array(texcoords), np.array(faces, np.int64))
