"""What the drone saw, for people: sharper frames along the flown path, with the predicted path and a caption drawn in.

The path is drawn through the point that lies where the camera looks, 3 m ahead of the drone and on the optical axis:
a path through the drone itself would be one dot at its own height, and a turn would not show at all.
Legend: T poses, H W pixels. Poses and actions: cm and deg.
"""

from __future__ import annotations

from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldvln_edge.atomic import atomic_file
from worldvln_edge.poses import integrate_actions
from worldvln_edge.training.evaluation.closed_loop import FlownFlight
from worldvln_edge.training.sim.camera import CameraConfig
from worldvln_edge.training.sim.coordinates import heading_axes
from worldvln_edge.training.sim.simulator import Simulator

PATH_COLOUR = (0, 229, 255)
_OUTLINE_COLOUR = (10, 22, 38)
_CAPTION_COLOUR, _TEXT_COLOUR, _QUIET_COLOUR = (17, 24, 39), (248, 250, 252), (148, 163, 184)
_SUCCESS_COLOUR, _FAIL_COLOUR = (74, 222, 128), (251, 113, 133)
_AHEAD_M = 3.0
_SMOOTHING = 3  # lines are drawn this much larger and then reduced
_FPS = 16


def view_hw(image_hw: tuple[int, int], longer_side: int) -> tuple[int, int]:
    """Size of the pictures: the pilot's aspect ratio, even numbers of rows and columns (yuv420p)."""
    scale = longer_side / max(image_hw)
    return tuple(2 * max(1, round(side * scale / 2)) for side in image_hw)  # type: ignore[return-value]


def render_views(flight: FlownFlight, hw: tuple[int, int], frames: list[int] | None = None) -> list[np.ndarray]:
    """Frames of a flight rendered again at another size, each uint8 [H, W, 3].

    Args:
        flight: whose poses are looked from.
        hw: rows and columns.
        frames: 0-based indices; default: all.
    """
    indices = range(len(flight.poses)) if frames is None else frames
    with Simulator.for_task(flight.task, image_hw=hw, dynamics="kinematic") as simulator:
        return [simulator.reset(flight.poses[index]) for index in indices]


def draw_predicted_path(view: np.ndarray, flight: FlownFlight, frame: int) -> np.ndarray:
    """A view with what is left of the current segment's predicted path: uint8 [H, W, 3].

    Args:
        view: uint8 [H, W, 3], rendered at `flight.poses[frame]`.
        frame: 0-based index; the last frame has no path, it is the end.
    """
    ahead = _predicted_poses(flight, frame)
    if len(ahead) < 2:
        return view
    rows, columns = view.shape[:2]
    camera = CameraConfig(image_hw=(rows, columns))
    size = (columns * _SMOOTHING, rows * _SMOOTHING)
    places = [camera.project(flight.poses[frame], _carried_point_m(pose, camera)) for pose in ahead]
    dots = [((1 + p[0]) / 2 * size[0], (1 - p[1]) / 2 * size[1]) for p in places if p is not None]
    if not dots:
        return view
    layer = Image.new("RGBA", size, (*PATH_COLOUR, 0))
    draw = ImageDraw.Draw(layer)
    unit = max(size) / 320.0
    if len(dots) > 1:
        draw.line(dots, fill=(*_OUTLINE_COLOUR, 190), width=round(8 * unit), joint="curve")
        draw.line(dots, fill=(*PATH_COLOUR, 235), width=round(4.5 * unit), joint="curve")
    for x, y in dots[::4]:
        _disc(draw, x, y, 3.6 * unit, (*_OUTLINE_COLOUR, 255))
        _disc(draw, x, y, 2.2 * unit, (255, 255, 255, 255))
    x, y = dots[-1]
    _disc(draw, x, y, 7.5 * unit, (*_OUTLINE_COLOUR, 230))
    _disc(draw, x, y, 5.8 * unit, (*PATH_COLOUR, 255))
    _disc(draw, x, y, 2.4 * unit, (255, 255, 255, 255))
    layer = layer.resize((columns, rows), Image.Resampling.BOX)
    drawn = Image.alpha_composite(Image.fromarray(view).convert("RGBA"), layer)
    return np.asarray(drawn.convert("RGB"))


