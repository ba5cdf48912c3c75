"""Picture of a benchmark: one bar a segment, its stages stacked. Drawn with Pillow alone, which every install has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from worldvln_edge.atomic import atomic_file
from worldvln_edge.runtime.bench.bench_comparison import ComparisonReport
from worldvln_edge.runtime.bench.bench_report import BenchReport

_COLOURS = {
    "preprocess": "#94a3b8",
    "vae_encoder": "#0d9488",
    "quantiser": "#a3a635",
    "text_encoder": "#be185d",
    "world_model_context": "#7c3aed",
    "world_model_step": "#0b6bd3",
    "vae_decoder": "#16a34a",
    "action_decoder": "#ea8a0c",
    "work_ahead": "#d6d3d1",
}
_OTHER, _INK, _QUIET = "#57534e", "#1f2937", "#64748b"
_BAR, _GAP, _MARGIN, _LABELS, _WIDTH, _LEGEND_COLUMNS = 30, 14, 24, 190, 1000, 4


@dataclass(frozen=True)
class Bar:
    label: str
    stages_ms: Mapping[str, float]


def bench_bars(report: BenchReport) -> list[Bar]:
    """One bar a segment, work ahead at its end."""
    return [
        Bar(f"segment {each.segment}", {**stages, "work_ahead": each.ahead.p50_ms})
        for each, stages in zip(report.segments, report.stages_by_segment, strict=True)
    ]


def comparison_bars(report: ComparisonReport) -> list[Bar]:
    """Two bars a segment."""
    bars = []
    exact, full = report.exact, report.full_horizon
    for index, stages in enumerate(full.stages_ms):
        bars.append(Bar(f"{index}  full horizon", stages))
        bars.append(Bar(f"{index}  exact", {**exact.stages_ms[index], "work_ahead": exact.ahead_ms[index]}))
    return bars


def write_bar_plot(path: Path, title: str, bars: Sequence[Bar]) -> None:
    """Write stacked horizontal bars in the format that the name ends with (PNG, WebP, JPEG).

    Raises:
        ValueError: no bars, or a name whose format Pillow does not write.
    """
    if not bars:
        raise ValueError("a plot needs at least one bar")
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: pictures of this format cannot be written; end the name with .png")
    stages = list(dict.fromkeys(stage for bar in bars for stage in bar.stages_ms))
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    legend_rows = -(-len(stages) // _LEGEND_COLUMNS)
    top = _MARGIN + 34
    bottom = top + len(bars) * (_BAR + _GAP)
    picture = Image.new("RGB", (_WIDTH, bottom + 24 * legend_rows + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN - 6), title, fill=_INK, font=font)
    left, longest = _LABELS, max(sum(bar.stages_ms.values()) for bar in bars)
    room = _WIDTH - left - _MARGIN - 90
    for row, bar in enumerate(bars):
        y, total = top + row * (_BAR + _GAP), 0.0
        draw.text((_MARGIN, y + _BAR / 2), bar.label, fill=_INK, font=font, anchor="lm")
        for stage in stages:
            spent = bar.stages_ms.get(stage, 0.0)
            box = [left + room * total / longest, y, left + room * (total + spent) / longest, y + _BAR]
            if box[2] - box[0] >= 0.5:
                draw.rectangle(box, fill=_COLOURS.get(stage, _OTHER))
            total += spent
        end = (left + room * total / longest + 8, y + _BAR / 2)
        draw.text(end, _duration(total), fill=_QUIET, font=small, anchor="lm")
    column = (_WIDTH - 2 * _MARGIN) / _LEGEND_COLUMNS
    for index, stage in enumerate(stages):
        x = _MARGIN + column * (index % _LEGEND_COLUMNS)
        y = bottom + _MARGIN + 24 * (index // _LEGEND_COLUMNS)
        draw.rectangle([x, y, x + 14, y + 14], fill=_COLOURS.get(stage, _OTHER))
        draw.text((x + 22, y + 7), stage.replace("_", " "), fill=_INK, font=small, anchor="lm")
    with atomic_file(path) as building:
        picture.save(building, format=Image.registered_extensions()[path.suffix.lower()])


def _duration(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"
