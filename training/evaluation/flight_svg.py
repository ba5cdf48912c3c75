"""One flight as two small vector drawings: from above, and height over time. Plain SVG text, no other files.

Every number in the drawing was computed here and every text is escaped, so a drawing may stand in a page as it is.
Legend: T points of a path, x, y, z in cm and yaw in deg; the drawing is in m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.flight_log import PathPoint
from worldvln_edge.training.evaluation.start_frame import StartFrame, plot_window
from worldvln_edge.training.sim.scene import LANDMARK_COLOURS, Scene, Solid
from worldvln_edge.training.sim.scene_model import load_scene_model

EXPERT_COLOUR = "#1f2937"
_GOAL, _WALL = "#16a34a", "#cbd5e1"
_SIZE = 240  # of the view from above, in the page's pixels
_HEIGHT = 96
_STEPS_PER_S = 16
_LEAST_RANGE_M = 2.0

Paths = Mapping[str, tuple[str, Sequence[PathPoint]]]
"""Name -> (colour, path); drawn in that order, over the expert's."""


def top_view_svg(task: Task, paths: Paths) -> str:
    """View from above: walls, landmarks, goal, the expert's path (dashed) and the flown ones.

    Args:
        task: with its scene.
        paths: at least one, each with at least one point.
    """
    assert task.scene is not None  # flown tasks were checked
    scene, frame = load_scene_model(task.scene.family, task.scene.seed).scene, StartFrame(task)
    flown = {name: frame.poses(np.array(path)) for name, (_, path) in paths.items()}
    expert = frame.poses(np.array(task.reference_path_raw or [task.initial_pos]))
    centre, half = plot_window([expert, *flown.values()], frame, task, scene)
    unit = 2 * half / _SIZE  # metres of a pixel
    shapes = _scene_shapes(scene, frame, task, centre, half, unit)
    if task.end_pos is not None:
        goal = frame.poses(np.array([task.end_pos]))[0]
        radius = f"{task.success.position_m:.2f}"
        shapes.append(f'<circle cx="{goal[0]:.2f}" cy="{-goal[1]:.2f}" r="{radius}" fill="{_GOAL}" opacity=".25"/>')
        shapes.append(_heading(goal, task.end_pos[4] - frame.yaw_deg, _GOAL, unit))
    for name, (colour, path) in paths.items():
        shapes.append(_line(flown[name], colour, 3 * unit))
        shapes.append(_heading(flown[name][-1], path[-1][3] - frame.yaw_deg, colour, unit))
        shapes.append(_dot(flown[name][-1], 3.5 * unit, colour))
    shapes.append(_line(expert, EXPERT_COLOUR, 1.5 * unit, dash=f"{5 * unit:.3f} {3 * unit:.3f}"))
    shapes.append(_dot(np.zeros(2), 3.5 * unit, "black"))
    left, top = centre[0] - half, -centre[1] - half
    box = f"{left:.2f} {top:.2f} {2 * half:.2f} {2 * half:.2f}"
    return (
        f'<svg viewBox="{box}" width="{_SIZE}" height="{_SIZE}" role="img" aria-label="from above">'
        f"{''.join(shapes)}{_scale_bar(left, top, half, unit)}</svg>"
    )


