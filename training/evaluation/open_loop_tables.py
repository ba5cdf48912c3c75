"""Open-loop metrics as tables: where along the chain motion is lost, and how well every scale's bits are known.

Source: spec/training.md 2.9, 8.6.
"""

from __future__ import annotations

from worldvln_edge.runtime.bench.report_table import Part, Table
from worldvln_edge.training.stages.motion_metrics import COLUMNS

Metrics = dict[str, float]


def chain_parts(backbone: Metrics, action: Metrics, teacher_forced: Metrics, rgb_head: Metrics) -> list[Part]:
    """Sentences and tables. Metrics by the names of the stages' validation."""
    return [
        "Where motion is lost: the action heads over all segments, with true frames before each (NMSE: 1 is what the "
        "training mean reaches, so 1 is no skill). Latents are limited by the VAE, teacher-forced scales by what one "
        "scale can say, predicted latents by errors that scales hand on; the rest up to the closed loop is drift.",
        chain_table(action, teacher_forced, rgb_head),
        "Bits, held out: cross entropy of every scale beside the best fixed answer (ln 2 = 0.693 is a coin).",
        _bits(backbone),
    ]


def chain_table(action: Metrics, teacher_forced: Metrics, rgb_head: Metrics) -> Table:
    """Motion errors over segments, stage by stage. Metrics by the names of the stages' validation."""
    rows = [
        ("rgb head on real frames", rgb_head, "segment_"),
        ("true latents", action, "segment_"),
        ("teacher-forced scales", teacher_forced, "predicted_"),
        ("predicted latents", action, "predicted_"),
    ]
    columns = [column for column in COLUMNS if f"segment_nmse_{column}" in action]
    of_mean = (action.get("segment_mean_endpoint_m"), action.get("segment_mean_yaw_deg"))
    cells = [("training mean", *("1.000" for _ in columns), *(_number(end) for end in of_mean), "")]
    for name, metrics, prefix in rows:
        if f"{prefix}endpoint_m" in metrics:
            nmse = (_number(metrics.get(f"{prefix}nmse_{column}")) for column in columns)
            ends = (metrics.get(f"{prefix}endpoint_m"), metrics.get(f"{prefix}yaw_deg"))
            qualified = f"{metrics[f'{prefix}qualified']:.0%}"
            cells.append((name, *nmse, *(_number(end) for end in ends), qualified))
    header = ("motion from", *(f"NMSE {column}" for column in columns), "endpoint m", "yaw deg", "within 3 m, 10 deg")
    return Table(header, tuple(cells))


def _bits(backbone: Metrics) -> Table:
    scales = [name.removeprefix("bit_ce_") for name in backbone if name.startswith("bit_ce_clip")]
    rows = []
    for name in ("", "semantic", "detail"):
        prefix = f"{name}_" if name else ""
        if f"{prefix}bit_ce" in backbone:
            rows.append((name or "all", *_bit_cells(backbone, prefix, "")))
    rows += [(scale.replace("_", ", "), *_bit_cells(backbone, "", f"_{scale}")) for scale in scales]
    return Table(("bits", "CE", "majority CE", "right", "majority right"), tuple(rows))


def _bit_cells(backbone: Metrics, prefix: str, suffix: str) -> tuple[str, ...]:
    names = ("bit_ce", "majority_bit_ce", "bit_accuracy", "majority_bit_accuracy")
    return tuple(_number(backbone.get(f"{prefix}{name}{suffix}")) for name in names)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