def write_flight_video(flight: FlownFlight, path: Path, *, longer_side: int = 320) -> None:
    """H.264 video (yuv420p, 16 fps) of a flight: views with the predicted path, a caption, and what the pilot sees.

    Args:
        longer_side: pixels of the camera's picture; the caption is added above.

    Raises:
        RenderingUnavailableError: no offscreen OpenGL on this machine.
    """
    hw = view_hw(flight.frames.shape[1:3], longer_side)
    views = render_views(flight, hw)
    with atomic_file(path) as building, av.open(str(building), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"crf": "20", "preset": "medium"})
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = hw[1], hw[0] + _strip_rows(hw[1])
        for index, view in enumerate(views):
            picture = _captioned(draw_predicted_path(view, flight, index), flight, index)
            # The first frame and the last stay for a while: long enough to read, and to see the result.
            for _ in range(_FPS if index in (0, len(views) - 1) else 1):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _captioned(view: np.ndarray, flight: FlownFlight, frame: int) -> np.ndarray:
    """The view below a strip with the instruction, the time and the segment; the pilot's own frame as an inset."""
    rows, columns = view.shape[:2]
    strip = _strip_rows(columns)
    picture = Image.new("RGB", (columns, rows + strip), _CAPTION_COLOUR)
    picture.paste(Image.fromarray(view), (0, strip))
    draw = ImageDraw.Draw(picture)
    margin = columns // 32
    font = _fitting_font(draw, flight.instruction, columns - 2 * margin, strip // 3)
    draw.text((margin, strip * 0.3), flight.instruction, font=font, fill=_TEXT_COLOUR, anchor="lm")
    small = _font(max(8, round(strip * 0.22)))
    last = len(flight.poses) - 1
    if frame == last:
        is_success = flight.score.success
        text = f"{'success' if is_success else 'fail'}: {flight.score.final_distance_m:.1f} m, "
        text += f"{flight.score.final_yaw_error_deg:.0f}° from the goal"
        draw.text(
            (margin, strip * 0.75), text, font=small, fill=_SUCCESS_COLOUR if is_success else _FAIL_COLOUR, anchor="lm"
        )
    else:
        text = f"{frame / _FPS:.1f} s   segment {_segment_of(flight, frame) + 1} of {flight.segments}"
        draw.text((margin, strip * 0.75), text, font=small, fill=_QUIET_COLOUR, anchor="lm")
    seen = Image.fromarray(flight.frames[frame])
    shrink = 0.26 * columns / max(seen.size)
    seen = seen.resize((round(seen.width * shrink), round(seen.height * shrink)), Image.Resampling.NEAREST)
    corner = (columns - seen.width - margin, rows + strip - seen.height - margin)
    draw.rectangle(
        (corner[0] - 2, corner[1] - 2, corner[0] + seen.width + 1, corner[1] + seen.height + 1), fill="white"
    )
    picture.paste(seen, corner)
    label = f"model input {flight.frames.shape[2]}x{flight.frames.shape[1]}"
    tiny = _font(max(7, round(columns / 36)))
    draw.text(
        (columns - margin, corner[1] - 4),
        label,
        font=tiny,
        fill="white",
        anchor="rb",
        stroke_width=2,
        stroke_fill="black",
    )
    return np.asarray(picture)


def _strip_rows(columns: int) -> int:
    """Rows of the caption, an even number."""
    return 2 * round(columns * 0.09)


def _predicted_poses(flight: FlownFlight, frame: int) -> np.ndarray:
    """Where the current segment's actions lead, from the step of `frame` on: float64 [n, 6]."""
    if frame >= len(flight.poses) - 1:
        return flight.poses[frame:]
    segment = _segment_of(flight, frame)
    first = flight.points[segment] - 1
    start = flight.poses[first]
    path = np.concatenate([start[None], integrate_actions(start, flight.segment_actions(segment))])
    return path[frame - first :]


def _segment_of(flight: FlownFlight, frame: int) -> int:
    """Segment whose actions are being flown at a 0-based frame."""
    borders = [point - 1 for point in flight.points]
    return max(i for i in range(flight.segments) if borders[i] <= frame)


def _carried_point_m(pose: np.ndarray, camera: CameraConfig) -> np.ndarray:
    forward, _ = heading_axes(float(pose[4]))
    drop = _AHEAD_M * np.tan(np.radians(camera.pitch_down_deg))
    return pose[:3] / 100.0 + _AHEAD_M * forward - (0.0, 0.0, drop)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _font(pixels: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings this font along, so that pictures look the same on every machine.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", pixels)


def _fitting_font(draw: ImageDraw.ImageDraw, text: str, width: int, pixels: int) -> ImageFont.FreeTypeFont:
    while pixels > 8 and draw.textlength(text, font=_font(pixels)) > width:
        pixels -= 1
    return _font(pixels)