def height_svg(task: Task, paths: Paths) -> str:
    """Height in m over time in s, with the expert's dashed."""
    courses = [(colour, np.array([point[2] for point in path]) / 100, "") for colour, path in paths.values()]
    if len(task.reference_path_raw) > 1:
        courses.append((EXPERT_COLOUR, np.array(task.reference_path_raw)[:, 2] / 100, "5 3"))
    everything = np.concatenate([heights for _, heights, _ in courses])
    low, high = float(everything.min()), float(everything.max())
    missing = max(0.0, _LEAST_RANGE_M - (high - low)) / 2
    low, high = low - missing, high + missing
    steps = max(len(heights) for _, heights, _ in courses) - 1
    left, right, top, bottom = 30.0, _SIZE - 6.0, 8.0, _HEIGHT - 18.0
    lines = []
    for colour, heights, dash in courses:
        x = left + (right - left) * np.arange(len(heights)) / max(1, steps)
        y = bottom - (bottom - top) * (heights - low) / (high - low)
        lines.append(_line(np.stack([x, -y], 1), colour, 1.5 if dash else 2.5, dash=dash))
    labels = (
        f'<text x="{left - 4}" y="{top + 6}" text-anchor="end">{high:.1f}</text>'
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end">{low:.1f}</text>'
        f'<text x="{left}" y="{_HEIGHT - 5}">height, m</text>'
        f'<text x="{right}" y="{_HEIGHT - 5}" text-anchor="end">{steps / _STEPS_PER_S:g} s</text>'
    )
    border = f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#94a3b8"/>'
    return (
        f'<svg viewBox="0 0 {_SIZE} {_HEIGHT}" width="{_SIZE}" height="{_HEIGHT}" font-size="10" role="img" '
        f'aria-label="height over time">{border}{"".join(lines)}{labels}</svg>'
    )


def _scene_shapes(
    scene: Scene, frame: StartFrame, task: Task, centre: np.ndarray, half: float, unit: float
) -> list[str]:
    marks = {mark.solid: mark for mark in scene.landmarks}
    shapes = []
    for index, solid in enumerate(scene.solids):
        mark = marks.get(index)
        if mark is None and (index == 0 or solid.base_m[2] >= 0.5):  # the ground, a ceiling
            continue
        corners = frame.metres(_corners(solid))
        if (corners.min(0) > centre + half).any() or (corners.max(0) < centre - half).any():
            continue
        if mark is None:
            shapes.append(_polygon(corners, _WALL))
            continue
        place, colour = frame.metres(np.array(solid.base_m)), "#" + bytes(LANDMARK_COLOURS[mark.colour]).hex()
        is_meant = mark.name == task.landmark
        edge = f'stroke="black" stroke-width="{(2 if is_meant else 0.5) * unit:.3f}"'
        if solid.shape == "box":
            shapes.append(_polygon(corners, colour, edge))
        else:
            radius = solid.size_m[0] / 2
            shapes.append(f'<circle cx="{place[0]:.2f}" cy="{-place[1]:.2f}" r="{radius:.2f}" fill="{colour}" {edge}/>')
        if is_meant:
            shapes.append(
                f'<text x="{place[0]:.2f}" y="{-place[1]:.2f}" font-size="{11 * unit:.3f}" font-weight="bold" '
                f'text-anchor="middle">{escape(mark.name)}</text>'
            )
    return shapes


def _corners(solid: Solid) -> np.ndarray:
    low, high = solid.low_m, solid.high_m
    return np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]])


def _polygon(points: np.ndarray, colour: str, edge: str = "") -> str:
    return f'<polygon points="{_places(points)}" fill="{colour}" {edge}/>'


def _line(points: np.ndarray, colour: str, width: float, *, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{_places(points)}" fill="none" stroke="{colour}" stroke-width="{width:.3f}" '
        f'stroke-linecap="round"{dashes}/>'
    )


def _heading(place: np.ndarray, turned_deg: float, colour: str, unit: float) -> str:
    """A short line to where the drone looks."""
    turned = np.radians(turned_deg)
    tip = place + 16 * unit * np.array([np.sin(turned), np.cos(turned)])
    return _line(np.stack([place, tip]), colour, 2 * unit)


def _dot(place: np.ndarray, radius: float, colour: str) -> str:
    return f'<circle cx="{place[0]:.2f}" cy="{-place[1]:.2f}" r="{radius:.3f}" fill="{colour}"/>'


def _scale_bar(left: float, top: float, half: float, unit: float) -> str:
    x, y = left + 8 * unit, top + 2 * half - 8 * unit
    bar = np.array([[x, -y], [x + 2, -y]])
    text = f'<text x="{x:.2f}" y="{y - 3 * unit:.2f}" font-size="{10 * unit:.3f}">2 m</text>'
    return _line(bar, "#475569", 1.5 * unit) + text


def _places(points: np.ndarray) -> str:
    """Plot positions as SVG has them: y grows downwards."""
    return " ".join(f"{x:.2f},{-y:.2f}" for x, y in points)
