"""Plots of a flight: from above, height and heading over time, and a sheet with what the camera saw.

Everything is drawn in the start's frame: the drone starts at (0, 0) and looks up, right is right.
Legend: T poses (cm and deg in, m and deg in the plot).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Circle, Polygon
from matplotlib.patheffects import withStroke

from worldvln_edge.atomic import atomic_file
from worldvln_edge.poses import wrap_deg
from worldvln_edge.tasks import Task
from worldvln_edge.training.evaluation.closed_loop import FlownFlight
from worldvln_edge.training.evaluation.flight_view import draw_predicted_path, render_views, view_hw
from worldvln_edge.training.evaluation.start_frame import StartFrame, plot_window
from worldvln_edge.training.sim.scene import LANDMARK_COLOURS, Scene, Solid
from worldvln_edge.training.sim.scene_model import load_scene_model

_FLOWN, _EXPERT, _GOAL = "#0b6bd3", "#1f2937", "#16a34a"
_SUCCESS, _FAIL = "#15803d", "#be123c"
_STEPS_PER_S = 16


def write_flight_plot(flight: FlownFlight, path: Path) -> None:
    """PNG of one flight: from above at the left; height and heading at the right."""
    figure = Figure(figsize=(9.2, 6.2), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06), facecolor="white")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1.0))
    draw_top_down(figure.add_subplot(grid[:, 0]), flight)
    _draw_height(figure.add_subplot(grid[0, 1]), flight)
    _draw_heading(figure.add_subplot(grid[1, 1]), flight)
    _title(figure, flight)
    _save(figure, path)


def write_flight_sheet(flight: FlownFlight, path: Path) -> None:
    """PNG of one flight for a reader in a hurry: the views at every segment's border, and the plots below.

    Raises:
        RenderingUnavailableError: no offscreen OpenGL on this machine.
    """
    borders = [point - 1 for point in flight.points]
    views = render_views(flight, view_hw(flight.frames.shape[1:3], 360), borders)
    figure = Figure(figsize=(12.0, 8.6), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06), facecolor="white")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.0, 1.55))[:, 0]
    for i, (axes, view) in enumerate(zip(top.subplots(1, len(borders), squeeze=False)[0], views, strict=True)):
        axes.imshow(draw_predicted_path(view, flight, borders[i]))
        axes.set_axis_off()
        what = f"segment {i + 1} as predicted" if i < flight.segments else "the end"
        axes.set_title(f"{borders[i] / _STEPS_PER_S:g} s: {what}", fontsize=11, color="#334155")
    grid = bottom.add_gridspec(2, 2, width_ratios=(1.45, 1.0))
    draw_top_down(bottom.add_subplot(grid[:, 0]), flight)
    _draw_height(bottom.add_subplot(grid[0, 1]), flight)
    _draw_heading(bottom.add_subplot(grid[1, 1]), flight)
    _title(figure, flight)
    _save(figure, path)


def draw_top_down(axes: Axes, flight: FlownFlight) -> None:
    """Flown path against the expert's over the scene's footprint, with named landmarks, start and goal."""
    task = flight.task
    assert task.scene is not None  # flown tasks were checked
    scene = load_scene_model(task.scene.family, task.scene.seed).scene
    to_plot = StartFrame(task)
    flown = to_plot.poses(flight.poses)
    expert = to_plot.poses(np.array(task.reference_path_raw or [task.initial_pos]))
    centre, half = plot_window([flown, expert], to_plot, task, scene)

    ground = scene.textures[scene.solids[0].texture].mean((0, 1)) / 255
    axes.set_facecolor(0.35 * ground + 0.65)
    _draw_scene(axes, scene, to_plot, task, centre, half)
    if task.end_pos is not None:
        goal = to_plot.poses(np.array([task.end_pos]))[0]
        axes.add_patch(Circle(goal, task.success.position_m, facecolor=_GOAL, alpha=0.16, zorder=4))
        axes.add_patch(
            Circle(goal, task.success.position_m, fill=False, edgecolor=_GOAL, ls=(0, (4, 2)), lw=1.3, zorder=4)
        )
        _heading_mark(axes, goal, task.end_pos[4] - to_plot.yaw_deg, half, _GOAL, "goal")
    if len(expert) > 1:
        # On top of the flown path and thinner, so that both show where they agree.
        axes.plot(*expert.T, color=_EXPERT, ls=(0, (5, 3)), lw=1.6, zorder=7, label="expert")
    axes.plot(*flown.T, color=_FLOWN, lw=3.6, zorder=6, label="flown", path_effects=_halo(6))
    borders = [point - 1 for point in flight.points[1:-1]]
    axes.plot(*flown[borders].T, "o", ms=5.5, mfc="white", mec=_FLOWN, mew=1.6, zorder=8, label="new segment")
    _heading_mark(axes, flown[0], 0.0, half, "black", "start")
    _heading_mark(axes, flown[-1], flight.poses[-1, 4] - to_plot.yaw_deg, half, _FLOWN, "end")
    axes.set_xlim(centre[0] - half, centre[0] + half)
    axes.set_ylim(centre[1] - half, centre[1] + half)
    axes.set_aspect("equal")
    axes.set_xlabel("right of the start, m")
    axes.set_ylabel("ahead of the start, m")
    axes.grid(color="white", lw=0.8, alpha=0.6)
    axes.set_axisbelow(True)
    _quiet_frame(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8.5, frameon=False, ncols=6, columnspacing=1.2)


def _draw_scene(axes: Axes, scene: Scene, to_plot: StartFrame, task: Task, centre: np.ndarray, half: float) -> None:
    names = {mark.solid: mark for mark in scene.landmarks}
    for index, solid in enumerate(scene.solids):
        mark = names.get(index)
        if mark is not None:
            colour = np.array(LANDMARK_COLOURS[mark.colour]) / 255
            is_meant = mark.name == task.landmark
            edge, width = ("black", 2.0) if is_meant else ("#475569", 0.8)
            if solid.shape == "box":
                axes.add_patch(_footprint(solid, to_plot, facecolor=colour, edgecolor=edge, lw=width, zorder=5))
            else:
                place = to_plot.metres(np.array(solid.base_m))
                axes.add_patch(Circle(place, solid.size_m[0] / 2, facecolor=colour, edgecolor=edge, lw=width, zorder=5))
            place = to_plot.metres(np.array(solid.base_m))
            if (np.abs(place - centre) < half - 0.5).all():
                axes.annotate(
                    mark.name,
                    place,
                    ha="center",
                    va="center",
                    fontsize=9,
                    fontweight="bold" if is_meant else "normal",
                    path_effects=_halo(3),
                    zorder=9,
                )
        elif index > 0 and solid.base_m[2] < 0.5:  # neither the ground nor a ceiling
            wall = scene.textures[solid.texture].mean((0, 1)) / 255
            axes.add_patch(
                _footprint(solid, to_plot, facecolor=0.8 * wall + 0.1, edgecolor="#334155", lw=0.9, zorder=3)
            )


def _footprint(solid: Solid, to_plot: StartFrame, **style: object) -> Polygon:
    low, high = solid.low_m, solid.high_m
    corners = np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]])
    return Polygon(to_plot.metres(corners), closed=True, **style)


def _heading_mark(axes: Axes, place: np.ndarray, turned_deg: float, half: float, colour: str, label: str) -> None:
    """A dot with an arrow that shows where the drone looks."""
    angle = np.radians(turned_deg)
    tip = place + 0.17 * half * np.array([np.sin(angle), np.cos(angle)])
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.8, "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0}
    arrow["path_effects"] = _halo(3.5)
    axes.annotate("", xy=(tip[0], tip[1]), xytext=(place[0], place[1]), arrowprops=arrow, zorder=10)
    axes.plot(*place, "o", ms=7, mfc=colour, mec="white", mew=1.4, zorder=11, label=label)


def _draw_height(axes: Axes, flight: FlownFlight) -> None:
    reference = np.array(flight.task.reference_path_raw)
    expert = reference[:, 2] / 100 if len(reference) > 1 else None
    _draw_course(axes, flight, flight.poses[:, 2] / 100, expert, "height, m", smallest_range=4.0)


def _draw_heading(axes: Axes, flight: FlownFlight) -> None:
    start = flight.task.initial_pos[4]
    reference = np.array(flight.task.reference_path_raw)
    expert = np.degrees(np.unwrap(np.radians(reference[:, 4]))) - start if len(reference) > 1 else None
    flown = flight.poses[:, 4] - start
    if expert is not None:
        expert = expert - expert[0] + wrap_deg(expert[0])
    _draw_course(axes, flight, flown, expert, "heading, deg (right +)", smallest_range=40.0)
    axes.set_xlabel("time, s")


def _draw_course(
    axes: Axes, flight: FlownFlight, flown: np.ndarray, expert: np.ndarray | None, label: str, smallest_range: float
) -> None:
    for point in flight.points[1:-1]:
        axes.axvline((point - 1) / _STEPS_PER_S, color="#cbd5e1", lw=1.0, zorder=1)
    if expert is not None:
        axes.plot(np.arange(len(expert)) / _STEPS_PER_S, expert, color=_EXPERT, ls=(0, (5, 3)), lw=1.5, zorder=4)
    axes.plot(np.arange(len(flown)) / _STEPS_PER_S, flown, color=_FLOWN, lw=3.2, zorder=3)
    everything = flown if expert is None else np.concatenate([flown, expert])
    low, high = everything.min(), everything.max()
    missing = max(0.12 * (high - low), (smallest_range - (high - low)) / 2)
    axes.set_ylim(low - missing, high + missing)
    axes.set_xlim(0, (len(flown) - 1) / _STEPS_PER_S)
    axes.set_ylabel(label)
    axes.grid(color="#e2e8f0", lw=0.8)
    axes.set_axisbelow(True)
    _quiet_frame(axes)


def _title(figure: Figure, flight: FlownFlight) -> None:
    score = flight.score
    result = "SUCCESS" if score.success else "FAIL (collision)" if score.collided else "FAIL"
    figure.suptitle(f"“{flight.instruction}”", fontsize=15, fontweight="bold", color="#0f172a")
    where = figure.axes[0] if not figure.subfigs else figure.subfigs[1].axes[0]
    where.set_title(
        f"{result}: {score.final_distance_m:.2f} m and {score.final_yaw_error_deg:.1f}° from the goal",
        fontsize=11,
        color=_SUCCESS if score.success else _FAIL,
        fontweight="bold",
        loc="left",
    )


def _halo(width: float) -> list[withStroke]:
    return [withStroke(linewidth=width, foreground="white")]


def _quiet_frame(axes: Axes) -> None:
    axes.tick_params(labelsize=8.5, color="#94a3b8")
    for spine in axes.spines.values():
        spine.set_color("#94a3b8")


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as building:
        figure.savefig(building, dpi=110, format="png")
